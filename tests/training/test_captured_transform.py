"""CapturedTransform where there is no GPU: the transform itself. On a GPU: tests/test_cuda.py."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ijsat_aug import AugmentedLoader, JointSpaceAdv, RobustMixup
from ijsat_aug.training import CapturedTransform


def batch() -> dict[str, Any]:
    return {"image": torch.rand(4, 1, 8, 8), "label": torch.arange(4), "path": list("abcd")}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_without_a_gpu_it_is_the_transform() -> None:
    net, given = network(), batch()
    mix, called = (RobustMixup(net, num_classes=10, generator=0) for _ in range(2))
    captured = CapturedTransform(mix)
    for _ in range(6):
        ours, theirs = captured(given), called(given)
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["label"], theirs["label"])
    assert mix.last.keys() == called.last.keys()


def test_a_loader_takes_the_transform_that_it_has_now() -> None:
    net = network()
    loader = AugmentedLoader([batch()], RobustMixup(net, num_classes=10), captured=True)
    ((first, _, _),) = (one.values() for one in loader)
    assert first.shape == (4, 1, 8, 8)
    loader.transform = JointSpaceAdv(net, "digits")
    ((_, labels, _),) = (one.values() for one in loader)
    assert torch.equal(labels, torch.arange(4))  # which the blends of the first would not keep


def test_a_copy_makes_a_graph_of_its_own() -> None:
    captured = CapturedTransform(RobustMixup(network(), num_classes=10))
    twin = copy.deepcopy(captured)
    assert twin.transform is not captured.transform
    sent = pickle.loads(pickle.dumps(captured))
    assert sent.transform.model is None


def own(images: Tensor, targets: Tensor) -> Tensor:
    return images


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda net: JointSpaceAdv(net, "digits", model_mode="train"), "draws in the model"),
        (lambda net: JointSpaceAdv(net, "digits", tau=1), "tau=None"),
        (lambda net: RobustMixup(net, num_classes=10, attack=own), "CapturedStep"),
        (
            lambda net: RobustMixup(net, attack=JointSpaceAdv(net, "digits", tau=0)),
            "tau=None",
        ),
    ],
)
def test_what_no_graph_repeats_is_refused(make: Callable[[nn.Module], Any], words: str) -> None:
    transform = make(network())
    with pytest.raises(ValueError, match=words):
        CapturedTransform(transform)
    with pytest.raises(ValueError, match=words):
        AugmentedLoader([batch()], transform, captured=True)


def test_what_is_no_transform_of_ours_is_refused() -> None:
    with pytest.raises(TypeError, match="a transform of ours"):
        CapturedTransform(own)  # type: ignore[arg-type]


def test_a_replay_has_nothing_to_capture() -> None:
    transform = JointSpaceAdv(network(), "digits", random_start=False)
    with pytest.raises(ValueError, match="leave one of them out"):
        AugmentedLoader([batch()], transform, captured=True, replay=2)
