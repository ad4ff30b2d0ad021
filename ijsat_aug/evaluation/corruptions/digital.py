"""Digital corruptions: contrast, brightness, saturation, elasticity, pixels, JPEG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kornia.color import hsv_to_rgb, rgb_to_hsv
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .colour import in_colour
from .dice import Dice
from .filters import gaussian, per_axis

__all__ = [
    "brightness",
    "contrast",
    "elastic_transform",
    "jpeg_compression",
    "pixelate",
    "saturate",
]


def contrast(x: Tensor, dice: Dice, factor: float) -> Tensor:
    """Closer to the mean of each channel.

    Example:
        >>> dice = Dice(0, "contrast", 1, range(1), torch.empty(0))
        >>> contrast(torch.tensor([[[[0.0, 1.0]]]]), dice, 0.5)
        tensor([[[[0.2500, 0.7500]]]])
    """
    mean = x.mean((2, 3), keepdim=True)
    return mean + factor * (x - mean)


@in_colour
def brightness(x: Tensor, dice: Dice, more: float) -> Tensor:
    """More of HSV's value.

    Example:
        >>> dice = Dice(0, "brightness", 1, range(1), torch.empty(0))
        >>> brightness(torch.full((1, 1, 2, 2), 0.5), dice, 0.25).unique()
        tensor([0.7500])
    """
    hue, saturation, value = rgb_to_hsv(x).unbind(1)
    return hsv_to_rgb(torch.stack([hue, saturation, (value + more).clamp(0, 1)], 1))


@in_colour
def saturate(x: Tensor, dice: Dice, factor: float, more: float) -> Tensor:
    """Another saturation of HSV; with ``more``, grey turns reddish.

    Example:
        >>> dice = Dice(0, "saturate", 1, range(1), torch.empty(0))
        >>> saturate(torch.ones(1, 3, 1, 1), dice, 2, 0.25).flatten()
        tensor([1.0000, 0.7500, 0.7500])
    """
    hue, saturation, value = rgb_to_hsv(x).unbind(1)
    return hsv_to_rgb(torch.stack([hue, (factor * saturation + more).clamp(0, 1), value], 1))


def elastic_transform(x: Tensor, dice: Dice, strength: float, sigma: float, reach: float) -> Tensor:
    """A random affine map, then a smooth random displacement; lengths in shorter sides.

    Example:
        >>> dice = Dice(0, "elastic_transform", 1, range(1), torch.empty(0))
        >>> x = torch.rand(1, 1, 8, 8)
        >>> bool(torch.allclose(elastic_transform(x, dice, 0, 0, 0), x, atol=1e-5))
        True
    """
    height, width = x.shape[2:]
    side = min(height, width)
    down, right = (torch.from_numpy(np.arange(n)).to(x) for n in (height, width))
    down, right = torch.meshgrid(down, right, indexing="ij")
    plane = torch.stack([right, down, torch.ones_like(right)])
    back = _affine(x, reach * side * dice.uniform(-1, 1, (3, 2)))
    warped = _look_up(x, torch.einsum("nck,khw->nchw", back, plane), edge_twice=False)
    if strength == 0:
        return warped
    moves = gaussian(dice.uniform(-1, 1, (2, height, width)), sigma * side, "symmetric", 3.0)
    return _look_up(warped, plane[:2] + strength * side * moves, edge_twice=True)


def pixelate(x: Tensor, dice: Dice, factor: float) -> Tensor:
    """Large pixels: the boxes of Pillow, rounded as there after each axis.

    Example:
        >>> dice = Dice(0, "pixelate", 1, range(1), torch.empty(0))
        >>> pixelate(torch.tensor([[[[0.0, 0.2, 0.4, 1.0]]]]), dice, 0.5)
        tensor([[[[0.1020, 0.1020, 0.7020, 0.7020]]]])
    """
    down, up = zip(*(_boxes(n, max(1, int(n * factor))) for n in x.shape[2:]), strict=True)
    wide = per_axis(x * 255, np.eye(x.shape[2]), down[1]).add(0.5 + 1e-6).floor()
    small = per_axis(wide, down[0], np.eye(down[1].shape[0])).add(0.5 + 1e-6).floor()
    rows, columns = (torch.from_numpy(index).to(x.device) for index in up)
    return small.index_select(-2, rows).index_select(-1, columns) / 255


def jpeg_compression(x: Tensor, dice: Dice, quality: int) -> Tensor:
    """Real JPEG files, by Pillow on the host.

    Example:
        >>> dice = Dice(0, "jpeg_compression", 1, range(1), torch.empty(0))
        >>> jpeg_compression(torch.ones(1, 3, 8, 8), dice, 40).unique()
        tensor([1.])
    """
    levels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    pictures = np.stack([_through_jpeg(level, quality) for level in levels])
    return torch.from_numpy(pictures).to(x).permute(0, 3, 1, 2) / 255


def _through_jpeg(levels: NDArray[Any], quality: int) -> NDArray[Any]:
    file = io.BytesIO()
    Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels).save(
        file, "JPEG", quality=quality
    )
    with Image.open(file) as picture:
        return np.array(picture).reshape(levels.shape)


def _boxes(size: int, small: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Which pixels each large one is the mean of, and which large one each pixel gets."""
    ratio = size / small
    centres = (np.arange(small)[:, None] + 0.5) * ratio
    distance = (np.arange(size) + 0.5 - centres) / ratio
    inside = ((distance > -0.5) & (distance <= 0.5)).astype(float)
    nearest = ((np.arange(size) + 0.5) * small / size).astype(np.int64)
    return inside / inside.sum(1, keepdims=True), nearest


def _affine(x: Tensor, moves: Tensor) -> Tensor:
    """The map ``(N, 2, 3)`` that takes three moved points back to where they were."""
    height, width = x.shape[2:]
    centre, arm = np.array([width // 2, height // 2]), max(1, min(height, width) // 3)
    corners = centre + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    points = torch.from_numpy(corners).to(x).expand(len(x), -1, -1)
    moved = torch.cat([points + moves, torch.ones_like(points[..., :1])], -1)
    back: Tensor = torch.linalg.solve(moved, points).mT
    return back


def _look_up(x: Tensor, places: Tensor, *, edge_twice: bool) -> Tensor:
    """Bilinear at ``(N, 2, H, W)`` columns and rows, mirrored at an edge that comes twice or once.

    Twice is SciPy's "reflect", once is OpenCV's ``BORDER_REFLECT_101``.
    """
    size = torch.from_numpy(np.array([x.shape[3], x.shape[2]])).to(x).view(2, 1, 1)
    grid = (2 * places + 1) / size if edge_twice else 2 * places / (size - 1).clamp_min(1)
    return F.grid_sample(
        x, (grid - 1).movedim(1, -1), padding_mode="reflection", align_corners=not edge_twice
    )
