"""The precision of computations: where a lower one is none, and where a higher one is due."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

__all__ = ["exact", "full_precision", "is_emulated", "warn_if_emulated"]


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast: rounding a flow's state to bfloat16 would move pixels by 4/255.

    Example:
        >>> with torch.autocast("cpu"), full_precision(torch.device("cpu")):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 in convolutions: a round trip of a flow would lose a grey level.

    Example:
        >>> with torch.autocast("cpu"), exact(torch.device("cpu")):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    with full_precision(device), _without_tf32() if device.type == "cuda" else nullcontext():
        yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Convolutions of float32 in float32; every other flag as it is."""
    cudnn = torch.backends.cudnn
    conv: Any = getattr(cudnn, "conv", None)
    if conv is None:  # torch < 2.9
        flags: Any = cudnn.flags
        with flags(
            enabled=cudnn.enabled,
            benchmark=cudnn.benchmark,
            deterministic=cudnn.deterministic,
            allow_tf32=False,
        ):
            yield
        return
    # Not by cudnn.flags: it raises where the user has set convolutions alone.
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


@cache
def warn_if_emulated(dtype: torch.dtype | None, kind: str, remedy: str) -> None:
    """Warn, once, that devices of a kind compute in ``dtype`` only by way of another.

    Example:
        >>> warn_if_emulated(torch.float32, "cpu", "leave amp_dtype out")
    """
    if dtype is not None and is_emulated(dtype, kind):
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"this {'processor' if kind == 'cpu' else 'GPU'} only emulates {name}, which takes "
            f"longer than float32: {remedy} here.",
            stacklevel=2,
        )


def is_emulated(dtype: torch.dtype, kind: str) -> bool:
    """Whether devices of a kind compute in ``dtype`` only by way of another.

    Example:
        >>> is_emulated(torch.float32, "cpu")
        False
    """
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return dtype == torch.bfloat16 and not native
    if kind != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    word = "bf16" if dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{word}_supported", None)
    return supported is not None and not supported()
