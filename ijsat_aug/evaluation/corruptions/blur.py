"""Blurs: gaussian, defocus, glass, motion, zoom."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .dice import Dice
from .filters import correlate, cut, gaussian, streak, zoom

__all__ = [
    "defocus_blur",
    "disk",
    "gaussian_blur",
    "glass_blur",
    "jitter",
    "motion_blur",
    "zoom_blur",
]


def gaussian_blur(x: Tensor, dice: Dice, sigma: float) -> Tensor:
    """A Gaussian of that width.

    Example:
        >>> dice = Dice(0, "gaussian_blur", 1, range(1), torch.empty(0))
        >>> gaussian_blur(torch.eye(3)[None, None], dice, 0.4)[0, 0, 1]
        tensor([0.0759, 0.8482, 0.0759])
    """
    return gaussian(x, sigma)


def defocus_blur(x: Tensor, dice: Dice, radius: float, sigma: float) -> Tensor:
    """A lens out of focus makes a disk of every point.

    Example:
        >>> dice = Dice(0, "defocus_blur", 4, range(1), torch.empty(0))
        >>> defocus_blur(torch.eye(3)[None, None], dice, 1, 0.2)[0, 0, 1]
        tensor([0.6000, 0.2000, 0.6000])
    """
    return correlate(x, disk(radius, sigma))


def glass_blur(x: Tensor, dice: Dice, sigma: float, reach: int, passes: int) -> Tensor:
    """Frosted glass: pixels from their neighbours' places, between two Gaussians.

    Example:
        >>> dice = Dice(0, "glass_blur", 1, range(1), torch.empty(0))
        >>> x = torch.linspace(0, 1, 256).view(1, 1, 16, 16)
        >>> bool((glass_blur(x, dice, 0.05, 1, 1) != x).any())
        True
    """
    x = cut(gaussian(x, sigma)) / 255
    offsets = dice.integers(-reach, reach, (passes, 2, *x.shape[2:]))
    for i in range(passes):
        source = jitter(offsets[:, i, 0], offsets[:, i, 1], reach)
        x = x.flatten(2).gather(2, source.expand(-1, x.shape[1], -1)).view_as(x)
    return gaussian(x, sigma)


def motion_blur(x: Tensor, dice: Dice, radius: int, sigma: float) -> Tensor:
    """A camera that moves along a line of up to 45 degrees.

    Example:
        >>> dice = Dice(0, "motion_blur", 1, range(1), torch.empty(0))
        >>> motion_blur(torch.ones(1, 1, 8, 8), dice, 6, 1.0).unique()
        tensor([1.])
    """
    # ImageMagick rounds to levels, where all else is cut.
    return (streak(x, dice.uniform(-45, 45), radius, sigma) * 255).round() / 255


def zoom_blur(x: Tensor, dice: Dice, count: int, step: float) -> Tensor:
    """A camera that moves towards the picture: the mean of its zooms.

    Example:
        >>> dice = Dice(0, "zoom_blur", 1, range(1), torch.empty(0))
        >>> zoom_blur(torch.arange(4.0).expand(1, 1, 4, 4), dice, 2, 1.0)[0, 0, 0]
        tensor([0.3333, 1.1111, 1.8889, 2.6667])
    """
    return (x + sum(zoom(x, 1 + i * step) for i in range(count))) / (count + 1)


@lru_cache(maxsize=16)
def disk(radius: float, sigma: float) -> NDArray[Any]:
    """A disk of sum one, whose edge a Gaussian of 3 (above radius 8: 5) pixels antialiases.

    From radius 8 on it fills its square, whose border OpenCV mirrors: the sum is 1.01.

    Example:
        >>> disk(1, 0.2).round(3)[2:-2, 2:-2]
        array([[0. , 0.2, 0. ],
               [0.2, 0.2, 0.2],
               [0. , 0.2, 0. ]])
    """
    margin = 1 if radius <= 8 else 2
    inner = math.floor(radius)
    reach = min(inner + 2 * margin, max(inner, 8))
    line = np.arange(-reach, reach + 1)
    flat: NDArray[Any] = (line**2 + line[:, None] ** 2 <= radius**2).astype(float)
    flat /= flat.sum()
    tap = np.exp(-(np.arange(-margin, margin + 1) ** 2) / (2 * sigma**2))
    for _ in range(2):
        rows = np.pad(flat, ((0, 0), (margin, margin)), mode="reflect")
        flat = np.stack([np.convolve(row, tap / tap.sum(), "valid") for row in rows]).T
    return flat


def jitter(down: Tensor, right: Tensor, reach: int) -> Tensor:
    """Where each pixel's value comes from ``(N, 1, H W)``, when they are replaced one by one.

    From the last pixel to the first, ``new[p] = now[p + offset]``: of a neighbour that had its turn
    the new value, of any other the old one. The original writes a swap, which NumPy's views make a
    copy for colour images; CIFAR-10-C and ImageNet-C are made of copies.

    Args:
        down: ``(N, H, W)`` row offsets, from -reach to reach - 1.
        right: ``(N, H, W)`` column offsets.
        reach: The margin that stays as it is.

    Example:
        >>> left = torch.full((1, 4, 4), -1)
        >>> jitter(torch.zeros_like(left), left, reach=1).view(4, 4)
        tensor([[ 0,  1,  2,  3],
                [ 4,  5,  6,  7],
                [ 8,  9,  9, 10],
                [12, 13, 13, 14]])
    """
    count, height, width = down.shape
    pixels = height * width
    inside = np.zeros((height, width), dtype=bool)
    inside[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1] = True
    moves = torch.from_numpy(inside.flatten()).to(down.device)
    place = torch.from_numpy(np.arange(pixels)).to(down.device)
    neighbour = place + (down * width + right).flatten(1)
    neighbour = torch.where(moves, neighbour, place)
    # Nodes below `pixels` are new values, to be looked up again; those above are old ones.
    had_its_turn = moves[neighbour] & (neighbour > place)
    source = torch.where(had_its_turn, neighbour, pixels + neighbour)
    source = torch.cat([source, (pixels + place).expand(count, -1)], 1)
    while bool((source < pixels).any()):
        source = source.gather(1, source)
    return source[:, None, :pixels] - pixels
