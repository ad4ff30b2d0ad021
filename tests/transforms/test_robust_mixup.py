"""RobustMixup: plain mixup when nothing climbs, and each of its climbs on a trained network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from ijsat_aug import JointSpaceAdv, RobustMixup
from ijsat_aug.flows import Decoder
from ijsat_aug.functional import robust_mixup
from ijsat_aug.transforms.mixing import adversity


def soft_loss(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return -(t * net(x).log_softmax(1)).sum(1)


def with_lam(mix: RobustMixup, x: Tensor, y: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """The transform with given weights."""
    targets = mix.as_labels(x, y)
    params = mix.make_params(x, targets) | {"lam": lam}
    return mix.transform(x, targets, params)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_without_a_climb_it_is_torchvisions_mixup(soft, normalised, digits, labels) -> None:
    x, y = digits[:7], labels[:7]
    if normalised:
        x = (x - 0.3) / 0.25
    reference = v2.MixUp(num_classes=10)
    expected_x, expected_y = (
        reference.transform(x, {"labels": y, "batch_size": 7, "lam": 0.3}),
        reference._mixup_label(y, lam=0.3) if hasattr(reference, "_mixup_label") else None,
    )
    scale = {"mean": 0.3, "std": 0.25} if normalised else {}
    mix = RobustMixup(num_classes=10, eps=0, **scale)
    labels_in = F.one_hot(y, 10).float() if soft else y
    out, t = with_lam(mix, x, labels_in, torch.full((7,), 0.3))
    assert torch.allclose(out, expected_x, atol=1e-6)
    one_hot = F.one_hot(y, 10).float()
    assert torch.allclose(t, 0.3 * one_hot + 0.7 * one_hot.roll(1, 0), atol=1e-6)
    if expected_y is not None:
        assert torch.allclose(t, expected_y, atol=1e-6)


def test_the_weight_is_that_of_the_own_image(digits, labels) -> None:
    mix = RobustMixup(num_classes=10, eps=0)
    lam = torch.tensor([1.0, 0.0, 0.5])
    out, t = with_lam(mix, digits[:3], labels[:3], lam)
    assert torch.equal(out[0], digits[0])
    assert torch.equal(out[1], digits[0])
    assert torch.allclose(out[2], (digits[2] + digits[1]) / 2)
    assert torch.equal(mix.last["lam"], lam)
    assert t[0, labels[0]] == 1
    assert t[1, labels[0]] == 1


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_weights_follow_the_beta_distribution(alpha, digits, labels) -> None:
    mix = RobustMixup(num_classes=10, eps=0, alpha=alpha, generator=0)
    lam = torch.cat([mix.make_params(digits, None)["lam"] for _ in range(60)])
    expected = torch.distributions.Beta(alpha, alpha)
    assert lam.mean().item() == pytest.approx(0.5, abs=0.01)
    assert lam.var().item() == pytest.approx(expected.variance.item(), rel=0.03)
    batch = RobustMixup(num_classes=10, eps=0, per_sample=False, generator=0)
    one = batch.make_params(digits, None)["lam"]
    assert one.shape == (len(digits),)
    assert one.unique().numel() == 1


@pytest.mark.parametrize("attack", [None, "joint", "linear", "callable", "plain"])
@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_labels_are_rows_that_sum_to_one(attack, p, count, net, digits, labels, flow) -> None:
    attacks = {
        None: None,
        "joint": JointSpaceAdv(net, flow),
        "linear": JointSpaceAdv(None, flow, method="linear"),
        "callable": lambda x, t: (x * 0.9, t),
        "plain": lambda x, t: x * 0.9,
    }
    mix = RobustMixup(net, num_classes=10, attack=attacks[attack], p=p)
    x, t = mix(digits[:count], labels[:count])
    assert x.shape == digits[:count].shape
    assert t.shape == (count, 10)
    assert t.dtype == torch.float32
    assert torch.allclose(t.sum(1), torch.ones(count), atol=1e-6)
    if p == 0:
        assert torch.equal(x, digits[:count])
        assert torch.equal(t.argmax(1), labels[:count])
        assert mix.last == {}


def test_each_climb_raises_the_loss_of_the_same_blends(net, digits, labels, flow) -> None:
    """Mixup < Robust Mixup < joint space, with the same weights."""
    lam = torch.rand(len(digits), generator=torch.Generator().manual_seed(0))
    losses = []
    for own in ({"eps": 0.0}, {"eps": 0.03}, {"attack": JointSpaceAdv(net, flow, eps=0.03)}):
        mix = RobustMixup(net, num_classes=10, **own)
        x, t = with_lam(mix, digits, labels, lam)
        losses.append(soft_loss(net, x, t).mean().item())
    assert losses[0] < losses[1] - 0.02 < losses[2] - 0.04


def test_the_blend_gets_its_own_exact_latent(net, digits, labels, flow) -> None:
    still = JointSpaceAdv(net, flow, eps=0, eta=0.1, latent_step_size=0, random_start=False)
    mix = RobustMixup(net, num_classes=10, attack=still)
    lam = torch.rand(16)
    out, _ = with_lam(mix, digits[:16], labels[:16], lam)
    w = lam[:, None, None, None]
    assert torch.allclose(out, w * digits[:16] + (1 - w) * digits[:16].roll(1, 0), atol=1e-6)


class Knowing(nn.Module):
    """Knows the weight of a blend of black (class 0) and white (class 1): p = mixed label."""

    def forward(self, x: Tensor) -> Tensor:
        white = x.mean((1, 2, 3)).clamp(1e-6, 1 - 1e-6)
        return torch.stack([1 - white, white], 1).log()


def black_and_white(count: int) -> tuple[Tensor, Tensor]:
    y = torch.arange(count) % 2
    return y[:, None, None, None].float().expand(-1, 1, 2, 2).clone(), y


def test_cross_entropy_pulls_weights_to_one_half_and_kl_does_not() -> None:
    """CE = KL + H(t), and a model that knows every blend has KL = 0 everywhere."""
    x, y = black_and_white(16)
    lam = torch.linspace(0.05, 0.95, 16)
    found = {}
    for objective in ("ce", "kl"):
        mix = RobustMixup(
            Knowing(), num_classes=2, eps=0, lam_steps=40, rho=1.0, lam_step_size=0.02,
            lam_objective=objective,
        )  # fmt: skip
        with_lam(mix, x, y, lam)
        found[objective] = mix.last["lam"]
    assert (found["ce"] - 0.5).abs().max() < 0.03
    # Its gradient is rounding alone; a sign step of noise goes both ways.
    assert (found["kl"] - lam).abs().mean() < 0.15
    assert (found["kl"] - 0.5).abs().mean() > 0.15


def test_weights_climb_within_rho(net, digits, labels) -> None:
    lam = torch.rand(len(digits), generator=torch.Generator().manual_seed(1))
    losses = []
    for steps in (0, 5):
        mix = RobustMixup(net, num_classes=10, eps=0, lam_steps=steps, rho=0.2)
        x, t = with_lam(mix, digits, labels, lam)
        losses.append(adversity("kl")(net(x), t))
        weight = mix.last["lam"]
        assert (weight - lam).abs().max() <= 0.2 + 1e-6
        assert weight.min() >= 0
        assert weight.max() <= 1
        own, partner = F.one_hot(labels, 10), F.one_hot(labels.roll(1), 10)
        assert torch.allclose(t, weight[:, None] * own + (1 - weight[:, None]) * partner, atol=1e-5)
    assert (losses[1] - losses[0]).mean() > 0.02
    assert (losses[1] >= losses[0] - 1e-3).float().mean() > 0.8


def test_the_worst_draw_is_taken(net, digits, labels) -> None:
    x, y = digits[:32], labels[:32]
    lam = torch.rand(4, 32)
    mix = RobustMixup(net, num_classes=10, eps=0, draws=4)
    out, t = with_lam(mix, x, y, lam)
    every = []
    for row in lam:
        alone = RobustMixup(net, num_classes=10, eps=0)
        every.append(adversity("kl")(net(with_lam(alone, x, y, row)[0]), alone_targets(y, row)))
    worst = torch.stack(every).argmax(0)
    assert torch.allclose(mix.last["lam"], lam[worst, torch.arange(32)])
    assert torch.allclose(adversity("kl")(net(out), t), torch.stack(every).amax(0), atol=1e-4)


def alone_targets(y: Tensor, lam: Tensor) -> Tensor:
    one_hot = F.one_hot(y, 10).float()
    return lam[:, None] * one_hot + (1 - lam[:, None]) * one_hot.roll(1, 0)


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({"eps": 0}, 0),
        ({}, 1),
        ({"steps": 3}, 3),
        ({"steps": 2, "lam_steps": 4}, 6),
        ({"draws": 3, "eps": 0}, 3),
        ({"draws": 3, "lam_steps": 2}, 6),
        ({"order": "attack-mix", "steps": 2}, 2),
        ({"p": 0.0}, 0),
        ({"label": "geometric"}, 1),
    ],
)
def test_nothing_is_computed_and_thrown_away(options, forwards, network, digits, labels) -> None:
    calls: list[int] = []
    network.register_forward_hook(lambda m, i, o: calls.append(1))
    before = copy.deepcopy(network.state_dict())
    RobustMixup(network, num_classes=10, **options)(digits[:8], labels[:8])
    assert len(calls) == forwards
    assert all(m.training for m in network.modules())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_attack_then_mix_is_iat(net, digits, labels) -> None:
    x, y = digits[:8], labels[:8]
    mix = RobustMixup(net, num_classes=10, eps=0.1, steps=2, order="attack-mix", random_start=False)
    lam = torch.rand(8)
    out, t = with_lam(mix, x, y, lam)
    attacked, _ = JointSpaceAdv(net, eta=0, eps=0.1, steps=2, random_start=False)(x, y)
    w = lam[:, None, None, None]
    assert torch.allclose(out, w * attacked + (1 - w) * attacked.roll(1, 0), atol=1e-6)
    assert torch.allclose(t, alone_targets(y, lam), atol=1e-6)


@pytest.mark.parametrize("space", ["latent", "spherical"])
def test_mixing_on_the_manifold(space, digits, labels, flow) -> None:
    x, y = digits[:8], labels[:8]
    mix = RobustMixup(num_classes=10, eps=0, space=space, flow=flow)
    lam = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5, 0.5, 0.3, 0.8])
    out, t = with_lam(mix, x, y, lam)
    assert torch.allclose(out[[0, 2]], x[[0, 2]], atol=1e-5)
    assert torch.allclose(out[[1, 3]], x[[0, 2]], atol=1e-5)
    assert torch.allclose(t, alone_targets(y, lam), atol=1e-6)
    z = flow.encode(x)
    middle, partner = flow.encode(out[4:]), z.roll(1, 0)[4:]
    w = lam[4:, None]
    if space == "latent":
        expected = w * z[4:] + (1 - w) * partner
        inside = ((out[4:] > 1e-6) & (out[4:] < 1 - 1e-6)).flatten(1).all(1)
        assert torch.allclose(middle[inside], expected[inside], atol=1e-2)
    pixels = w[..., None, None] * x[4:] + (1 - w[..., None, None]) * x.roll(1, 0)[4:]
    assert (out[4:] - pixels).abs().max() > 0.1


def test_a_flow_by_name(digits, labels, flow) -> None:
    mixes = [
        RobustMixup(num_classes=10, eps=0, space="latent", flow=f, generator=0)
        for f in (flow, "digits")
    ]
    one, two = (mix(digits[:6], labels[:6])[0] for mix in mixes)
    assert torch.equal(one, two)
    with pytest.raises(TypeError, match=r"got Linear; load one with ijsat_aug\.load_flow"):
        RobustMixup(num_classes=10, space="latent", flow=nn.Linear(2, 2))


def test_spherical_mixing_keeps_the_length(flow) -> None:
    from ijsat_aug.transforms.blend import _slerp

    a, b = torch.randn(5, 64), torch.randn(5, 64)
    for w in (0.0, 0.3, 0.5, 1.0):
        mixed = _slerp(a, b, torch.full((5, 1), w))
        expected = torch.lerp(a.norm(dim=1), b.norm(dim=1), w)
        assert torch.allclose(mixed.norm(dim=1), expected, rtol=1e-4)
    assert torch.allclose(_slerp(a, b, torch.ones(5, 1)), b, atol=1e-4)
    assert torch.allclose(_slerp(a, a, torch.full((5, 1), 0.4)), a, atol=1e-2)


def test_weights_climb_through_the_flow(net, digits, labels, flow) -> None:
    x, y = digits[:32], labels[:32]
    lam = torch.rand(32)
    losses = []
    for steps in (0, 4):
        mix = RobustMixup(
            net, num_classes=10, eps=0, space="latent", flow=flow, lam_steps=steps, rho=0.2
        )
        out, t = with_lam(mix, x, y, lam)
        losses.append(adversity("kl")(net(out), t).mean().item())
    assert losses[1] > losses[0] + 0.01


def test_geometric_labels_lie_where_the_image_lies() -> None:
    x, y = black_and_white(4)
    grey = RobustMixup(num_classes=2, attack=lambda x, t: x * 0.5, label="geometric")
    out, t = with_lam(grey, x, y, torch.full((4,), 0.8))
    white = out.mean((1, 2, 3))
    assert torch.allclose(t[:, 1], white, atol=1e-6)
    same = RobustMixup(num_classes=2, attack=lambda x, t: x, label="geometric")
    _, t = with_lam(same, x[:1], y[:1], torch.full((1,), 0.8))
    assert torch.allclose(t, torch.tensor([[1.0, 0.0]]))


def test_append_keeps_the_clean_batch_in_front(net, digits, labels, flow) -> None:
    x, y = digits[:6], labels[:6]
    out, t = RobustMixup(net, num_classes=10, mode="append")(x, y)
    assert out.shape[0] == t.shape[0] == 12
    assert torch.equal(out[:6], x)
    assert torch.equal(t[:6], F.one_hot(y, 10).float())
    assert (t[6:].amax(1) < 1).any()
    out, both = JointSpaceAdv(net, flow, mode="append")(x, y)
    assert torch.equal(out[:6], x)
    assert torch.equal(both, torch.cat([y, y]))
    assert not torch.equal(out[6:], x)


def test_fraction_is_the_share_of_samples(net, digits, labels, flow) -> None:
    x, y = digits[:20], labels[:20]
    sizes: list[int] = []
    net.register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    for adv in (
        JointSpaceAdv(net, flow, fraction=0.25, generator=0),
        RobustMixup(net, num_classes=10, fraction=0.25, generator=0),
    ):
        touched = torch.zeros(20)
        for _ in range(40):
            out, t = adv(x, y)
            changed = (out != x).flatten(1).any(1)
            assert changed.sum() == 5
            assert sizes[-1] == 5
            touched += changed
            same = t if t.ndim == 1 else t.argmax(1)
            assert torch.equal(same[~changed], y[~changed])
        assert (touched > 0).all()
    nothing, _ = JointSpaceAdv(net, flow, fraction=0.0)(x, y)
    assert torch.equal(nothing, x)


def test_settings_reach_the_built_in_attack(network, digits, labels) -> None:
    mix = RobustMixup(
        num_classes=10, eps=0.1, steps=4, norm="l2", objective="margin", amp_dtype=torch.bfloat16,
        mean=0.5, std=0.5,
    )  # fmt: skip
    assert mix.needs_model
    with pytest.raises(ValueError, match=r"RobustMixup has no model yet.*bind"):
        mix(digits[:2] * 2 - 1, labels[:2])
    mix.bind(network)
    assert mix.attack.model is network
    assert mix.attack.threat.norm == "l2"
    assert mix.attack.handle.amp_dtype == torch.bfloat16
    mix(digits[:4] * 2 - 1, labels[:4])
    assert "alpha=1.0" in repr(mix)
    assert mix.eval()(digits, labels)[0] is digits


@pytest.mark.parametrize("make", [
    lambda n, f: RobustMixup(n, num_classes=10, generator=0),
    lambda n, f: RobustMixup(n, num_classes=10, generator=0, lam_steps=2, draws=2),
    lambda n, f: RobustMixup(n, num_classes=10, generator=0,
                             attack=JointSpaceAdv(n, f, generator=1)),
])  # fmt: skip
def test_a_seed_replays_and_leaves_the_global_state_alone(
    make: Callable, net, digits, labels, flow
) -> None:
    before = torch.get_rng_state()
    one = make(net, flow)(digits[:8], labels[:8])
    assert torch.equal(before, torch.get_rng_state())
    two = make(net, flow)(digits[:8], labels[:8])
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    with torch.inference_mode():
        three = make(net, flow)(digits[:8].clone(), labels[:8].clone())
    assert torch.equal(one[0], three[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha must be a number > 0"),
        ({"draws": 0}, "draws must be an integer >= 1"),
        ({"lam_steps": -1}, "lam_steps must be an integer >= 0"),
        ({"rho": 2}, "rho is a distance"),
        ({"order": "mix"}, '"mix-attack", "attack-mix"'),
        ({"space": "fourier"}, '"pixel", "latent", "spherical"'),
        ({"space": "latent"}, "needs a flow"),
        ({"label": "untied"}, '"linear", "geometric"'),
        ({"label": "geometric", "order": "attack-mix"}, "needs order"),
        ({"lam_objective": "margin"}, '"kl", "ce"'),
        ({"num_classes": 1}, "num_classes must be an integer >= 2"),
        ({"mode": "append", "p": 0.5}, "needs p=1"),
        ({"num_classes": 10.0}, "num_classes must be an integer >= 2"),
        ({"eps": -1}, "eps must be a number >= 0"),
        ({"eps": float("nan")}, "eps must be a number >= 0"),
        ({"eps": 0, "norm": "l3"}, "norm must be one of"),
        ({"attack": lambda x, t: x, "eps": 0.1, "steps": 3}, "eps, steps: of the built-in attack"),
        ({"attack": JointSpaceAdv(eta=0, mode="append")}, 'mode="replace"'),
        ({"per_sample": False, "draws": 3}, "per_sample=False is one weight"),
        ({"per_sample": False, "lam_steps": 1}, "per_sample=False is one weight"),
        ({"mode": "append", "fraction": 0.5}, "needs fraction=1"),
        ({"mode": "prepend"}, '"replace" or "append"'),
        ({"fraction": 2}, "fraction is a share"),
    ],
)
def test_settings(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        RobustMixup(nn.Identity(), **options)


@pytest.mark.parametrize(
    ("y", "options", "message"),
    [
        (None, {}, "mixup needs labels"),
        (torch.tensor([1, 2]), {"num_classes": None}, "need num_classes="),
        (torch.tensor([1, 10]), {}, "num_classes=10 allows 0 to 9"),
        (torch.full((2, 5), 0.2), {}, "5 classes, num_classes is 10"),
        (torch.rand(2), {}, "rows of shape"),
        (torch.rand(2), {"eps": 0.1}, "probabilities of shape"),
    ],
)
def test_bad_labels(y, options, message, digits) -> None:
    mix = RobustMixup(nn.Identity(), **{"num_classes": 10, "eps": 0, **options})
    with pytest.raises(ValueError, match=message):
        mix(digits[:2], y) if y is not None else mix(digits[:2])


@pytest.mark.parametrize("attack", ["pgd", JointSpaceAdv])
def test_an_attack_is_an_instance_or_a_function(attack) -> None:
    with pytest.raises(TypeError, match="attack must be a transform or a callable"):
        RobustMixup(num_classes=10, attack=attack)


@pytest.mark.parametrize("out", [lambda x: x[:1], lambda x: {"image": x}, lambda x: ()])
def test_an_attack_returns_the_images(out, digits, labels) -> None:
    mix = RobustMixup(num_classes=10, attack=lambda x, t: out(x))
    with pytest.raises(ValueError, match="attack must return images of shape"):
        mix(digits[:4], labels[:4])


@pytest.mark.parametrize("given_to", ["the mixup", "the attack", "both"])
def test_mean_and_std_count_for_both(given_to, net, digits, labels, flow) -> None:
    units = {"mean": [0.5], "std": [0.25]}
    attack = JointSpaceAdv(net, flow, **({} if given_to == "the mixup" else units))
    mix = RobustMixup(
        net, num_classes=10, attack=attack, generator=0,
        **({} if given_to == "the attack" else units),
    )  # fmt: skip
    x, t = mix((digits - 0.5) / 0.25, labels)
    assert mix.last["latent_norm"].min() > 0
    same = RobustMixup(
        lambda image: net((image - 0.5) / 0.25), num_classes=10, generator=0,
        attack=JointSpaceAdv(None, flow),
    )  # fmt: skip
    expected, targets = same(digits, labels)
    assert torch.equal(t, targets)
    assert torch.allclose(x * 0.25 + 0.5, expected, atol=1e-5)


def test_an_attack_of_other_units_is_refused(net, flow) -> None:
    attack = JointSpaceAdv(net, flow, mean=0.4, std=0.25)
    with pytest.raises(ValueError, match="different mean and std"):
        RobustMixup(net, num_classes=10, attack=attack, mean=0.5, std=0.25)
    RobustMixup(net, num_classes=10, attack=attack, mean=[0.4], std=[0.25])


def test_the_callers_attack_stays_as_it_is(net, flow) -> None:
    attack = JointSpaceAdv(None, flow)
    first, second = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))
    units = {"mean": 0.5, "std": 0.5, "generator": 0}
    one = RobustMixup(first, num_classes=10, attack=attack, mode="append", **units)
    two = RobustMixup(second, num_classes=10, attack=attack)
    assert (one.attack.model, two.attack.model, attack.model) == (first, second, None)
    assert (one.attack.handle.route, attack.handle.route) == ("auxiliary", "clean")
    assert attack.scale == two.scale != one.scale
    one.eval()
    assert attack.training


def test_each_copy_of_an_attack_says_what_it_has_to_say(flow, digits, labels) -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, 10))
    attack = JointSpaceAdv(net, flow)
    large = F.interpolate(digits[:4], scale_factor=2.0)
    for _ in range(2):
        with pytest.warns(UserWarning, match="the flow takes images of 8x8, the batch has 16x16"):
            RobustMixup(net, num_classes=10, attack=attack)(large, labels[:4])


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_what_is_told_of_a_part_of_a_batch_has_a_place_for_all(
    space, net, digits, labels, flow
) -> None:
    attack = JointSpaceAdv(net, flow, fraction=0.5)
    place = {"space": space, "flow": flow} if space == "latent" else {}
    mix = RobustMixup(net, num_classes=10, attack=attack, fraction=0.5, generator=0, **place)
    mix(digits, labels)
    count = len(digits)
    assert {tuple(fact.shape) for fact in mix.last.values()} == {(count,)}
    assert int((mix.last["latent_norm"] > 0).sum()) == count // 4
    assert int(mix.last["loss"].isfinite().sum()) == count // 4
    assert int((mix.last["lam"] < 1).sum()) == count // 2
    assert not mix.last["fallback"].any()


def test_an_attack_takes_the_precision_that_it_lacks(net, flow) -> None:
    options = {"amp_dtype": torch.bfloat16, "memory_format": torch.channels_last}
    low = RobustMixup(net, num_classes=10, attack=JointSpaceAdv(net, flow), **options)
    assert low.attack.handle.amp_dtype == torch.bfloat16
    assert low.attack.handle.memory_format == torch.channels_last
    own = JointSpaceAdv(net, flow, amp_dtype=torch.float32)
    low = RobustMixup(net, num_classes=10, attack=own, **options)
    assert low.attack.handle.amp_dtype == torch.float32


def test_a_seed_governs_the_attack_too(net, digits, labels, flow) -> None:
    def make() -> RobustMixup:
        attack = JointSpaceAdv(net, flow, eps=0.05)
        return RobustMixup(net, num_classes=10, attack=attack, generator=0)

    state = torch.get_rng_state()
    one, two = (make()(digits[:6], labels[:6]) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(state, torch.get_rng_state())


def test_another_attack_is_no_part_of_the_transform(net, digits, labels) -> None:
    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 1 - x

    mix = RobustMixup(num_classes=10, attack=Theirs())
    mix(digits[:4], labels[:4])
    assert not list(mix.parameters())
    net.train()
    mix.eval()
    assert net.training


def test_a_targeted_attack_gets_the_labels(net, digits, labels) -> None:
    adv = JointSpaceAdv(net, eta=0, eps=0.1, targeted=True)
    _, t = RobustMixup(net, num_classes=10, attack=adv)(digits[:6], labels[:6])
    assert t.shape == (6, 10)


def test_blends_that_do_not_decode_are_straight_and_counted(digits, labels, flow) -> None:
    class Broken:
        shape, latent_dim = flow.shape, flow.latent_dim

        def encode(self, x: Tensor) -> Tensor:
            return flow.encode(x)

        def decode(self, z: Tensor) -> Tensor:
            return torch.where(torch.arange(len(z))[:, None, None, None] < 2, torch.nan, 1.0) * (
                flow.decode(z)
            )

    x, y = digits[:5], labels[:5]
    mix = RobustMixup(num_classes=10, eps=0, space="latent", flow=Broken())
    lam = torch.full((5,), 0.4)
    out, _ = with_lam(mix, x, y, lam)
    assert mix.last["fallback"].tolist() == [True, True, True, False, False]  # 2 has 1 as partner
    assert torch.allclose(out[:3], (0.4 * x + 0.6 * x.roll(1, 0))[:3], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_sum_to_one_whatever_the_precision_of_the_labels(dtype, digits) -> None:
    soft = torch.rand(8, 1000).softmax(1).to(dtype)
    _, t = RobustMixup(eps=0)(digits[:8], soft)
    assert t.dtype == torch.float32
    assert (t.sum(1) - 1).abs().max() < 1e-5


def test_a_fraction_keeps_the_memory_format(net) -> None:
    x = torch.rand(8, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    y = torch.arange(8)
    out, _ = RobustMixup(num_classes=8, eps=0, fraction=0.5)(x, y)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_no_images_at_all(net) -> None:
    for lam in (0.5, torch.empty(0)):
        out, t = robust_mixup(
            torch.empty(0, 1, 8, 8), torch.empty(0).long(), lam=lam, num_classes=4
        )
        assert out.shape == (0, 1, 8, 8)
        assert t.shape == (0, 4)


@pytest.mark.parametrize(
    "getter", [lambda b: b[1].clone(), lambda b: b[2]["y"]], ids=["a copy", "a part"]
)
def test_labels_that_have_no_place_are_refused(getter, digits, labels) -> None:
    mix = RobustMixup(num_classes=10, eps=0, labels_getter=getter)
    with pytest.raises(ValueError, match="no place for the new labels"):
        mix((digits[:4], labels[:4], {"y": labels[:4].clone()}))


class Dim(nn.Module):
    """Its logits are no numbers for images that are brighter than 0.6."""

    def forward(self, x: Tensor) -> Tensor:
        left = (0.6 - x.mean((1, 2, 3))).log()
        return torch.stack([left, -left], 1)


def test_a_draw_without_a_loss_is_not_the_worst() -> None:
    x, y = black_and_white(2)
    mix = RobustMixup(Dim(), num_classes=2, eps=0, draws=2)
    with_lam(mix, x, y, torch.tensor([[0.1, 0.9], [0.5, 0.5]]))
    assert mix.last["lam"].tolist() == [0.5, 0.5]


def test_a_weight_that_lost_its_loss_is_that_of_the_draw() -> None:
    x, y = black_and_white(2)
    drawn = torch.tensor([0.5, 0.5])

    def climbed(steps: int) -> Tensor:
        mix = RobustMixup(Dim(), num_classes=2, eps=0, lam_steps=steps, rho=0.4, lam_step_size=0.15)
        with_lam(mix, x, y, drawn)
        return mix.last["lam"]

    once = climbed(1)
    too_bright = torch.stack([1 - once[0], once[1]]) > 0.6  # after the first of three steps
    assert too_bright.any()
    assert torch.equal(climbed(3) == drawn, too_bright)


def test_what_the_attack_lost_is_counted_beside_what_the_decoder_lost(digits, labels, flow) -> None:
    attack = JointSpaceAdv(lambda x: x.flatten(1) * torch.nan, eta=0)
    mix = RobustMixup(num_classes=64, attack=attack, space="latent", flow=flow)
    mix(digits[:4], labels[:4])
    assert mix.last["fallback"].all()


@pytest.mark.parametrize("options", [{"draws": 4}, {"lam_steps": 2}])
def test_weights_are_chosen_on_blends_as_the_model_gets_them(options, net, digits, labels) -> None:
    plain = RobustMixup(net, num_classes=10, eps=0, generator=0, **options)
    plain(digits[:40], labels[:40])
    mix = RobustMixup(
        lambda z: net(z * 0.25 + 0.5), num_classes=10, eps=0, generator=0, mean=0.5, std=0.25,
        **options,
    )  # fmt: skip
    mix((digits[:40] - 0.5) / 0.25, labels[:40])
    assert torch.allclose(mix.last["lam"], plain.last["lam"], atol=1e-5)


def test_dropout_in_the_choice_of_weights_is_seeded(network, digits, labels) -> None:
    network[6].p = 0.5
    state, lams = torch.get_rng_state(), []
    for _ in range(2):
        mix = RobustMixup(network, num_classes=10, eps=0, draws=8, model_mode="train", generator=0)
        mix(digits[:32], labels[:32])
        lams.append(mix.last["lam"])
    assert torch.equal(*lams)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_an_autoencoder_misses_is_blended_with_the_images(digits, labels) -> None:
    coarse = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
    back = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Upsample(scale_factor=2))
    flow = Decoder(back, (1, 8, 8), (16,), coarse)
    mix = RobustMixup(num_classes=10, eps=0, space="latent", flow=flow)
    out, _ = with_lam(mix, digits[:3], labels[:3], torch.tensor([1.0, 0.0, 1.0]))
    assert torch.allclose(out, digits[[0, 0, 2]], atol=1e-6)


def test_blends_on_the_manifold_are_pixels(digits, labels, flow) -> None:
    mix = RobustMixup(num_classes=10, eps=0, space="latent", flow=flow)
    out, _ = with_lam(mix, digits[:16], labels[:16], torch.full((16,), 0.5))
    assert out.min() >= 0
    assert out.max() <= 1


def test_geometric_labels_stay_probabilities() -> None:
    x, y = black_and_white(4)
    mix = RobustMixup(num_classes=2, attack=lambda x, t: 2 * x - 0.5, label="geometric")
    _, t = with_lam(mix, x, y, torch.full((4,), 0.9))
    assert t.min() == 0
    assert t.max() == 1


def test_another_model_is_that_of_the_attack_too(net) -> None:
    other = nn.Identity()
    assert RobustMixup(net, num_classes=10).bind(other).attack.model is other
    own = RobustMixup(net, num_classes=10, attack=JointSpaceAdv(other, eta=0))
    assert own.bind(nn.Identity()).attack.model is other


def test_an_attack_that_is_told_to_rest_leaves_the_blends_alone(net, digits, labels) -> None:
    mix = RobustMixup(net, num_classes=10, eps=0.1)
    mix.attack.eval()
    mix(digits[:4], labels[:4])
    assert mix.last.keys() == {"lam"}


def test_the_mode_of_the_model_reaches_the_built_in_attack(network, digits, labels) -> None:
    modes = []
    network.register_forward_hook(lambda m, i, o: modes.append(m.training))
    for mode in ("eval", "train"):
        robust_mixup(
            digits[:4], labels[:4], network, lam=0.5, num_classes=10, eps=0.1, model_mode=mode
        )
    assert modes == [False, True]


def test_the_mode_of_a_preset_is_that_of_its_attack(net) -> None:
    mix = RobustMixup.preset("accuracy", net, "digits", num_classes=10, model_mode="train")
    assert mix.attack.handle.mode == mix.handle.mode == "train"


def test_an_attack_that_moves_nothing_leaves_geometric_labels_linear() -> None:
    """Three images have two neighbours each, of which one is the partner."""
    x, y = torch.rand(3, 1, 4, 4), torch.arange(3)
    lam = torch.tensor([0.8, 0.6, 0.9])
    geometric, linear = (
        with_lam(RobustMixup(num_classes=3, attack=lambda x, t: x, label=kind), x, y, lam)[1]
        for kind in ("geometric", "linear")
    )
    assert torch.allclose(geometric, linear, atol=1e-5)


def test_labels_of_a_fraction_are_mixed_where_the_images_are(digits, labels) -> None:
    x, y = digits[:20], labels[:20]
    mix = RobustMixup(num_classes=10, eps=0, fraction=0.5, generator=0)
    mixed, t = mix(x, y)
    hot = nn.functional.one_hot(y, 10).float()
    same = (mixed == x).flatten(1).all(1)
    assert torch.equal(t[same], hot[same])
    own = t.gather(1, y[:, None]).squeeze(1)
    assert torch.allclose(own[~same & (own < 1)], mix.last["lam"][~same & (own < 1)], atol=1e-6)
    assert int((own < 1).sum()) > 5


def test_geometric_labels_of_equal_images_are_linear() -> None:
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.arange(2)
    mix = RobustMixup(num_classes=2, attack=lambda x, t: x * 0.5, label="geometric")
    _, t = with_lam(mix, x, y, torch.tensor([0.8, 0.6]))
    assert torch.allclose(t, torch.tensor([[0.8, 0.2], [0.4, 0.6]]))
