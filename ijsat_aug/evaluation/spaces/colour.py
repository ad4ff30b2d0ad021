"""One smooth map of all colours: ReColorAdv."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from kornia.color import luv_to_rgb, rgb_to_luv
from torch import Tensor

from ...attack.ascent import Picture, Values, Variable
from ...attack.balls import Draw
from ...attack.clip import clip
from ...precision import full_precision
from .space import Drawn, check, linf_variable

__all__ = ["recolor"]

_KNOTS = 8  # of the grid of colours, in each of v, u and L
_UNITS = (100.0, 200.0, 200.0)  # L in [0, 100]; u and v in [-100, 100]
# No colour of sRGB lies further from white in u' and v'; beyond, the way back to RGB explodes.
_LOWEST, _HIGHEST = (-0.08, -0.32), (0.26, 0.10)
_DARK = 1e-3  # of L, where u' and v' are still defined


def recolor(
    images: Tensor, budget: float, steps: int, uniform: Draw
) -> tuple[Picture, dict[str, Variable]]:
    """All pixels of one colour become another colour, ``budget`` away at most in each channel.

    Laidlaw and Feizi, "Functional Adversarial Attacks" (ReColorAdv), 2019, bounded as in PAT
    (Laidlaw et al., 2021): 0.06, in CIELUV with L / 100, u / 200 and v / 200. The variable is the
    change of colour at the knots of a grid of 8 x 8 x 8 colours (ReColorAdv's own default), linear
    between them. A grey image has a curve of grey levels instead, with 8 knots in L.

    Differences: the coarse grid (PAT: 16 x 32 x 32) stands for the penalty on rough maps; sign
    steps from a random start instead of Adam from none; cross-entropy instead of the margin. So it
    is stronger than PAT's: a robust ResNet for CIFAR-10 keeps 30 %, with PAT's penalty 56 %.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> picture, variables = recolor(x, 0.06, 10, torch.rand)
        >>> colours = variables["colours"]
        >>> colours.start.shape, bool((picture({"colours": colours.start}) - x).abs().max() > 0.01)
        (torch.Size([2, 3, 8, 8, 8]), True)
    """
    check(images, budget, steps, channels=(1, 3))
    channels = images.shape[1]
    knots = (_KNOTS,) * 3 if channels == 3 else (1, 1, _KNOTS)
    change = images.new_zeros(len(images), channels, *knots)
    with full_precision(images.device):
        luv = rgb_to_luv(images.expand(-1, 3, -1, -1))
        units, dark, low, high = (
            images.new_tensor(v).reshape(-1, 1, 1) for v in (_UNITS, (1.0, 0, 0), _LOWEST, _HIGHEST)
        )
        places = (2 * luv / units - dark).movedim(1, -1)[:, None]
        draw = partial(_recolor, units=units, gamut=(low, high))
        lost = images - draw({"colours": change}, luv, places, torch.zeros_like(images))
    variable = linf_variable(change, budget, steps, uniform)
    return Drawn(draw, (luv, places, lost)), {"colours": variable}


def _recolor(
    values: Values, luv: Tensor, places: Tensor, lost: Tensor, units: Tensor,
    gamut: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """``lost`` is what the round trip through CIELUV does to the clean image."""
    change = F.grid_sample(
        values["colours"], places, padding_mode="border", align_corners=True
    ).squeeze(2)
    channels = change.shape[1]
    change = F.pad(change, (0, 0, 0, 0, 0, 3 - channels))
    return _to_rgb(luv + units * change, *gamut)[:, :channels] + lost


def _to_rgb(luv: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """RGB of the nearest L, u and v in the box of sRGB's gamut; finite gradients at black."""
    light = 100 * clip(luv[:, :1] / 100) + _DARK
    hue = torch.minimum(torch.maximum(luv[:, 1:], 13 * light * low), 13 * light * high)
    return luv_to_rgb(torch.cat([light, hue], 1))
