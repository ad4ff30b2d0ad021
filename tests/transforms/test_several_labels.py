"""Labels that do not exclude each other: binary cross-entropy, in attacks, blends and replays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from ijsat_aug import AugmentedLoader, JointSpaceAdv, RobustMixup
from ijsat_aug.attack import binary_cross_entropy
from ijsat_aug.functional import joint_space_adv, robust_mixup
from tests.conftest import small_network, trained_network


def several(digits: Tensor) -> Tensor:
    """Of each digit: is it even, is it above four, does it have a hole."""
    holes = torch.isin(digits, torch.tensor([0, 6, 8, 9]))
    return torch.stack([digits % 2 == 0, digits > 4, holes], 1).float()


@pytest.fixture(scope="module")
def _tagger() -> nn.Module:
    return trained_network(3, several, F.binary_cross_entropy_with_logits)


@pytest.fixture
def tagger(_tagger: nn.Module) -> nn.Module:
    net = small_network(3)
    net.load_state_dict(_tagger.state_dict())
    return net.eval()


@pytest.fixture
def tags(labels: Tensor) -> Tensor:
    return several(labels)


def loss(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.binary_cross_entropy_with_logits(net(x), y))


def test_it_is_torchs_loss_of_each_image() -> None:
    logits, y = 9 * torch.randn(5, 4), torch.rand(5, 4)
    per_sample = binary_cross_entropy(logits, y)
    torch.testing.assert_close(per_sample.mean() / 4, F.binary_cross_entropy_with_logits(logits, y))
    one, classes = logits[:, :1], torch.tensor([0, 1, 1, 0, 1])
    expected = binary_cross_entropy(one, classes[:, None].float())
    assert torch.equal(binary_cross_entropy(one, classes), expected)
    assert torch.equal(
        binary_cross_entropy(logits, classes), binary_cross_entropy(logits, torch.eye(4)[classes])
    )


def test_a_step_climbs_the_loss_of_a_training(tagger, digits, tags) -> None:
    x = digits[:16].clone().requires_grad_()
    F.binary_cross_entropy_with_logits(tagger(x), tags[:16]).backward()
    expected = (x + 0.1 * x.grad.sign()).clamp(0, 1).detach()
    options: dict[str, Any] = {"eps": 0.1, "step_size": 0.1, "objective": "bce"}
    adv = JointSpaceAdv(tagger, eta=0, random_start=False, **options)
    assert torch.equal(adv(x.detach(), tags[:16])[0], expected)
    assert torch.equal(joint_space_adv(x.detach(), tags[:16], tagger, **options), expected)


@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"eps": 0}, {"target": "prediction"}])
def test_every_attack_raises_it(options, tagger, digits, tags, flow) -> None:
    adv = JointSpaceAdv(tagger, flow, objective="bce", **options)
    for dtype in (torch.float32, torch.bool, torch.int64):
        worse, same = adv(digits, tags.to(dtype))
        assert same.dtype == dtype
        assert loss(tagger, worse, tags) > 1.2 * loss(tagger, digits, tags)


def test_the_prediction_is_every_label_that_is_likely(tagger, digits) -> None:
    with torch.no_grad():
        own = (tagger(digits) > 0).float()
    assert float(own.sum(1).std()) > 0  # not always as many
    options: dict[str, Any] = {"eta": 0, "objective": "bce", "random_start": False}
    away = JointSpaceAdv(tagger, target="prediction", **options)(digits)
    assert torch.equal(away, JointSpaceAdv(tagger, **options)(digits, own)[0])


def test_plain_blends_are_torchvisions(digits, tags) -> None:
    torch.manual_seed(3)
    expected = v2.MixUp(num_classes=3)(digits[:8], tags[:8])
    torch.manual_seed(3)
    lam = torch._sample_dirichlet(torch.tensor([1.0, 1.0]))[0]
    mixed = robust_mixup(digits[:8], tags[:8], lam=lam)
    for ours, theirs in zip(mixed, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for labels in (tags[:8], tags[:8].bool()):
        _, y = RobustMixup(eps=0, num_classes=3)(digits[:8], labels)
        assert y.dtype == torch.float32
        assert float(y.sum(1).max()) > 1.2


@pytest.mark.parametrize(
    "make",
    [
        lambda net, flow: RobustMixup(net, objective="bce", steps=2),
        lambda net, flow: RobustMixup(net, attack=JointSpaceAdv(net, flow, objective="bce")),
        lambda net, flow: RobustMixup.preset("accuracy", net, flow, objective="bce"),
        lambda net, flow: RobustMixup(net, attack=JointSpaceAdv(net, flow, objective=OWN)),
    ],
    ids=["pixels", "IJSAT", "preset", "own"],
)
def test_blends_are_attacked(make, tagger, digits, tags, flow) -> None:
    mix = make(tagger, flow)
    params = mix.draw(digits, tags)
    worse, y, _ = mix.augment(digits, tags, params)
    plain, same = robust_mixup(digits, tags, lam=params["lam"])
    assert torch.equal(y, same)
    assert loss(tagger, worse, y) > 1.02 * loss(tagger, plain, y)


def OWN(logits: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1)


def test_a_replay_follows_their_gradient(tagger, digits, tags, flow) -> None:
    tagger.train()
    for transform in (
        JointSpaceAdv(flow=flow, objective="bce"),
        RobustMixup(attack=JointSpaceAdv(flow=flow, objective="bce")),
    ):
        seen = []
        for x, y in AugmentedLoader([(digits[:32], tags[:32])], transform, replay=2):
            F.binary_cross_entropy_with_logits(tagger(x), y).backward()
            seen.append((x.detach(), y))
        (first, y), (moved, again) = seen
        assert torch.equal(y, again)
        tagger.eval()
        assert loss(tagger, moved, y) > loss(tagger, first, y)
        tagger.train()


def test_a_yes_or_no_of_one_output(digits, labels) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    high = (labels > 4).long()
    adv = JointSpaceAdv(net, eta=0, objective="bce", generator=0)
    numbers, _ = adv(digits, high)
    adv.random = JointSpaceAdv(generator=0, eta=0).random
    rows, _ = adv(digits, high[:, None].float())
    assert torch.equal(numbers, rows)
    assert loss(net, rows, high[:, None].float()) > loss(net, digits, high[:, None].float())
    mixed, y = RobustMixup(net, objective="bce")(digits, high[:, None].float())
    assert y.shape == (len(digits), 1)
    assert mixed.shape == digits.shape


def test_numbers_that_are_no_labels_are_blended_for_an_own_objective(digits) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    y = 100 * torch.randn(len(digits), 2)
    mix = RobustMixup(net, objective=lambda out, y: (out - y).square().sum(1), generator=0)
    lam = mix.draw(digits, y)["lam"][:, None]
    mix.random = RobustMixup(generator=0).random
    _, mixed = mix(digits, y)
    torch.testing.assert_close(mixed, lam * y + (1 - lam) * y.roll(1, 0))


BCE = {"objective": "bce"}


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        (BCE, torch.full((4, 3), 1.5), "must lie between 0 and 1"),
        (BCE, torch.full((4, 3), torch.nan), "must lie between 0 and 1"),
        (BCE, torch.ones(4, 2), "the labels have 2 classes and the model 3"),
        (BCE, torch.ones(4), r"rows of shape \(4, classes\).*labels\[:, None\]"),
        ({}, torch.ones(4, 3), r'sum to 1; objective="bce" takes several labels an image'),
    ],
)
def test_labels_that_do_not_fit(options, labels, message, tagger) -> None:
    x = torch.rand(4, 1, 8, 8)
    for call in (
        lambda: JointSpaceAdv(tagger, eta=0, **options)(x, labels),
        lambda: RobustMixup(tagger, num_classes=None, **options)(x, labels),
        lambda: joint_space_adv(x, labels, tagger, eps=0.1, **options),
        lambda: robust_mixup(x, labels, tagger, eps=0.1, lam=0.5, **options),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_class_numbers_that_are_none(tagger) -> None:
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    with pytest.raises(ValueError, match="from 0 to 3, the model knows the classes 0 to 2"):
        JointSpaceAdv(tagger, eta=0, **BCE)(x, y)
    one = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(ValueError, match="from 0 to 3, the model knows the classes 0 to 1"):
        JointSpaceAdv(one, eta=0, **BCE)(x, y)
    with pytest.raises(ValueError, match=r'shape \(4, 1\).*objective="bce" is for one output'):
        JointSpaceAdv(one, eta=0)(x, y)
    for count in (None, 2):
        with pytest.raises(ValueError, match=r"pass labels\.float\(\)\[:, None\]"):
            RobustMixup(one, num_classes=count, **BCE)(x, y % 2)


def test_a_column_of_class_numbers_is_no_row(digits, labels) -> None:
    with pytest.raises(ValueError, match="squeeze them"):
        RobustMixup(eps=0)(digits, labels[:, None])


def test_what_asks_for_classes_refuses_them(tagger) -> None:
    x, y = torch.rand(4, 1, 8, 8), torch.ones(4, 3)
    with pytest.raises(ValueError, match="tau asks whether a class is wrong"):
        JointSpaceAdv(tagger, eta=0, tau=0, objective="bce")
    with pytest.raises(ValueError, match='target="random" is one of the classes'):
        JointSpaceAdv(tagger, eta=0, target="random", targeted=True, objective="bce")
    for options in ({"lam_steps": 1}, {"draws": 2}):
        with pytest.raises(ValueError, match="sum to 1; lam_steps and draws compare"):
            RobustMixup(tagger, objective="bce", **options)(x, y)
    with pytest.raises(ValueError, match="sum to 1; lam_steps and draws compare"):
        robust_mixup(x, y, tagger, lam=0.5, lam_steps=1)
