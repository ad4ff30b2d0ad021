"""Weather: snow, frost, fog."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .colour import grey, in_colour
from .dice import Dice
from .filters import streak, zoom
from .ice import ice_pictures

__all__ = ["fog", "frost", "plasma", "snow"]


def snow(
    x: Tensor,
    dice: Dice,
    mean: float,
    std: float,
    size: float,
    threshold: float,
    radius: int,
    sigma: float,
    visibility: float,
) -> Tensor:
    """Flakes that fall in front of a whitened picture, from both sides.

    Example:
        >>> dice = Dice(0, "snow", 1, range(1), torch.empty(0))
        >>> x = torch.zeros(1, 1, 32, 32)
        >>> white = snow(x, dice, 0.1, 0.2, 1, 0.6, 8, 3, 0.95)
        >>> round(float(white.min()), 3), bool(white.max() > 0.1)
        (0.025, True)
    """
    flakes = zoom(mean + std * dice.normal((1, *x.shape[2:])), size)
    flakes = torch.where(flakes < threshold, 0, flakes.clamp(0, 1))
    fall = streak(flakes, dice.uniform(-135, -45), radius, sigma)
    whitened = torch.maximum(x, 1.5 * grey(x) + 0.5)
    return visibility * x + (1 - visibility) * whitened + fall + fall.flip(-2, -1)


def fog(x: Tensor, dice: Dice, thickness: float, decay: float) -> Tensor:
    """Clouds, under which the picture keeps its greatest brightness.

    Example:
        >>> dice = Dice(0, "fog", 1, range(1), torch.empty(0))
        >>> white = fog(torch.ones(1, 1, 32, 32), dice, 1.0, 3.0)
        >>> white.min(), white.max()
        (tensor(0.5000), tensor(1.))
    """
    height, width = x.shape[2:]
    clouds = plasma(dice, max(height, width), decay)[:, None, :height, :width]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + thickness * clouds) * brightest / (brightest + thickness)


def plasma(dice: Dice, size: int, decay: float) -> Tensor:
    """Diamond-square terrain in [0, 1], ``(N, side, side)``: a power of two not below ``size``.

    Example:
        >>> plasma(Dice(0, "fog", 1, range(2), torch.empty(0)), 20, 3.0).shape
        torch.Size([2, 32, 32])
    """
    side = max(2, 1 << (size - 1).bit_length())
    bumps = dice.uniform(-1, 1, (side, side))
    terrain = torch.zeros_like(bumps)
    step, height = side, 100.0
    while step >= 2:
        half = step // 2
        bumps_now = height**2 * bumps
        corners = terrain[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        middles = (pairs + pairs.roll(-1, 2)) / 4 + bumps_now[:, half::step, half::step]
        above = corners + corners.roll(-1, 2) + middles + middles.roll(1, 1)
        beside = corners + corners.roll(-1, 1) + middles + middles.roll(1, 2)
        terrain[:, half::step, half::step] = middles
        terrain[:, ::step, half::step] = above / 4 + bumps_now[:, ::step, half::step]
        terrain[:, half::step, ::step] = beside / 4 + bumps_now[:, half::step, ::step]
        step, height = half, height / decay
    low, high = terrain.amin((1, 2), keepdim=True), terrain.amax((1, 2), keepdim=True)
    return (terrain - low) / (high - low)


@in_colour
def frost(
    x: Tensor,
    dice: Dice,
    clear: float,
    ice: float,
    size: float,
    pictures: Sequence[Tensor] | None = None,
) -> Tensor:
    """A piece of a picture of frost over the image.

    Args:
        x: ``(N, 3, H, W)``.
        dice: What chooses the picture and the piece.
        clear: Weight of the image.
        ice: Weight of the frost.
        size: Of the picture, as a factor; it is enlarged where it would not cover the image.
        pictures: ``(3, H, W)`` uint8; by default :func:`~.ice.ice_pictures`, for the photographs
            of the original are not shipped.

    Example:
        >>> dice = Dice(0, "frost", 1, range(1), torch.empty(0))
        >>> snowball = torch.full((3, 50, 50), 255, dtype=torch.uint8)
        >>> frost(torch.zeros(1, 3, 8, 8), dice, 1.0, 0.25, 0.2, [snowball]).unique()
        tensor([0.2500])
    """
    shown = ice_pictures() if pictures is None else pictures
    sheets = [_sheet(p.to(x.device, x.dtype) / 255, x, size) for p in shown]
    which = dice.integers(0, len(sheets)).tolist()
    places = dice.uniform(0, 1, (2,)).tolist()
    pieces = [_piece(sheets[i], place, x) for i, place in zip(which, places, strict=True)]
    return clear * x + ice * torch.stack(pieces)


def _sheet(picture: Tensor, x: Tensor, size: float) -> Tensor:
    ratios = [n / m for n, m in zip(x.shape[2:], picture.shape[1:], strict=True)]
    factor = max(size, *ratios)
    target = [
        max(n, round(m * factor)) for n, m in zip(x.shape[2:], picture.shape[1:], strict=True)
    ]
    if target == list(picture.shape[1:]):
        return picture
    return F.interpolate(picture[None], size=target, mode="bilinear")[0]


def _piece(sheet: Tensor, place: Sequence[float], x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    top = int(place[0] * (sheet.shape[1] - height + 1))
    left = int(place[1] * (sheet.shape[2] - width + 1))
    return sheet[:, top : top + height, left : left + width]
