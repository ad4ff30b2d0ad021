"""Grey images among the coloured: they are coloured, corrupted, and grey again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from kornia.color import rgb_to_grayscale
from torch import Tensor

__all__ = ["grey", "in_colour"]


def grey(x: Tensor) -> Tensor:
    """Luma ``(N, 1, H, W)``.

    Example:
        >>> import torch
        >>> grey(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 1, 4, 4])
    """
    return x if x.shape[1] == 1 else rgb_to_grayscale(x)


def in_colour(corruption: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A corruption of RGB images that takes grey ones too.

    Example:
        >>> import torch
        >>> reddened = in_colour(lambda x: x * torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1))
        >>> reddened(torch.ones(1, 1, 2, 2)).unique()
        tensor([0.2990])
    """

    @wraps(corruption)
    def coloured(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.shape[1] == 3:
            return corruption(x, *args, **kwargs)
        return grey(corruption(x.expand(-1, 3, -1, -1), *args, **kwargs).clamp(0, 1))

    return coloured
