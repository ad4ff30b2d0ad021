"""Fog and snow whose random numbers are the variables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attack.ascent import Picture, Values, Variable
from ...attack.balls import Draw
from .space import Drawn, check, linf_variable

__all__ = ["SnowBall", "fog", "snow"]

_DECAY = 2.0  # from one octave of fog to the next
_LAYERS, _CELL, _STREAK = 7, 4, 13  # snow: flakes of so many kinds, a flake each 4 pixels, 13 long
_RATE = 0.2  # the mean intensity of flakes (UAR)
_VEIL = 0.25  # the largest share of light that comes from the air
_LUMA = (0.2126, 0.7152, 0.0722)


def fog(
    images: Tensor, budget: float, steps: int, uniform: Draw
) -> tuple[Picture, dict[str, Variable]]:
    """White clouds in front: ``(image + budget * fog) / (1 + budget)``, fog in [0, 1].

    Kang et al., "Testing Robustness Against Unforeseen Adversaries" (UAR), 2019, after the fog of
    ImageNet-C. The variables are random numbers in [0, 1] at the corners of a cell as large as the
    image, of cells of half that side, and so on down to a pixel, each octave half as strong.

    Differences: octaves are interpolated linearly instead of by midpoint displacement; the lightest
    and the darkest fog are found for each image, not for the batch; white, not the image's own
    maximum, is what is kept in range, so that a budget of 0 is the clean image.

    Example:
        >>> x = torch.rand(2, 3, 32, 32)
        >>> picture, variables = fog(x, 0.5, 10, torch.rand)
        >>> thick = picture({"octaves": variables["octaves"].start})
        >>> bool(((thick >= x / 1.5 - 1e-6) & (thick <= (x + 0.5) / 1.5 + 1e-6)).all())
        True
    """
    check(images, budget, steps)
    grids = _octaves(*images.shape[2:])
    centre = images.new_full((len(images), sum(map(math.prod, grids))), 0.5)
    picture = Drawn(partial(_fog, budget=budget, grids=grids), (images,))
    return picture, {"octaves": linf_variable(centre, 0.5, steps, uniform)}


def _octaves(height: int, width: int) -> list[tuple[int, int]]:
    """Corners of the cells of each octave, whose sides are the image's, half of it, ... a pixel."""
    side = max(height, width)
    cells = [side / 2**octave for octave in range(1 + math.ceil(math.log2(side)))]
    return [(1 + math.ceil(height / cell), 1 + math.ceil(width / cell)) for cell in cells]


def _fog(values: Values, images: Tensor, budget: float, grids: list[tuple[int, int]]) -> Tensor:
    parts = values["octaves"].split([math.prod(grid) for grid in grids], 1)
    size = images.shape[2:]
    plasma = images.new_zeros(len(images), 1, *size)
    for octave, (part, grid) in enumerate(zip(parts, grids, strict=True)):
        corners = part.reshape(-1, 1, *grid)
        cloud = F.interpolate(corners, size, mode="bilinear", align_corners=True)
        plasma = plasma + cloud / _DECAY**octave
    low, high = plasma.amin((1, 2, 3), True), plasma.amax((1, 2, 3), True)
    clouds = (plasma - low) / (high - low).clamp(min=1e-6)
    return (images + budget * clouds) / (1 + budget)


