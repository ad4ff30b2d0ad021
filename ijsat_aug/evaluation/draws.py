"""Random numbers that belong to an image, whatever batch it comes in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Draws"]


class Draws:
    """One stream of random numbers for each image, told by seed, purpose and place in the data.

    They are drawn on the CPU, so that a GPU sees the same ones.

    Args:
        seed: Of the whole evaluation.
        purpose: What they are for, such as the name of a threat.
        places: Where the batch's images stand in their data set.
        device: Where the numbers go.

    Example:
        >>> both, second = Draws(0, "linf", [4, 5]), Draws(0, "linf", [5])
        >>> bool((both.uniform((2, 3))[1] == second.uniform((1, 3))[0]).all())
        True
    """

    def __init__(
        self, seed: int, purpose: str, places: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self.device = device
        self._generators = [
            torch.Generator("cpu").manual_seed(_hash(f"{seed}/{purpose}/{place}"))
            for place in places
        ]

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Uniform in [0, 1); the first dimension counts the images."""
        return self._draw(torch.rand, shape)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal."""
        return self._draw(torch.randn, shape)

    def _draw(self, kind: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        rows = [kind(shape[1:], generator=g, device="cpu") for g in self._generators]
        return torch.stack(rows).to(self.device)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
