"""What a transform asks of a manifold: exact latents, and a differentiable way back."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Manifold"]


@runtime_checkable
class Manifold(Protocol):
    """Anything with ``shape``, ``latent_dim``, ``encode`` and ``decode``.

    Example:
        >>> import ijsat_aug
        >>> isinstance(ijsat_aug.load_flow("digits"), Manifold)
        True
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the images."""

    @property
    def latent_dim(self) -> int:
        """Length of a latent."""

    def encode(self, x: Tensor) -> Tensor:
        """Images in [0, 1] to flat, standardised latents ``(B, D)``, without gradient."""

    def decode(self, z: Tensor) -> Tensor:
        """Latents to images, differentiable with respect to ``z``; not clipped."""
