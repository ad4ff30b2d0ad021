"""Where a lower precision takes longer than float32, and a word about it."""

from __future__ import annotations

import warnings
from functools import cache

import torch

__all__ = ["warn_if_emulated"]


@cache
def warn_if_emulated(dtype: torch.dtype | None, kind: str, remedy: str) -> None:
    """Warn, once, that devices of a kind compute in ``dtype`` only by way of another.

    Example:
        >>> warn_if_emulated(torch.float32, "cpu", "leave amp_dtype out")
    """
    if dtype is not None and _emulated(dtype, kind):
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"this {'processor' if kind == 'cpu' else 'GPU'} only emulates {name}, which takes "
            f"longer than float32: {remedy} here.",
            stacklevel=2,
        )


def _emulated(dtype: torch.dtype, kind: str) -> bool:
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return dtype == torch.bfloat16 and not native
    if kind != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    word = "bf16" if dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{word}_supported", None)
    return supported is not None and not supported()
