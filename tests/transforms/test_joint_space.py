"""JointSpaceAdv on trained networks, real digits and their flow: what each setting is for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijsat_aug import JointSpaceAdv
from ijsat_aug.attack import cross_entropy, margin
from ijsat_aug.flows import recommended_eta
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.flows.pyramid import Pyramid
from ijsat_aug.transforms.threat import Threat


def loss(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return F.cross_entropy(net(x), y).item()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return (net(x).argmax(1) == y).float().mean().item()


def test_the_default_is_a_small_augmentation(net, digits, labels, flow) -> None:
    adv = JointSpaceAdv(net, flow)
    x, y = adv(digits, labels)
    assert loss(net, x, y) > 1.5 * loss(net, digits, labels)
    assert accuracy(net, x, y) > 0.8
    assert adv.threat.steps == 1
    assert adv.last["pixel_norm"].max() <= 1 / 255 + 1e-7


def test_more_steps_and_wider_balls_are_worse(net, digits, labels, flow) -> None:
    losses = [
        loss(net, *JointSpaceAdv(net, flow, generator=0, **options)(digits, labels))
        for options in (
            {"steps": 1, "eta": 0.02},
            {"steps": 1, "eta": 0.1},
            {"steps": 5, "eta": 0.1},
            {"steps": 5, "eta": 0.1, "eps": 0.05},
        )
    ]
    assert losses == sorted(losses)


@pytest.mark.parametrize("objective", ["ce", "kl", "margin", cross_entropy, margin])
def test_every_objective_fools(objective, net, digits, labels, flow) -> None:
    adv = JointSpaceAdv(net, flow, eps=0.1, eta=0.2, steps=5, objective=objective)
    x, y = adv(digits[:128], labels[:128])
    assert accuracy(net, x, y) < 0.3 < 0.95 < accuracy(net, digits, labels)


def test_kl_is_climbed_from_the_clean_prediction(net, digits, labels, flow) -> None:
    adv = JointSpaceAdv(net, flow, eps=0.05, eta=0.05, steps=4, objective="kl", best=True)
    x, _ = adv(digits[:32], (labels[:32] + 1) % 10)  # the labels have no part in it
    clean, moved = net(digits[:32]).log_softmax(1), net(x).log_softmax(1)
    expected = (clean.exp() * (clean - moved)).sum(1)
    assert torch.allclose(adv.last["loss"], expected, atol=1e-4)
    assert (adv.last["loss"] > adv.last["loss_start"]).all()


def test_soft_labels_are_hard_labels_when_one_hot(net, digits, labels, flow) -> None:
    y = labels[:16]
    for objective in ("ce", "margin"):
        options = {"steps": 3, "generator": 0, "objective": objective}
        hard, _ = JointSpaceAdv(net, flow, **options)(digits[:16], y)
        soft, same = JointSpaceAdv(net, flow, **options)(digits[:16], F.one_hot(y, 10).float())
        assert same.shape == (16, 10)
        assert (hard - soft).abs().gt(1e-4).float().mean() < 0.02


def test_mixed_labels_are_attacked_as_mixed(net, digits, labels) -> None:
    soft = 0.6 * F.one_hot(labels, 10) + 0.4 * F.one_hot(labels.roll(1), 10)
    adv = JointSpaceAdv(net, eta=0, eps=0.1, steps=3)
    x, _ = adv(digits, soft)

    def against(x: Tensor) -> Tensor:
        return -(soft * net(x).log_softmax(1)).sum(1)

    assert (against(x) > against(digits)).float().mean() > 0.95
    assert torch.allclose(adv.last["loss_start"].mean(), against(digits).mean(), rtol=0.2)


def test_best_is_never_better_than_the_start(net, digits, labels, flow) -> None:
    """With steps far too long, the last image is often not the worst."""
    options = {"eps": 0.02, "eta": 0.02, "step_size": 0.2, "latent_step_size": 0.2, "steps": 4}
    options |= {"random_start": False}
    best = JointSpaceAdv(net, flow, best=True, **options)
    x, _ = best(digits, labels)
    losses = F.cross_entropy(net(x), labels, reduction="none")
    assert torch.allclose(losses, best.last["loss"], atol=1e-4)
    assert (losses >= F.cross_entropy(net(digits), labels, reduction="none") - 1e-6).all()
    last, _ = JointSpaceAdv(net, flow, **options)(digits, labels)
    assert loss(net, x, labels) >= loss(net, last, labels) - 1e-4
    moved = flow.encode(x) - flow.encode(digits)
    assert moved.abs().max() > 0


def test_targeted_goes_where_it_is_told(net, digits, labels, flow) -> None:
    goal = (labels + 3) % 10
    adv = JointSpaceAdv(net, flow, eps=0.15, eta=0.3, steps=8, targeted=True)
    x, y = adv(digits, goal)
    assert y is goal
    assert accuracy(net, x, goal) > 0.8 > 0.1 > accuracy(net, digits, goal)
    assert (adv.last["loss"] < adv.last["loss_start"]).float().mean() > 0.95
    assert (adv.last["loss"] >= 0).all()


def test_a_random_target_is_another_class(net, digits, labels, flow) -> None:
    options = {"targeted": True, "target": "random", "generator": 0}
    adv = JointSpaceAdv(net, flow, eps=0.15, eta=0.3, steps=8, **options)
    x, y = adv(digits, labels)
    assert y is labels
    assert accuracy(net, x, labels) < 0.1
    reached = net(x).argmax(1)
    shift = (reached - labels) % 10
    assert (torch.bincount(shift, minlength=10)[1:] > 10).all()
    soft, _ = JointSpaceAdv(net, flow, eps=0.15, eta=0.3, steps=8, **options)(
        digits, F.one_hot(labels, 10).float()
    )
    assert torch.equal(net(soft).argmax(1), reached)


def test_the_own_prediction_is_not_the_label(net, digits, labels, flow) -> None:
    own = net(digits).argmax(1)
    wrong = own != labels
    assert wrong.any()
    for options in ({"steps": 3}, {"steps": 3, "random_start": False}):
        advs = [JointSpaceAdv(net, flow, generator=0, target=t, **options)
                for t in ("prediction", "label")]  # fmt: skip
        assert torch.equal(advs[0](digits, labels)[0], advs[1](digits, own)[0])
        assert not torch.equal(advs[0](digits, labels)[0][wrong], digits[wrong])


@pytest.mark.parametrize("tau", [0, 2])
def test_friendly_images_are_just_about_wrong(tau, net, digits, labels, flow) -> None:
    options = {"eps": 0.2, "eta": 0.2, "steps": 10, "generator": 0}
    full = JointSpaceAdv(net, flow, **options)
    kind = JointSpaceAdv(net, flow, tau=tau, **options)
    hard, _ = full(digits, labels)
    x, _ = kind(digits, labels)
    assert loss(net, x, labels) < 0.8 * loss(net, hard, labels)
    assert accuracy(net, x, labels) <= accuracy(net, hard, labels) + 0.05
    assert (kind.last["pixel_norm"] <= 0.2 + 1e-6).all()
    assert (kind.last["latent_norm"] <= 0.2 + 1e-6).all()


def test_replay(net, digits, labels, flow) -> None:
    adv = JointSpaceAdv(net, flow, steps=2)
    params = adv.make_params(digits, labels)
    first, _ = adv.transform(digits, labels, params)
    torch.manual_seed(77)
    assert torch.equal(adv.transform(digits, labels, params)[0], first)


def test_the_functional_twin_is_the_same(net, digits, labels, flow) -> None:
    from ijsat_aug import functional

    adv = JointSpaceAdv(net, flow, steps=3, eps=0.05, norm="l2")
    params = adv.make_params(digits[:32], labels[:32])
    twin = functional.joint_space_adv(
        digits[:32], labels[:32], net, flow, eps=0.05, eta=adv.threat.eta, norm="l2", steps=3,
        **params,
    )  # fmt: skip
    assert torch.equal(adv.transform(digits[:32], labels[:32], params)[0], twin)


def test_one_step_is_linear_by_default(net, digits, labels, flow) -> None:
    for steps, method in ((0, "exact"), (1, "linear"), (2, "exact")):
        assert JointSpaceAdv(net, flow, steps=steps).threat.method == method
    assert JointSpaceAdv(net, flow, objective="kl", eps=0).threat.method == "exact"
    assert JointSpaceAdv(net, flow, method="exact").threat.method == "exact"
    one, two = (
        JointSpaceAdv(net, flow, method=m, eps=0, random_start=False)(digits, labels)[0]
        for m in ("linear", "exact")
    )
    assert torch.allclose(one, two, atol=1e-4)  # from the image itself they are the same step


@pytest.mark.parametrize("size", [8, 12])
def test_a_flow_that_saves_memory_has_no_tape(size, flow, digits, labels, monkeypatch) -> None:
    x = nn.functional.interpolate(digits[:16], (size, size))
    net = nn.Sequential(nn.Flatten(), nn.Linear(size * size, 10))

    def moved(memory: str) -> Tensor:
        thrifty = Pyramid(flow.to(memory=memory), (size, size)) if size != 8 else (
            flow.to(memory=memory)
        )  # fmt: skip
        adv = JointSpaceAdv(net, thrifty, eps=0, random_start=False)
        return adv(x, labels[:16])[0]

    expected = moved("tape")
    monkeypatch.delattr(FrozenGlow, "encode_with_tape")
    assert torch.allclose(moved("low"), expected, atol=1e-4)


def test_a_flow_in_bfloat16_still_starts_at_the_image(net, digits, labels, flow) -> None:
    low = flow.to(compute_dtype=torch.bfloat16)
    options = {"eps": 0, "eta": 0.1, "latent_step_size": 0, "random_start": False}
    x, _ = JointSpaceAdv(net, low, method="exact", **options)(digits, labels)
    assert (low.decode(low.encode(digits)) - digits).abs().max() > 1e-4
    assert (x - digits).abs().max() < 1e-6


def test_any_manifold_that_is_a_module_stays_outside(net, digits, labels) -> None:
    class Doubled(nn.Module):
        """Pixels as latents, scaled by a parameter."""

        shape, latent_dim = (1, 8, 8), 64

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def encode(self, x: Tensor) -> Tensor:
            return (x.flatten(1) / self.scale).detach()

        def decode(self, z: Tensor) -> Tensor:
            return (z * self.scale).unflatten(1, self.shape)

    for method in ("exact", "linear"):
        flow = Doubled()
        adv = JointSpaceAdv(net, flow, eta=0.05, eps=0.01, method=method)
        x, _ = adv(digits, labels)
        assert loss(net, x, labels) > loss(net, digits, labels)
        assert not list(adv.parameters())
        assert flow.scale.grad is None
        assert flow.scale.requires_grad


def test_a_foreign_tape_runs_in_full_precision(net, digits, labels) -> None:
    """A rotation of the pixels, whose tape is its matrix."""

    class Rotation:
        shape, latent_dim = (1, 8, 8), 64
        matrix = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]

        def encode(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.matrix

        def decode(self, z: Tensor) -> Tensor:
            return (z @ self.matrix.T).unflatten(1, self.shape)

        def encode_with_tape(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.encode(x)
            seen.append(z.dtype)
            return z, self.matrix

        def vjp(self, tape: Tensor, g: Tensor) -> Tensor:
            seen.append((g.flatten(1) @ tape).dtype)
            return g.flatten(1) @ tape

    seen: list[torch.dtype] = []
    options = {"eps": 0, "eta": 1e-7, "method": "linear", "random_start": False}
    adv = JointSpaceAdv(net, Rotation(), amp_dtype=torch.bfloat16, **options)
    out, _ = adv(digits[:8], labels[:8])
    assert (out - digits[:8]).abs().max() < 1e-5
    assert seen == [torch.float32, torch.float32]


@pytest.mark.parametrize(
    ("threat", "latent", "pixel"),
    [
        (Threat(eps=1, eta=1, steps=3), "111", "111"),
        (Threat(eps=1, eta=1, steps=5, latent_steps=2), "10010", "11111"),
        (Threat(eps=1, eta=1, steps=5, update="alternating"), "10101", "01010"),
        (Threat(eps=1, eta=1, steps=6, update="alternating", latent_steps=2), "100100", "011011"),
        (Threat(eps=1, eta=1, steps=5, update="sequential"), "11100", "00011"),
        (Threat(eps=1, eta=1, steps=5, update="sequential", latent_steps=1), "10000", "01111"),
        (Threat(eps=1, eta=1, steps=4, method="linear"), "1000", "1111"),
        (Threat(eps=1, steps=3, update="alternating"), "000", "111"),
        (Threat(eta=1, steps=3, update="sequential"), "111", "000"),
    ],
)
def test_who_moves_when(threat, latent, pixel) -> None:
    assert "".join("01"[m] for m in threat.latent_moves) == latent
    assert "".join("01"[m] for m in threat.pixel_moves) == pixel


def test_default_steps_cross_the_ball() -> None:
    for steps in (1, 2, 3, 10, 40):
        threat = Threat(eps=0.1, eta=0.2, steps=steps)
        assert steps * threat.pixel_step >= 1.2 * threat.eps
        assert threat.pixel_step <= 1.25 * threat.eps + 1e-12
        assert threat.latent_step == pytest.approx(2 * threat.pixel_step)


def test_a_friendly_attack_with_a_goal_stops_there(net, digits, labels) -> None:
    goal = (net(digits).argmax(1) + 3) % 10
    options = {"eta": 0, "eps": 0.3, "steps": 8, "targeted": True, "random_start": False}
    x, _ = JointSpaceAdv(net, tau=0, **options)(digits, goal)
    hard, _ = JointSpaceAdv(net, **options)(digits, goal)
    assert accuracy(net, x, goal) > 0.5
    assert (x - digits).abs().mean() < (hard - digits).abs().mean()


def test_a_replay_starts_anywhere_in_the_ball(digits, labels) -> None:
    adv = JointSpaceAdv(eta=0, eps=0.1)
    x = torch.full_like(digits[:32], 0.5)
    moved = adv.follow(x, labels[:32], torch.zeros_like(x)) - x
    assert moved.abs().max() <= 0.1 + 1e-6
    assert moved.abs().mean() == pytest.approx(0.05, rel=0.1)


def test_each_ball_is_filled_as_its_norm_says(flow) -> None:
    x = torch.rand(64, 1, 8, 8)
    for norm, latent_norm in (("linf", "l2"), ("l2", "linf")):
        options = {"eps": 0.1, "eta": 0.2, "norm": norm, "latent_norm": latent_norm, "steps": 2}
        start = JointSpaceAdv(nn.Identity(), flow, **options).make_params(x, None)
        latent, pixel = start["latent_start"], start["pixel_start"].flatten(1)
        for draw, kind, radius in ((latent, latent_norm, 0.2), (pixel, norm, 0.1)):
            lengths = draw.norm(dim=1) if kind == "l2" else draw.abs().amax(1)
            assert lengths.max() <= radius * (1 + 1e-5)
            assert lengths.mean() == pytest.approx(radius * 64 / 65, rel=0.02)


def test_the_own_prediction_is_that_of_the_clean_image() -> None:
    """Half of the random starts lie where the model predicts the other class."""

    def model(x):
        level = x.flatten(1) - 0.5
        return torch.cat([-level, level], 1)

    x = torch.full((64, 1, 1, 1), 0.499)
    adv = JointSpaceAdv(model, eta=0, eps=0.1, steps=4, target="prediction")
    out, _ = adv(x, torch.zeros(64).long())
    assert (out > 0.59).all()


def test_another_norm_of_the_latents_has_its_own_usual_radius(net, digits, labels, flow) -> None:
    radii = []
    for seen in (False, True):
        adv = JointSpaceAdv(net, flow, eps=0)
        if seen:
            adv(digits[:4], labels[:4])
        adv.threat = replace(adv.threat, latent_norm="l2")
        adv(digits[:4], labels[:4])
        radii.append(adv.threat.eta)
    assert radii[0] == radii[1] == recommended_eta(flow, "l2")
