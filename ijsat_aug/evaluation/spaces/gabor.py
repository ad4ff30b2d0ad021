"""Sparse Gabor noise."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attack.ascent import Picture, Values, Variable
from ...attack.balls import Draw
from .space import Drawn, check, linf_variable

__all__ = ["gabor"]

_SIDE, _SPARSE, _DIRECTIONS = 23, 14, 10


def gabor(
    images: Tensor, budget: float, steps: int, uniform: Draw
) -> tuple[Picture, dict[str, Variable]]:
    """Waves around one pixel in 14 are added, ``budget`` at the highest; they have one pattern.

    Kang et al., "Testing Robustness Against Unforeseen Adversaries" (UAR), 2019, after Co et al.,
    "Procedural Noise Adversarial Examples", 2019. For each image are drawn: the pixels, and a Gabor
    kernel of 23 pixels with 3 to 5.75 waves in 1 to 10 directions. The variables are the weights of
    the kernel at the pixels, in [-1, 1].

    Differences: the noise is divided by its largest absolute value, so that it darkens as well as
    brightens and ``budget`` is its L-inf norm; its spectrum is not whitened; the pixels stay those
    that were drawn.

    Example:
        >>> x = torch.rand(2, 3, 32, 32)
        >>> picture, variables = gabor(x, 0.1, 10, torch.rand)
        >>> noise = picture({"weights": variables["weights"].start}) - x
        >>> bool(noise.abs().max() <= 0.1 + 1e-6)
        True
    """
    check(images, budget, steps)
    batch, pixels = len(images), math.prod(images.shape[2:])
    count = max(1, pixels // _SPARSE)
    places = uniform((batch, pixels)).topk(count, 1).indices
    picture = Drawn(partial(_gabor, budget=budget), (images, places, _kernels(batch, uniform)))
    return picture, {"weights": linf_variable(images.new_zeros(batch, count), 1.0, steps, uniform)}


def _kernels(batch: int, uniform: Draw) -> Tensor:
    """``(B, 1, 23, 23)``: a Gaussian times waves in evenly spaced directions."""
    draws = uniform((batch, 4, 1, 1, 1))
    sigma, waves = 0.1 + 0.3 * draws[:, 0], 3 + (_SIDE / 4 - 3) * draws[:, 1]
    directions = 1 + (_DIRECTIONS * draws[:, 2]).floor().clamp(max=_DIRECTIONS - 1)
    turn = torch.arange(_DIRECTIONS, device=draws.device).reshape(1, -1, 1, 1)
    angle = math.pi * (draws[:, 3] + turn / directions)
    x = torch.linspace(-0.5, 0.5, _SIDE, device=draws.device)
    along = x * angle.cos() + x[:, None] * angle.sin()
    waved = (2 * math.pi * waves * along).cos() * (turn < directions)
    around = (-0.5 * (x**2 + x[:, None] ** 2) / sigma**2).exp()
    return around * waved.sum(1, keepdim=True)


def _gabor(
    values: Values, images: Tensor, places: Tensor, kernels: Tensor, budget: float
) -> Tensor:
    batch, _, height, width = images.shape
    spikes = images.new_zeros(batch, height * width).scatter(1, places, values["weights"])
    noise = F.conv2d(
        spikes.reshape(1, batch, height, width), kernels, padding=_SIDE // 2, groups=batch
    )[0, :, None]
    highest = noise.abs().amax((1, 2, 3), True).clamp(min=1e-12)
    return images + budget * noise / highest
