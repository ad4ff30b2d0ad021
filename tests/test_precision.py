"""bfloat16 where it is slow: one warning, and only there."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from ijsat_aug import JointSpaceAdv, RobustMixup, load_flow, precision

NET = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
LOW = torch.bfloat16


@pytest.fixture(autouse=True)
def warned_anew():
    precision.warn_if_emulated.cache_clear()
    yield
    precision.warn_if_emulated.cache_clear()


def told(transform) -> list[str]:
    """The warnings of two batches."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            transform(torch.rand(4, 1, 8, 8), torch.arange(4))
    return [str(warning.message) for warning in caught]


def transforms() -> dict[str, object]:
    low = load_flow("digits", compute_dtype=LOW)
    return {
        "amp": JointSpaceAdv(NET, "digits", amp_dtype=LOW),
        "mixup": RobustMixup(NET, num_classes=10, amp_dtype=LOW),
        "flow": JointSpaceAdv(NET, low),
    }


@pytest.mark.parametrize("name", ["amp", "mixup", "flow"])
def test_an_emulated_precision_is_told_once(name, monkeypatch) -> None:
    monkeypatch.setattr(precision, "is_emulated", lambda dtype, kind: dtype == LOW)
    (message,) = told(transforms()[name])
    assert message.startswith("this processor only emulates bfloat16")
    assert message.endswith(" out here.")


@pytest.mark.parametrize("name", ["amp", "mixup", "flow"])
def test_a_native_precision_is_not_told(name, monkeypatch) -> None:
    monkeypatch.setattr(precision, "is_emulated", lambda dtype, kind: False)
    assert told(transforms()[name]) == []


def test_full_precision_is_not_told() -> None:
    assert told(JointSpaceAdv(NET, "digits")) == []


def test_it_asks_the_processor() -> None:
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert bool(told(transforms()["amp"])) is not native
