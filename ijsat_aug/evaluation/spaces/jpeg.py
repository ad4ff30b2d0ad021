"""What JPEG may do to an image: other DCT coefficients than its own, in steps of quantisation."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ...attack.ascent import Picture, Values, Variable
from ...attack.balls import Draw
from .l1 import L1Ball, unit_l1_ball
from .space import Drawn, check, linf_variable

__all__ = ["dct_matrix", "jpeg_l1", "jpeg_linf"]

_LIMIT = 2.0  # the largest change of a coefficient in an L1 ball, in half steps (UAR)

# ITU-T T.81, tables K.1 and K.2: one step of each coefficient, in 8-bit levels.
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))  # JFIF


def jpeg_linf(
    images: Tensor, budget: float, steps: int, uniform: Draw
) -> tuple[Picture, dict[str, Variable]]:
    """Every DCT coefficient moves by ``budget`` half steps of quantisation at most.

    Kang et al., "Testing Robustness Against Unforeseen Adversaries" (UAR), 2019: 8 x 8 blocks of
    luma and of chroma at half the size, the tables of quality 50. A budget of 1 is what rounding
    may do.

    Differences: the detail of colour that half size loses is kept, so that a budget of 0 is the
    clean image. Sides that are no multiple of a block are covered by blocks that reach beyond; a
    grey image has luma alone.

    Example:
        >>> x = torch.rand(2, 3, 32, 32)
        >>> picture, variables = jpeg_linf(x, 0.25, 10, torch.rand)
        >>> variables["coefficients"].start.shape, bool((picture({
        ...     "coefficients": variables["coefficients"].ball.centre}) == x).all())
        (torch.Size([2, 1536]), True)
    """
    check(images, budget, steps, channels=(1, 3))
    picture, none = _codec(images)
    return picture, {"coefficients": linf_variable(none, budget, steps, uniform)}


def jpeg_l1(
    images: Tensor, budget: float, steps: int, uniform: Draw
) -> tuple[Picture, dict[str, Variable]]:
    """As JPEG-Linf, but the changes sum up to ``budget`` half steps at most, none above 2.

    Kang et al. (UAR), 2019.

    Differences: as there; and projected steps of length ``budget / sqrt(steps)`` instead of Frank
    and Wolfe's, each spent on the coefficients of largest gradient, which move by
    ``0.5 / sqrt(steps)``: at 20 and 50 steps this loss is the higher one, with no step to count.

    Example:
        >>> picture, variables = jpeg_l1(torch.rand(2, 3, 32, 32), 64.0, 10, torch.rand)
        >>> bool((variables["coefficients"].start.abs().sum(1) <= 64).all())
        True
    """
    check(images, budget, steps, channels=(1, 3))
    picture, none = _codec(images)
    share = 1 / math.sqrt(steps)
    ball = L1Ball(none, budget, box=(-_LIMIT, _LIMIT), stride=_LIMIT / 4 * share)
    start = ball.project(budget * unit_l1_ball(tuple(none.shape), uniform))
    return picture, {"coefficients": Variable(start, ball, budget * share, (True,) * steps)}


def dct_matrix(size: int = 8) -> Tensor:
    """The orthonormal cosine transform (DCT-II), a frequency a row.

    Example:
        >>> D = dct_matrix()
        >>> torch.allclose(D @ D.T, torch.eye(8), atol=1e-6)
        True
    """
    k = torch.arange(size, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def _codec(images: Tensor) -> tuple[Drawn, Tensor]:
    """The picture of changed coefficients, and no change: luma's, then those of both chromas."""
    layers = [_patterns(_LUMA, 1).to(images)]
    if images.shape[1] == 3:
        layers.append(_patterns(_CHROMA, 2).to(images))
    counts = [
        planes * 64 * math.prod(_grid(images, patterns))
        for planes, patterns in zip((1, 2), layers, strict=False)
    ]
    decode = partial(_decode, layers=layers, counts=counts, to_rgb=images.new_tensor(_TO_RGB))
    return Drawn(decode, (images,)), images.new_zeros(len(images), sum(counts))


def _decode(
    values: Values, images: Tensor, layers: list[Tensor], counts: list[int], to_rgb: Tensor
) -> Tensor:
    parts = values["coefficients"].split(counts, 1)
    change = torch.cat(
        [_place(part, images, patterns) for part, patterns in zip(parts, layers, strict=True)], 1
    )
    if len(layers) == 1:
        return images + change
    return images + torch.einsum("rc,bchw->brhw", to_rgb, change)


def _place(part: Tensor, images: Tensor, patterns: Tensor) -> Tensor:
    """The planes ``(B, planes, H, W)`` that coefficients ``(B, planes * blocks * 64)`` make up."""
    height, width = images.shape[2:]
    side = patterns.shape[-1]
    rows, columns = _grid(images, patterns)
    blocks = part.reshape(len(images), -1, 64) @ patterns.flatten(1)
    planes = blocks.reshape(len(images), -1, rows, columns, side, side).transpose(3, 4)
    return planes.reshape(len(images), -1, rows * side, columns * side)[..., :height, :width]


def _grid(images: Tensor, patterns: Tensor) -> tuple[int, int]:
    """How many blocks cover the height and the width."""
    side = patterns.shape[-1]
    return -(-images.shape[2] // side), -(-images.shape[3] // side)


def _patterns(table: tuple[tuple[int, ...], ...], enlarged: int) -> Tensor:
    """``(64, side, side)`` pixels in [0, 1] of half a step of each coefficient of a block."""
    waves = dct_matrix()[:, None, :, None] * dct_matrix()[:, None]
    half_steps = torch.tensor(table, device="cpu") / 2 / 255
    patterns = (half_steps[:, :, None, None] * waves).reshape(64, 8, 8)
    return patterns.repeat_interleave(enlarged, 1).repeat_interleave(enlarged, 2)
