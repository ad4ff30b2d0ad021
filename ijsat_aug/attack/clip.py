"""Clipping to the range of pixels that a gradient can find its way back through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["clip"]


def clip(x: Tensor) -> Tensor:
    """``x`` in [0, 1], whose gradient is lost only where it points further out of the range.

    With the gradient of ``clamp`` a pixel that once left the range never comes back, because it
    feels nothing any more. On digits, where half of the pixels are black, a joint ascent ends at
    10 to 15 % more loss this way.

    Example:
        >>> x = torch.tensor([-0.5, 0.5, 1.5], requires_grad=True)
        >>> clip(x).sum().backward()
        >>> x.grad
        tensor([1., 1., 0.])
    """
    if torch.is_grad_enabled() and x.requires_grad:
        image: Tensor = _Clip.apply(x)
        return image
    return x.clamp(0, 1)


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(0, 1)
        ctx.save_for_backward(y - x)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (back,) = ctx.saved_tensors  # where the range lies, seen from x
        return torch.where(back * g < 0, 0, g)
