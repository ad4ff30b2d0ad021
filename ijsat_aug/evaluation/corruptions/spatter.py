"""Spatter: drops of water with lit rims, or mud."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .colour import in_colour
from .dice import Dice
from .filters import box3, correlate, cut, gaussian

__all__ = ["distance_to", "equalise", "outlines", "spatter"]

_PALE_TURQUOISE = (175, 238, 238)
_MUD_BROWN = (63, 42, 20)
_FAR = 20
_SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
_EDGE = 150
_LIGHT_FROM_ABOVE = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])


@in_colour
def spatter(
    x: Tensor,
    dice: Dice,
    mean: float,
    std: float,
    sigma: float,
    threshold: float,
    strength: float,
    mud: bool,
) -> Tensor:
    """What lies above a threshold of smooth noise is wet.

    Example:
        >>> dice = Dice(0, "spatter", 4, range(1), torch.empty(0))
        >>> muddy = spatter(torch.ones(1, 3, 32, 32), dice, 0.65, 0.1, 0.7, 0.69, 0.6, True)
        >>> bool((muddy < 0.5).any())
        True
    """
    liquid = gaussian(mean + std * dice.normal((1, *x.shape[2:])), sigma).clamp(0, 1)
    liquid = torch.where(liquid < threshold, 0, liquid)
    if mud:
        cover = gaussian((liquid > threshold).to(x), strength)
        cover = torch.where(cover < 0.8, 0, cover)
        return (1 - cover) * x + cover * _paint(_MUD_BROWN, x)
    shine = liquid * _relief(liquid)
    brightest = shine.amax((2, 3), keepdim=True).clamp_min(1e-6)
    return x + strength * shine / brightest * _paint(_PALE_TURQUOISE, x)


def outlines(levels: Tensor) -> Tensor:
    """Edges of OpenCV's ``Canny(levels, 50, 150)``, but for weak ones that touch strong ones.

    Those are rare, for the rim of a drop is a step. kornia's ``canny`` blurs first, and changed
    between its versions.

    Example:
        >>> drop = torch.zeros(1, 1, 5, 5)
        >>> drop[..., 2:, 2:] = 200
        >>> outlines(drop)[0, 0].long()
        tensor([[0, 0, 0, 0, 0],
                [0, 0, 0, 1, 1],
                [0, 0, 1, 0, 0],
                [0, 1, 0, 0, 0],
                [0, 1, 0, 0, 0]])
    """
    right, down = correlate(levels, _SOBEL, "edge"), correlate(levels, _SOBEL.T, "edge")
    slope = right.abs() + down.abs()
    padded, (height, width) = F.pad(slope, (1, 1, 1, 1)), slope.shape[-2:]

    def at(dy: int, dx: int) -> Tensor:
        return padded[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    along_row = (slope > at(0, -1)) & (slope >= at(0, 1))
    along_column = (slope > at(-1, 0)) & (slope >= at(1, 0))
    falling = (slope > at(-1, -1)) & (slope > at(1, 1))
    rising = (slope > at(-1, 1)) & (slope > at(1, -1))
    peak = torch.where(right * down >= 0, falling, rising)
    narrow = math.tan(math.pi / 8)
    peak = torch.where(down.abs() > right.abs() / narrow, along_column, peak)
    peak = torch.where(down.abs() < right.abs() * narrow, along_row, peak)
    return peak & (slope > _EDGE)


def distance_to(marked: Tensor, far: int = _FAR) -> Tensor:
    """Euclidean distance ``(N, 1, H, W)`` to the nearest marked pixel, at most ``far``.

    Example:
        >>> marked = torch.tensor([[[[True, False, False, False]]]])
        >>> distance_to(marked, far=2)
        tensor([[[[0., 1., 2., 2.]]]])
    """
    nowhere = float(far**2)
    squared = torch.where(marked, 0.0, nowhere)
    steps = torch.from_numpy(np.arange(-far, far + 1) ** 2).to(marked.device)
    for _ in range(2):
        windows = F.pad(squared, (far, far), value=nowhere).unfold(-1, 2 * far + 1, 1)
        squared = (windows + steps).amin(-1).mT
    return squared.sqrt()


def equalise(levels: Tensor) -> Tensor:
    """OpenCV's equalisation of a histogram of levels 0..20, image by image.

    Example:
        >>> equalise(torch.tensor([[[[0.0, 1.0, 1.0, 3.0]]]]))
        tensor([[[[  0., 170., 170., 255.]]]])
    """
    count = torch.stack([(levels <= i).sum((1, 2, 3)) for i in range(_FAR + 1)], 1).to(levels)
    lowest = torch.where(count > 0, count, torch.inf).amin(1, keepdim=True)
    total = count[:, -1:]
    table = (255 * (count - lowest) / (total - lowest).clamp_min(1)).round()
    equal = table.gather(1, levels.flatten(1).long()).view_as(levels)
    return torch.where((total > lowest)[..., None, None], equal, levels)


def _relief(liquid: Tensor) -> Tensor:
    """Light on the rims: the distance from them, embossed."""
    distance = box3(distance_to(outlines(cut(liquid))).to(liquid)).add(1e-4).floor()
    embossed = correlate(equalise(distance), _LIGHT_FROM_ABOVE).clamp(0, 255)
    return box3(embossed).round()


def _paint(colour: tuple[int, int, int], x: Tensor) -> Tensor:
    return torch.from_numpy(np.array(colour) / 255).to(x).view(3, 1, 1)
