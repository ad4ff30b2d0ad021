"""functional.robust_mixup is RobustMixup with all randomness passed in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from ijsat_aug import JointSpaceAdv, RobustMixup
from ijsat_aug.functional import robust_mixup


def drawn(mix: RobustMixup, x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], dict]:
    """What the transform returns, and what it drew."""
    targets = mix.as_labels(x, y)
    params = mix.make_params(x, targets)
    return mix.transform(x, targets, params), params


@pytest.mark.parametrize(
    "options",
    [
        {"eps": 0},
        {"eps": 0.05, "steps": 2},
        {"eps": 1.0, "norm": "l2", "objective": "margin"},
        {"eps": 0.05, "order": "attack-mix"},
        {"eps": 0.05, "label": "geometric"},
        {"eps": 0, "lam_steps": 3, "rho": 0.3},
        {"eps": 0, "lam_steps": 2, "lam_objective": "ce", "lam_step_size": 0.1},
        {"eps": 0.05, "mean": 0.5, "std": 0.25, "amp_dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("draws", [1, 3])
def test_it_equals_the_transform(options, draws, net, digits, labels) -> None:
    x, y = digits[:7], labels[:7]
    if "mean" in options:
        x = (x - 0.5) / 0.25
    mix = RobustMixup(net, num_classes=10, draws=draws, **options)
    (expected, targets), params = drawn(mix, x, y)
    start = params["attack"]["pixel_start"] if "attack" in params else None
    out, t = robust_mixup(
        x, y, net, lam=params["lam"], num_classes=10, pixel_start=start, **options
    )
    assert torch.equal(out, expected)
    assert torch.equal(t, targets)


@pytest.mark.parametrize("space", ["latent", "spherical"])
def test_it_mixes_on_the_manifold(space, digits, labels, flow) -> None:
    x, y = digits[:5], labels[:5]
    mix = RobustMixup(num_classes=10, eps=0, space=space, flow=flow)
    (expected, targets), params = drawn(mix, x, y)
    out, t = robust_mixup(x, y, lam=params["lam"], num_classes=10, space=space, flow=flow)
    assert torch.equal(out, expected)
    assert torch.equal(t, targets)


def test_any_attack_may_climb(net, digits, labels, flow) -> None:
    x, y = digits[:6], labels[:6]
    joint = JointSpaceAdv(net, flow, eps=0.05, steps=2, random_start=False)
    mixed, t = robust_mixup(x, y, lam=0.6, num_classes=10)
    out, same = robust_mixup(x, y, lam=0.6, num_classes=10, attack=joint)
    assert torch.equal(same, t)
    assert torch.equal(out, joint(mixed, t)[0])
    assert torch.equal(robust_mixup(x, t, lam=1.0, attack=lambda a, b: 1 - a)[0], 1 - x)


def test_a_transform_inside_an_own_attack_is_no_part_of_the_model(net, digits, labels, flow):
    """Which is in evaluation mode meanwhile, where a transform would do nothing."""
    x, y = digits[:6], labels[:6]
    joint = JointSpaceAdv(net, flow, eps=0.05, steps=2, random_start=False)
    mixed, t = robust_mixup(x, y, lam=0.6, num_classes=10)
    expected = joint(mixed, t)[0]
    assert not torch.equal(expected, mixed)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joint = joint
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, images: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return self.joint(images, targets)

    own = Own()
    others = [lambda a, b: joint(a, b), own, own.forward, v2.RandomApply(nn.ModuleList([joint]), 1)]
    for attack in (joint, *others, *others):  # again: what was found hidden is remembered
        mix = RobustMixup(net, num_classes=10, attack=attack)
        lam = torch.full((2, 6), 0.6)  # of two, the worse: that asks the model
        for _ in range(2):
            out, _ = robust_mixup(x, y, net, lam=lam, num_classes=10, attack=attack)
            assert torch.equal(out, expected)
            (out, targets), params = drawn(mix, x, y)
            mixed, _ = robust_mixup(x, y, lam=params["lam"], num_classes=10)
            assert attack is joint or torch.equal(out, joint(mixed, targets)[0])
    assert own.calls == 16  # its own state stays


def test_a_transform_that_the_model_holds_attacks_for_an_own_attack(digits, labels) -> None:
    class Lit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
            self.adv = JointSpaceAdv(self, eta=0, eps=0.1, random_start=False)

        def forward(self, images: Tensor) -> Tensor:
            modes.append(self.adv.training)  # else the model would attack itself
            return self.body(images)

    modes: list[bool] = []
    lit, x, y = Lit(), digits[:6], labels[:6]
    task = SimpleNamespace(net=lit.body, adv=JointSpaceAdv(lit.body, eta=0, eps=0.1))
    plain, _ = robust_mixup(x, y, lam=0.6, num_classes=10)
    for model, attack in (
        (lit, lit.adv), (lit, lambda a, b: lit.adv(a, b)),
        (lambda image: task.net(image), lambda a, b: task.adv(a, b)),
    ):  # fmt: skip
        for _ in range(2):
            out, _ = robust_mixup(x, y, model, lam=0.6, num_classes=10, attack=attack)
            assert (out - plain).abs().max() > 0.09
    seen: list[bool] = []
    robust_mixup(x, y, lit, lam=0.6, num_classes=10, attack=lambda a, b: seen.append(lit(a)) or a)
    assert modes
    assert not any(modes)
    assert lit.adv.training
    assert task.adv.training
    assert not lit._forward_hooks
    assert not lit._forward_pre_hooks


@pytest.mark.parametrize("draws", [1, 2])
def test_what_an_own_attack_uses_is_no_part_of_the_model(draws, net, digits, labels) -> None:
    class Dark(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 0 * images if self.training else images

    dark, adv = Dark(), JointSpaceAdv(net, eta=0)
    for attack in (v2.Compose([adv, lambda x, t: (dark(x), t)]), lambda x, t: dark(adv(x, t)[0])):
        mix = RobustMixup(net, num_classes=10, draws=draws, attack=attack)
        for _ in range(2):
            assert mix(digits[:4], labels[:4])[0].abs().max() == 0


@pytest.mark.parametrize("attack", [v2.CutMix(num_classes=10), RobustMixup(num_classes=10, eps=0)])
def test_an_attack_that_mixes_is_refused(attack, digits, labels) -> None:
    with pytest.raises(ValueError, match="attack changed the labels"):
        robust_mixup(digits[:8], labels[:8], lam=0.7, num_classes=10, attack=attack)
    with pytest.raises(ValueError, match="attack changed the labels"):
        RobustMixup(nn.Identity(), num_classes=10, attack=attack)(digits[:8], labels[:8])


def test_labels_that_an_attack_mixes_in_place_are_told_from_logits_beside_images(digits, labels):
    x, y = digits[:8], labels[:8]

    def mixes(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return images.lerp(images.roll(1, 0), 0.3), targets.lerp_(targets.roll(1, 0), 0.3)

    with pytest.raises(ValueError, match="attack changed the labels"):
        robust_mixup(x, y, lam=0.7, num_classes=10, attack=mixes)
    for second in (torch.randn(8, 10), "words", torch.rand(8, 3)):
        robust_mixup(x, y, lam=0.7, num_classes=10, attack=lambda a, b, s=second: (a, s))
    _, t = robust_mixup(x, y, lam=0.7, num_classes=10, attack=lambda a, b: (a, b.half()))
    assert torch.equal(t, robust_mixup(x, y, lam=0.7, num_classes=10)[1])


def test_an_attack_may_write_on_what_it_gets(digits, labels) -> None:
    x, y = digits[:4], labels[:4]

    def attack(images: Tensor, targets: Tensor) -> Tensor:
        targets.zero_()
        return images.zero_()

    out, t = robust_mixup(x, y, lam=0.6, num_classes=10, attack=attack)
    assert out.abs().max() == 0
    assert torch.equal(t, robust_mixup(x, y, lam=0.6, num_classes=10)[1])


def test_one_weight_is_a_weight_for_all(digits, labels) -> None:
    x, y = digits[:4], labels[:4]
    for lam in (0.3, torch.tensor(0.3), torch.full((4,), 0.3), torch.full((1, 4), 0.3)):
        out, _ = robust_mixup(x, y, lam=lam, num_classes=10)
        assert torch.allclose(out, 0.3 * x + 0.7 * x.roll(1, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 1.5}, "from 0 to 1"),
        ({"lam": float("nan")}, "from 0 to 1"),
        ({"lam": torch.rand(3)}, r"\(4,\)"),
        ({"lam": torch.rand(2, 3)}, r"\(draws, 4\)"),
        ({"lam": torch.rand(0, 4)}, "no draw"),
        ({"lam": 0.5, "eps": 0.1}, "pass one"),
        ({"lam": 0.5, "lam_steps": 1}, "pass one"),
        ({"lam": torch.rand(2, 4)}, "pass one"),
        ({"lam": 0.5, "space": "latent"}, "needs a flow"),
        ({"lam": 0.5, "num_classes": None}, "num_classes="),
        ({"lam": 0.5, "order": "mix"}, "order must be"),
    ],
)
def test_bad_input(options, message, digits, labels) -> None:
    with pytest.raises(ValueError, match=message):
        robust_mixup(digits[:4], labels[:4], **{"num_classes": 10, **options})
