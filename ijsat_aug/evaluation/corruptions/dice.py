"""Random numbers that an image keeps, whatever batch it comes in and wherever it is corrupted."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Dice"]


class Dice:
    """One stream a picture, counted off by a key of (seed, name, severity); drawn on the host.

    Args:
        seed: Not negative.
        name: Of the corruption.
        severity: Of the corruption.
        images: Indices of the images in their data set.
        like: Gives the device and the type of what is drawn.

    Example:
        >>> like = torch.empty(0)
        >>> both = Dice(0, "fog", 1, range(2), like).normal((3,))
        >>> second = Dice(0, "fog", 1, range(1, 2), like).normal((3,))
        >>> both.shape, bool((both[1] == second[0]).all())
        (torch.Size([2, 3]), True)
    """

    def __init__(self, seed: int, name: str, severity: int, images: range, like: Tensor) -> None:
        words = np.random.SeedSequence(seed, spawn_key=(*name.encode(), severity))
        self._key = words.generate_state(2, np.uint64)
        self._images = images
        self._like = like

    @cached_property
    def _streams(self) -> list[np.random.Generator]:
        # The highest word of Philox' counter is the image, so that no two streams ever meet.
        philox = (np.random.Philox(key=self._key, counter=[0, 0, 0, i]) for i in self._images)
        return [np.random.Generator(bits) for bits in philox]

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """``(N, *shape)`` from a standard normal distribution."""
        return self._together([s.standard_normal(shape) for s in self._streams])

    def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()) -> Tensor:
        """``(N, *shape)`` from [low, high)."""
        return self._together([s.uniform(low, high, shape) for s in self._streams])

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """``(N, *shape)`` int64 from low to high - 1."""
        draws = [s.integers(low, high, shape) for s in self._streams]
        return torch.from_numpy(np.stack(draws)).to(self._like.device)

    def poisson(self, rates: Tensor) -> Tensor:
        """``(N, ...)`` counts of the rates ``(N, ...)``."""
        pairs = zip(self._streams, rates.cpu().numpy(), strict=True)
        return self._together([stream.poisson(rate) for stream, rate in pairs])

    def _together(self, draws: list[Any]) -> Tensor:
        stacked: NDArray[Any] = np.stack(draws)
        return torch.from_numpy(stacked).to(self._like.device, self._like.dtype)