def snow(
    images: Tensor, budget: float, steps: int, uniform: Draw
) -> tuple[Picture, dict[str, Variable]]:
    """Flakes blurred by their fall are added, ``budget`` bright; their intensities are variables.

    Kang et al., "Testing Robustness Against Unforeseen Adversaries" (UAR), 2019, after the snow of
    ImageNet-C: seven layers of flakes, one every 4 pixels, whose intensities to the fourth power
    are smeared along 13 pixels; the mean intensity in each 32 x 32 pixels is 0.2 at most. Up to a
    quarter of the light is that of whitened air.

    Differences: angle, length, width and place of the streaks are drawn for each image and layer,
    as Gaussians; the whitening grows with the budget up to 1, so that a budget of 0 is the clean
    image.

    Example:
        >>> x = torch.rand(2, 3, 32, 32)
        >>> picture, variables = snow(x, 0.5, 10, torch.rand)
        >>> bool((picture({"flakes": variables["flakes"].start}) >= x).all())
        True
    """
    check(images, budget, steps)
    cells = [-(-side // _CELL) for side in images.shape[2:]]
    ball = SnowBall(images.new_zeros(len(images), _LAYERS, *cells))
    # Exponentially distributed, as in UAR: few flakes are bright.
    flakes = (-uniform(tuple(ball.centre.shape)) / _RATE).exp()
    moves = (True,) * steps
    variable = Variable(ball.project(flakes), ball, 0.5 / math.sqrt(steps), moves)
    veil = _VEIL * min(budget, 1)
    air = torch.lerp(images, torch.maximum(images, 1.5 * _grey(images) + 0.5), veil)
    picture = Drawn(partial(_snow, budget=budget), (air, _streaks(len(images), uniform)))
    return picture, {"flakes": variable}


@dataclass(frozen=True, eq=False)
class SnowBall:
    """Intensities in [0, 1] whose mean over each 8 x 8 flakes is at most ``radius``.

    Example:
        >>> ball = SnowBall(torch.zeros(1, 7, 8, 8))
        >>> full = ball.project(torch.ones(1, 7, 8, 8))
        >>> full.unique(), ball.distance(full)
        (tensor([0.2000]), tensor([0.2000]))
    """

    centre: Tensor
    radius: float = _RATE

    def step(self, value: Tensor, gradient: Tensor, size: float) -> Tensor:
        """A step of ``size`` along the sign of the gradient, projected."""
        return self.project(torch.add(value, gradient.sign(), alpha=size))

    def project(self, value: Tensor) -> Tensor:
        """Clamp to [0, 1], then scale every region down to the mean that it may have."""
        # At 0 the fourth power feels nothing any more.
        value = value.clamp(1e-3, 1)
        height, width = value.shape[2:]
        share = self.radius / self._means(value).clamp(min=self.radius)
        share = share.repeat_interleave(8, 2).repeat_interleave(8, 3)
        return value * share[..., :height, :width]

    def distance(self, value: Tensor) -> Tensor:
        """The largest mean of a region of each sample."""
        return self._means(value).flatten(1).amax(1)

    def take(self, index: Tensor) -> SnowBall:
        """The balls of some samples."""
        return replace(self, centre=self.centre[index])

    def _means(self, value: Tensor) -> Tensor:
        return F.avg_pool2d(value, 8, ceil_mode=True)


def _streaks(batch: int, uniform: Draw) -> Tensor:
    """``(B, layers, 13, 13)``: all layers of an image fall to one side, each in its own way."""
    draws = uniform((batch, 6, _LAYERS, 1, 1))
    side = (draws[:, 0, :1] < 0.5).to(draws.dtype) * 2 - 1
    angle = side * (draws[:, 1] * 50 + 20).deg2rad()  # from the horizontal
    length, width = 1.5 + 1.5 * draws[:, 2], 0.5 + 0.7 * draws[:, 3] ** 3
    across, down = (_CELL * (draws[:, i] - 0.5) for i in (4, 5))
    pixels = torch.arange(_STREAK, device=draws.device) - _STREAK // 2
    x, y = pixels - across, pixels[:, None] - down
    along, beside = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    return (-0.5 * ((along / length) ** 2 + (beside / width) ** 2)).exp()


def _snow(values: Values, air: Tensor, streaks: Tensor, budget: float) -> Tensor:
    height, width = air.shape[2:]
    fallen = _fallen(values["flakes"] ** 4, streaks)
    edge = (_STREAK - _CELL) // 2
    fallen = fallen[..., edge : edge + height, edge : edge + width]
    return air + budget * fallen


def _fallen(flakes: Tensor, streaks: Tensor) -> Tensor:
    """All layers of each image, every flake a streak: ``(B, 1, H, W)``."""
    if flakes.is_cuda:
        return _fallen_in_columns(flakes, streaks)
    # One group an image, so that the layers of each are added up.
    return F.conv_transpose2d(
        flakes.flatten(0, 1)[None], streaks.flatten(0, 1)[:, None], stride=_CELL,
        groups=len(flakes),
    )[0, :, None]  # fmt: skip


def _fallen_in_columns(flakes: Tensor, streaks: Tensor) -> Tensor:
    """The same as a product of matrices: cuDNN is slow with as many groups as images."""
    columns = streaks.flatten(2).transpose(1, 2) @ flakes.flatten(2)
    height, width = (_CELL * (side - 1) + _STREAK for side in flakes.shape[2:])
    return F.fold(columns, (height, width), _STREAK, stride=_CELL)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * images.new_tensor(_LUMA).reshape(3, 1, 1)).sum(1, keepdim=True)
