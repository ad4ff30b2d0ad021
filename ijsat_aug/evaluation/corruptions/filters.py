"""Linear filters that follow SciPy, OpenCV and ImageMagick to the edge treatment."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["box3", "correlate", "cut", "gaussian", "per_axis", "streak", "zoom"]


def cut(x: Tensor) -> Tensor:
    """Pixels as whole levels 0..255, cut off as the original does.

    A level that rounding errors took just below itself counts as itself.

    Example:
        >>> cut(torch.tensor([-1.0, 0.5, 100 / 255, 2.0]))
        tensor([  0., 127., 100., 255.])
    """
    return (x.clamp(0, 1) * 255 + 1e-3).floor()


def per_axis(x: Tensor, rows: NDArray[Any], columns: NDArray[Any]) -> Tensor:
    """``rows @ x @ columns.T``.

    Example:
        >>> per_axis(torch.ones(1, 2, 2), np.ones((1, 2)), np.eye(2))
        tensor([[[2., 2.]]])
    """
    left, right = (torch.from_numpy(m).to(x) for m in (rows, columns))
    return left @ x @ right.mT


def gaussian(
    x: Tensor,
    sigma: float,
    mode: Literal["edge", "symmetric"] = "edge",
    truncate: float = 4.0,
) -> Tensor:
    """Gaussian blur of SciPy, whose modes "nearest" and "reflect" are NumPy's names here.

    kornia's takes no "symmetric" edge and no kernel wider than the image.

    Example:
        >>> x = torch.rand(1, 1, 8, 8)
        >>> blurred = gaussian(x, 20.0, "symmetric")
        >>> bool((blurred - x.mean()).abs().max() < 1e-3)
        True
    """
    height, width = x.shape[-2:]
    rows, columns = (_band(n, sigma, mode, truncate) for n in (height, width))
    return per_axis(x, rows, columns)


def box3(x: Tensor) -> Tensor:
    """Mean of the 3 x 3 neighbourhood, mirrored at the edge.

    Example:
        >>> box3(torch.eye(3)[None, None])[0, 0, 1]
        tensor([0.3333, 0.3333, 0.3333])
    """
    return correlate(x, np.full((3, 3), 1 / 9))


def correlate(
    x: Tensor, kernel: NDArray[Any], mode: Literal["reflect", "edge"] = "reflect"
) -> Tensor:
    """Correlation with an odd kernel, by default mirrored at the edge: OpenCV's ``filter2D``.

    As shifted sums it is the same on every device and in every batch, which ``conv2d`` is not.

    Example:
        >>> x = torch.rand(1, 3, 5, 5)
        >>> bool((correlate(x, np.array([[0, 1, 0]])) == x).all())
        True
    """
    height, width = x.shape[-2:]
    rows, columns = (
        torch.from_numpy(np.pad(np.arange(n), m // 2, mode=mode)).to(x.device)
        for n, m in zip(x.shape[-2:], kernel.shape, strict=True)
    )
    padded = x.index_select(-2, rows).index_select(-1, columns)
    total = torch.zeros_like(x)
    for i, j in zip(*np.nonzero(kernel), strict=True):
        total.add_(padded[..., i : i + height, j : j + width], alpha=float(kernel[i, j]))
    return total


def zoom(x: Tensor, factor: float) -> Tensor:
    """The centre enlarged to the size of the image.

    Example:
        >>> zoom(torch.arange(16.0).reshape(1, 1, 4, 4), 2.0)[0, 0, 0]
        tensor([5.0000, 5.3333, 5.6667, 6.0000])
    """
    size = x.shape[-2:]
    part = _centre(x, [math.ceil(n / factor) for n in size])
    grown = [round(n * factor) for n in part.shape[-2:]]
    large = F.interpolate(part, size=grown, mode="bilinear", align_corners=True)
    return _centre(large, list(size))


def streak(image: Tensor, degrees: Tensor, radius: int, sigma: float) -> Tensor:
    """Motion blur of ImageMagick: half a Gaussian along whole pixels, one angle an image.

    kornia's ``motion_blur`` weighs linearly, and to both sides.

    Example:
        >>> dot = torch.zeros(1, 1, 5, 5)
        >>> dot[..., 2, 2] = 1.0
        >>> streak(dot, torch.tensor([0.0]), radius=1, sigma=1.0)[0, 0, 2]
        tensor([0.0777, 0.3482, 0.5741, 0.0000, 0.0000])
    """
    count, channels, height, width = image.shape
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    angles = torch.deg2rad(degrees)[:, None]
    along = torch.from_numpy(steps).to(angles)
    down, right = ((along * way - 0.5).ceil().long() for way in (angles.sin(), angles.cos()))
    y, x = (torch.from_numpy(np.arange(n)).to(image.device) for n in (height, width))
    pixels, blurred = image.flatten(2), torch.zeros_like(image)
    for i, weight in enumerate(weights / weights.sum()):
        rows = (y + down[:, i : i + 1]).clamp(0, height - 1)
        columns = (x + right[:, i : i + 1]).clamp(0, width - 1)
        index = (rows[:, :, None] * width + columns[:, None]).reshape(count, 1, -1)
        moved = pixels.gather(2, index.expand(-1, channels, -1))
        blurred.add_(moved.view_as(image), alpha=float(weight))
    return blurred


@lru_cache(maxsize=64)
def _band(size: int, sigma: float, mode: Any, truncate: float) -> NDArray[Any]:
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return np.eye(size)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    source = np.pad(np.arange(size), radius, mode=mode)
    outputs = np.arange(size)[:, None]
    band = np.zeros((size, size))
    np.add.at(band, (outputs, source[outputs + radius + offsets]), weights / weights.sum())
    return band


def _centre(x: Tensor, size: list[int]) -> Tensor:
    top, left = ((n - m) // 2 for n, m in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]
