"""Flow fields that move every pixel a little: StAdv and Elastic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from torch import Tensor

from ...attack.ascent import Picture, Values, Variable
from ...attack.balls import Draw
from ...precision import full_precision
from .space import Drawn, check, linf_variable

__all__ = ["elastic", "stadv"]

_Field = Callable[[Tensor], Tensor]
_KNOTS = 11  # of StAdv's flow, a side
_BLUR = 3 / 224  # Elastic's standard deviation as a share of the side (UAR)


def stadv(
    images: Tensor, budget: float, steps: int, uniform: Draw
) -> tuple[Picture, dict[str, Variable]]:
    """Every pixel is fetched from elsewhere, ``budget`` grid units away at most (the side is 2).

    Xiao et al., "Spatially Transformed Adversarial Examples", 2018, bounded as in PAT (Laidlaw et
    al., 2021): 0.05, which is 0.8 of 32 pixels. The variable is the flow at 11 x 11 knots; between
    them it is linear.

    Differences: the knots stand for the penalty on rough flows, and are as many as make the attack
    as strong as PAT's (a robust ResNet for CIFAR-10 keeps 23 %, with PAT's penalty 22 %); sign
    steps from a random start instead of Adam from none, cross-entropy instead of the margin; pixels
    beyond the edge repeat it instead of being black.

    Example:
        >>> picture, variables = stadv(torch.rand(2, 3, 32, 32), 0.05, 10, torch.rand)
        >>> flow = variables["flow"]
        >>> picture({"flow": flow.start}).shape, flow.ball.distance(flow.start).max() <= 0.05
        (torch.Size([2, 3, 32, 32]), tensor(True))
    """
    check(images, budget, steps)
    size = images.shape[2:]

    def spread(knots: Tensor) -> Tensor:
        return F.interpolate(knots, size, mode="bilinear", align_corners=True)

    flow = images.new_zeros(len(images), 2, _KNOTS, _KNOTS)
    return _warping(images, flow, budget, steps, uniform, spread)


def elastic(
    images: Tensor, budget: float, steps: int, uniform: Draw
) -> tuple[Picture, dict[str, Variable]]:
    """As StAdv, but each pixel has a flow of its own, ``budget`` pixels at most before a blur.

    Kang et al., "Testing Robustness Against Unforeseen Adversaries" (UAR), 2019: the standard
    deviation of the blur is 3 pixels of 224, and as much of any side.

    Differences: pixels beyond the edge repeat it instead of being black.

    Example:
        >>> x = torch.rand(2, 3, 32, 32)
        >>> picture, variables = elastic(x, 1.0, 10, torch.rand)
        >>> bool((picture({"flow": variables["flow"].ball.centre}) - x).abs().max() < 1e-6)
        True
    """
    check(images, budget, steps)
    height, width = images.shape[2:]
    flow = images.new_zeros(len(images), 2, height, width)
    sigma = _BLUR * min(height, width)
    size = 2 * round(4 * sigma) + 1
    kernel = get_gaussian_kernel1d(size, sigma, device=images.device, dtype=images.dtype)
    units = images.new_tensor([2 / width, 2 / height]).reshape(2, 1, 1)

    def smooth(pixels: Tensor) -> Tensor:
        return units * filter2d_separable(pixels, kernel, kernel, "reflect")

    return _warping(images, flow, budget, steps, uniform, smooth)


def _warping(
    images: Tensor, flow: Tensor, budget: float, steps: int, uniform: Draw, in_units: _Field
) -> tuple[Picture, dict[str, Variable]]:
    same = images.new_tensor([[[1.0, 0, 0], [0, 1, 0]]])
    with full_precision(images.device):
        grid = F.affine_grid(same, [1, 1, *images.shape[2:]], align_corners=False)
        warp = partial(_warp, grid=grid, in_units=in_units)
        lost = images - warp({"flow": flow}, images, torch.zeros_like(images))
    return Drawn(warp, (images, lost)), {"flow": linf_variable(flow, budget, steps, uniform)}


def _warp(values: Values, images: Tensor, lost: Tensor, grid: Tensor, in_units: _Field) -> Tensor:
    """``lost`` is what rounding the grid's coordinates does to the clean image."""
    places = grid + in_units(values["flow"]).movedim(1, -1)
    moved = F.grid_sample(images, places, padding_mode="border", align_corners=False)
    return moved + lost
