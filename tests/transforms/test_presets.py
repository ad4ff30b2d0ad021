"""Presets: each does to real digits what its name promises, and tells what is wrong with a call."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ijsat_aug import AugmentedLoader, JointSpaceAdv, RobustMixup
from ijsat_aug.training import convert_split_batchnorm
from ijsat_aug.transforms.presets import PRESETS

METHODS = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


@pytest.mark.parametrize("name", PRESETS)
def test_each_raises_the_loss_of_its_blends(name, net, digits, labels) -> None:
    hard = RobustMixup.preset(name, net, "digits", num_classes=10, generator=0)
    blends, target = hard(digits, labels)
    twin = RobustMixup.preset(name, net, "digits", num_classes=10, generator=0)
    calm, same, _ = twin.calm(digits, labels)
    assert torch.equal(target, same)
    with torch.no_grad():
        before, after = (F.cross_entropy(net(b), target) for b in (calm, blends))
    assert after > before


def test_fast_leaves_half_of_the_blends(net, digits, labels) -> None:
    fast = RobustMixup.preset("fast", net, "digits", num_classes=10, generator=0)
    fast(digits, labels)
    moved = fast.last["latent_norm"] > 0
    assert int(moved.sum()) == len(digits) // 2


def test_accuracy_moves_no_pixel_off_the_manifold(net, digits, labels) -> None:
    mix = RobustMixup.preset("accuracy", net, "digits", num_classes=10)
    mix(digits, labels)
    assert "pixel_norm" not in mix.last
    assert mix.last["latent_norm"].min() > 0


def test_robust_stays_in_its_budget(net, digits, labels) -> None:
    mix = RobustMixup.preset("robust", net, "digits", num_classes=10)
    mix(digits, labels)
    assert mix.last["pixel_norm"].max() <= 8 / 255 + 1e-6


def test_corruptions_moves_half_of_the_images_off_the_manifold_too(net, digits, labels) -> None:
    attack = JointSpaceAdv.preset("corruptions", net, "digits", generator=0)
    attack(digits, labels)
    moved = attack.last["pixel_norm"] > 0
    assert int(moved.sum()) == len(digits) // 2
    assert torch.equal(moved, attack.last["latent_norm"] > 0)
    assert attack.last["pixel_norm"].max() <= 1 / 255 + 1e-6


def test_a_preset_beside_the_clean_batch_has_a_batchnorm_of_its_own(digits, labels) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )
    convert_split_batchnorm(network)
    mix = RobustMixup.preset("corruptions", network, "digits", num_classes=10, mode="append")
    x, t = mix(digits, labels)
    assert torch.equal(x[: len(digits)], digits)
    assert len(t) == 2 * len(digits)
    before = network[1].auxiliary.running_mean.clone()
    network.train()(x)
    assert not torch.equal(network[1].auxiliary.running_mean, before)


def test_options_reach_mixing_and_attack(net, flow) -> None:
    mix = RobustMixup.preset(
        "accuracy", net, flow, num_classes=10, alpha=0.2, mean=0.5, std=0.5, mode="append"
    )
    assert (mix.alpha, mix.mode) == (0.2, "append")
    assert mix.scale == mix.attack.scale
    assert mix.attack.flow is flow


def test_options_of_the_attack_reach_it_through_the_mixup(net, flow, digits, labels) -> None:
    mix = RobustMixup.preset(
        "robust", net, flow, num_classes=10, eps=4 / 255, latent_norm="l2", eta=0.5, fraction=0.5
    )
    threat = mix.attack.threat
    assert (threat.eps, threat.steps, threat.latent_norm, threat.eta) == (4 / 255, 7, "l2", 0.5)
    assert (mix.fraction, mix.attack.fraction) == (0.5, 1.0)
    mix = RobustMixup.preset("accuracy", net, flow, num_classes=10, space="latent")
    assert torch.isfinite(mix(digits, labels)[0]).all()


@pytest.mark.parametrize("name", PRESETS)
def test_the_attack_alone_is_that_on_the_blends(name, net, digits, labels) -> None:
    attack = JointSpaceAdv.preset(name, net, "digits", generator=0)
    blends = RobustMixup.preset(name, net, "digits", num_classes=10).attack
    assert vars(attack.threat) == vars(blends.threat)
    assert (attack.target, attack.fraction) == (blends.target, blends.fraction)
    x, _ = attack(digits, labels)
    with torch.no_grad():
        assert F.cross_entropy(net(x), labels) > F.cross_entropy(net(digits), labels)


def test_options_take_the_place_of_the_presets(net) -> None:
    attack = JointSpaceAdv.preset("robust", net, "digits", eps=4 / 255, mode="append")
    assert (attack.threat.eps, attack.threat.steps, attack.mode) == (4 / 255, 7, "append")


def test_the_model_may_come_later(net, digits, labels) -> None:
    mix = RobustMixup.preset("accuracy", flow="digits", num_classes=10).bind(net)
    assert mix(digits, labels)[0].shape == digits.shape


def test_the_second_half_of_a_training(net, digits, labels) -> None:
    mix = RobustMixup.preset("accuracy", net, "digits", num_classes=10)
    loader = AugmentedLoader([(digits, labels)], mix, epochs=(1, None))
    list(loader)
    assert "latent_norm" not in mix.last
    list(loader)
    assert "latent_norm" in mix.last


def test_a_wrong_call_says_what_there_is(net) -> None:
    with pytest.raises(TypeError, match=r"name of the preset comes first.* got Sequential"):
        RobustMixup.preset(net, num_classes=10)
    with pytest.raises(TypeError, match="has an option 'num_class'; did you mean 'num_classes'"):
        RobustMixup.preset("accuracy", net, num_class=10)
    with pytest.raises(ValueError, match="no preset 'acuracy': there are accuracy, fast"):
        RobustMixup.preset("acuracy", net)
    with pytest.raises(ValueError, match="a preset brings its attack"):
        RobustMixup.preset("accuracy", net, attack=lambda x, y: x)
    with pytest.raises(TypeError, match="epsilon"):
        RobustMixup.preset("accuracy", net, "digits", epsilon=0.1)


def test_the_methods_page_tells_of_each() -> None:
    told = set(re.findall(r"`\"(\w+)\"`", METHODS.read_text()))
    assert told >= set(PRESETS)
