"""What a transform asks of a manifold: exact latents, and a differentiable way back."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Manifold", "TapedManifold"]


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


@runtime_checkable
class TapedManifold(Manifold, Protocol):
    """A manifold whose ``encode`` can record the gradient of ``decode``.

    Example:
        >>> import ijsat_aug
        >>> isinstance(ijsat_aug.load_flow("digits"), TapedManifold)
        True
    """

    def encode_with_tape(self, x: Tensor) -> tuple[Tensor, Any]:
        """The latents, and a tape for :meth:`vjp` at them."""

    def vjp(self, tape: Any, g: Tensor) -> Tensor:
        """The gradient ``g^T d decode(z) / dz`` where the tape was recorded."""
