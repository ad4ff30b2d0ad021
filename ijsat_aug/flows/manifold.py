"""What a transform asks of a manifold: exact latents, and a differentiable way back."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Manifold",
    "TapedManifold",
    "as_manifold",
    "has_tape",
    "is_of_each_sample",
    "needs_labels",
    "of_samples",
    "on_device",
]


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


def as_manifold(flow: Any) -> Manifold:
    """The flow itself, if it is one.

    Example:
        >>> as_manifold("digits")
        Traceback (most recent call last):
        TypeError: flow must have shape, latent_dim, encode and decode, got str; load one with
        ijsat_aug.load_flow("cifar10").
    """
    if not isinstance(flow, Manifold):
        raise TypeError(
            f"flow must have shape, latent_dim, encode and decode, got {type(flow).__name__}; "
            'load one with ijsat_aug.load_flow("cifar10").'
        )
    return flow


def has_tape(manifold: Manifold) -> TypeGuard[TapedManifold]:
    """Whether its ``encode`` records a tape; where it wraps a flow, that one must too.

    A flow with ``memory="low"`` is not to keep one.

    Example:
        >>> import ijsat_aug
        >>> from ijsat_aug.flows import Decoder, Pyramid
        >>> generator = Decoder(torch.nn.Unflatten(1, (1, 8, 8)), (1, 8, 8), (64,))
        >>> [has_tape(Pyramid(f, (9, 9))) for f in (ijsat_aug.load_flow("digits"), generator)]
        [True, False]
    """
    if getattr(manifold, "memory", "tape") == "low":
        return False
    inner = getattr(manifold, "flow", None)
    return isinstance(manifold, TapedManifold) and (inner is None or has_tape(inner))


def on_device(manifold: Manifold, device: torch.device) -> Manifold:
    """The manifold there, if it can move.

    Example:
        >>> import ijsat_aug
        >>> flow = ijsat_aug.load_flow("digits")
        >>> on_device(flow, torch.device("cpu")) is flow
        True
    """
    move = getattr(manifold, "to", None)
    return manifold if move is None else move(device)


def needs_labels(manifold: object) -> bool:
    """Whether it is another one for every class, which its method ``of_labels`` gives.

    Example:
        >>> import ijsat_aug
        >>> needs_labels(ijsat_aug.load_flow("digits"))
        False
    """
    return bool(getattr(manifold, "needs_labels", False))


def is_of_each_sample(manifold: object) -> bool:
    """Whether every sample has another one, by its label or a context.

    Example:
        >>> import ijsat_aug
        >>> is_of_each_sample(ijsat_aug.load_flow("digits"))
        False
    """
    return needs_labels(manifold) or bool(getattr(manifold, "is_of_each_sample", False))


def of_samples(manifold: Manifold, index: Tensor) -> Manifold:
    """The manifold of some samples, where it knows anything of each.

    Example:
        >>> from ijsat_aug.flows import Decoder
        >>> generator = Decoder(torch.nn.Unflatten(1, (1, 1, 2)), (1, 1, 2), (2,))
        >>> known = generator.at(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> of_samples(known, torch.tensor([1])).encode(torch.rand(1, 1, 1, 2))
        tensor([[3., 4.]])
    """
    find = getattr(manifold, "of_samples", None)
    return manifold if find is None else find(index)
