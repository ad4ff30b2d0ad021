"""Noise: gaussian, shot, impulse, speckle."""

from __future__ import annotations

import torch
from torch import Tensor

from .dice import Dice

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"]


def gaussian_noise(x: Tensor, dice: Dice, std: float) -> Tensor:
    """``x + std n``: what a sensor adds in the dark.

    Example:
        >>> dice = Dice(0, "gaussian_noise", 1, range(4), torch.empty(0))
        >>> noisy = gaussian_noise(torch.zeros(4, 1, 32, 32), dice, 0.1)
        >>> round(float(noisy.std()), 2)
        0.1
    """
    return x + std * dice.normal(x.shape[1:])


def shot_noise(x: Tensor, dice: Dice, photons: float) -> Tensor:
    """Counts of single photons.

    Example:
        >>> dice = Dice(0, "shot_noise", 1, range(4), torch.empty(0))
        >>> shot_noise(torch.ones(4, 1, 32, 32), dice, 10).mul(10).frac().unique()
        tensor([0.])
    """
    return dice.poisson(x * photons) / photons


def impulse_noise(x: Tensor, dice: Dice, amount: float) -> Tensor:
    """Salt and pepper: a share of the values is black or white.

    Example:
        >>> dice = Dice(0, "impulse_noise", 1, range(1), torch.empty(0))
        >>> impulse_noise(torch.full((1, 1, 32, 32), 0.5), dice, 0.1).unique()
        tensor([0.0000, 0.5000, 1.0000])
    """
    chance = dice.uniform(0, 1, x.shape[1:])
    salt_or_pepper = (chance < amount / 2).to(x)
    return torch.where(chance < amount, salt_or_pepper, x)


def speckle_noise(x: Tensor, dice: Dice, std: float) -> Tensor:
    """``x + x std n``: the brighter, the noisier.

    Example:
        >>> dice = Dice(0, "speckle_noise", 1, range(1), torch.empty(0))
        >>> speckle_noise(torch.zeros(1, 1, 8, 8), dice, 0.2).unique()
        tensor([0.])
    """
    return x + x * std * dice.normal(x.shape[1:])
