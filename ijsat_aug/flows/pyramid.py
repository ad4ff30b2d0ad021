"""A flow of one size at any size: on the low band of an image, or on overlapping tiles."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .manifold import Manifold, TapedManifold

__all__ = ["Pyramid", "Tiles", "at_size"]


def at_size(flow: Manifold, size: tuple[int, int]) -> Manifold:
    """The flow itself where it has that size, and else a pyramid (or tiles) that has.

    Example:
        >>> import ijsat_aug
        >>> flow = ijsat_aug.load_flow("digits")
        >>> at_size(flow, (8, 8)) is flow, at_size(flow, (20, 13)).shape
        (True, (1, 20, 13))
    """
    if tuple(flow.shape[1:]) == tuple(size):
        return flow
    if isinstance(flow, Tiles):
        return Tiles(flow.flow, size, flow.overlap)
    return Pyramid(flow.flow if isinstance(flow, Pyramid) else flow, size)


class Pyramid:
    r"""The manifold of a flow on images of another size, through their low band.

    .. math:: x' = x + U(G(z + \lambda) - D x), \quad z = G^{-1}(D x)

    with D the resampling to the flow's size and U the way back, both antialiased. ``encode`` sees
    the low band alone; what it leaves out is :meth:`rest`, and together they are the image exactly.
    The cost hardly depends on the size. Fine detail does not move: for that, see :class:`Tiles`.

    Args:
        flow: Of any size; images of another aspect are squeezed to it.
        size: ``(height, width)`` of the images.

    Example:
        >>> import ijsat_aug
        >>> flow = Pyramid(ijsat_aug.load_flow("digits"), (20, 13))
        >>> x = torch.rand(2, 1, 20, 13)
        >>> z = flow.encode(x)
        >>> z.shape, torch.allclose(flow.decode(z) + flow.rest(x), x, atol=1e-5)
        (torch.Size([2, 64]), True)
    """

    def __init__(self, flow: Manifold, size: tuple[int, int]) -> None:
        self.flow = flow
        self.size = _checked(size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the images."""
        return (self.flow.shape[0], *self.size)

    @property
    def latent_dim(self) -> int:
        """Length of a latent: the flow's."""
        return self.flow.latent_dim

    @property
    def info(self) -> Any:
        """The flow's own; its calibrated radius moves the low band as far."""
        return getattr(self.flow, "info", {})

    def encode(self, x: Tensor) -> Tensor:
        """The latent of the low band."""
        return self.flow.encode(self._down(x))

    def decode(self, z: Tensor) -> Tensor:
        """The low band of a latent, at the images' size."""
        return self._up(self.flow.decode(z))

    def rest(self, x: Tensor) -> Tensor:
        """What ``encode`` leaves out of an image."""
        return x - self._up(self._down(x))

    def encode_with_tape(self, x: Tensor) -> tuple[Tensor, Any]:
        """The latent, and a tape for :meth:`vjp` at it."""
        low = self._down(x)
        if isinstance(self.flow, TapedManifold):
            return self.flow.encode_with_tape(low)
        z = self.flow.encode(low)
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            return z, (leaf, self.flow.decode(leaf))

    def vjp(self, tape: Any, g: Tensor) -> Tensor:
        """The gradient ``g^T d decode(z) / dz`` where the tape was recorded."""
        with torch.enable_grad():
            low = torch.zeros(len(g), *self.flow.shape, dtype=g.dtype, device=g.device)
            (g_low,) = torch.autograd.grad(self._up(low.requires_grad_()), low, g)
        if isinstance(self.flow, TapedManifold):
            return self.flow.vjp(tape, g_low)
        leaf, decoded = tape
        at_latent: Tensor = torch.autograd.grad(decoded, leaf, g_low.to(decoded.dtype))[0]
        return at_latent

    def to(self, device: torch.device | str | None = None, **options: Any) -> Pyramid:
        """The same of the flow elsewhere."""
        flow: Any = self.flow
        return Pyramid(flow.to(device, **options), self.size) if hasattr(flow, "to") else self

    def __repr__(self) -> str:
        return f"Pyramid({self.flow!r}, size={self.size})"

    def _down(self, x: Tensor) -> Tensor:
        return _resample(x, self.flow.shape[1:])

    def _up(self, low: Tensor) -> Tensor:
        return _resample(low, self.size)


class Tiles:
    """The manifold of a flow on larger images, by overlapping tiles that are blended.

    All detail moves, at the price of the flow on every tile; ``decode`` of ``encode`` is the image.

    Args:
        flow: Of the tiles' size.
        size: ``(height, width)`` of the images, at least those of the flow.
        overlap: Of neighbouring tiles at least, in pixels; by default a quarter of a tile.

    Example:
        >>> import ijsat_aug
        >>> tiles = Tiles(ijsat_aug.load_flow("digits"), (20, 13))
        >>> x = torch.rand(2, 1, 20, 13)
        >>> z = tiles.encode(x)
        >>> len(tiles), z.shape, torch.allclose(tiles.decode(z), x, atol=1e-5)
        (6, torch.Size([2, 384]), True)
    """

    def __init__(self, flow: Manifold, size: tuple[int, int], overlap: int | None = None) -> None:
        height, width = flow.shape[1:]
        overlap = min(height, width) // 4 if overlap is None else overlap
        if not 0 <= overlap < min(height, width):
            raise ValueError(f"overlap must be from 0 to {min(height, width) - 1}, got {overlap}.")
        size = _checked(size)
        if size[0] < height or size[1] < width:
            raise ValueError(
                f"images of {size[0]}x{size[1]} are smaller than a tile of {height}x{width}: use "
                "Pyramid(flow, size)."
            )
        self.flow, self.size, self.overlap = flow, size, overlap
        rows, columns = _places(size[0], height, overlap), _places(size[1], width, overlap)
        self.places = [(i, j) for i in rows for j in columns]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the images."""
        return (self.flow.shape[0], *self.size)

    @property
    def latent_dim(self) -> int:
        """Length of a latent: the flow's, for every tile."""
        return len(self) * self.flow.latent_dim

    @property
    def info(self) -> Any:
        """The flow's own; its calibrated radius moves every tile as far."""
        return getattr(self.flow, "info", {})

    def encode(self, x: Tensor) -> Tensor:
        """The latents of all tiles, one behind the other."""
        height, width = self.flow.shape[1:]
        tiles = torch.stack([x[:, :, i : i + height, j : j + width] for i, j in self.places], 1)
        return self.flow.encode(tiles.flatten(0, 1)).reshape(len(x), -1)

    def decode(self, z: Tensor) -> Tensor:
        """The tiles of a latent, blended."""
        count = len(z)
        tiles = self.flow.decode(z.reshape(count * len(self), -1))
        tiles = tiles.unflatten(0, (count, len(self)))
        height, width = self.flow.shape[1:]
        image: Tensor = z.new_zeros(count, *self.shape, dtype=tiles.dtype)
        for k, (i, j) in enumerate(self.places):
            weight = self._weights[k].to(tiles)
            around = (j, self.size[1] - j - width, i, self.size[0] - i - height)
            image = image + F.pad(weight * tiles[:, k], around)
        return image

    def to(self, device: torch.device | str | None = None, **options: Any) -> Tiles:
        """The same of the flow elsewhere."""
        flow: Any = self.flow
        if not hasattr(flow, "to"):
            return self
        return Tiles(flow.to(device, **options), self.size, self.overlap)

    def __repr__(self) -> str:
        return f"Tiles({self.flow!r}, size={self.size}, overlap={self.overlap})"

    @cached_property
    def _weights(self) -> list[Tensor]:
        """Of every tile: high in its middle; they sum to 1 everywhere."""
        height, width = self.flow.shape[1:]
        hat = _hat(height)[:, None] * _hat(width)
        total = torch.zeros(self.size)
        for i, j in self.places:
            total[i : i + height, j : j + width] += hat
        return [hat / total[i : i + height, j : j + width] for i, j in self.places]


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if min(height, width) < 1:
        raise ValueError(f"size is (height, width), both at least 1; got {size}.")
    return int(height), int(width)


def _resample(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)


def _places(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin, evenly, so that neighbours share ``overlap`` pixels or more."""
    count = math.ceil((length - overlap) / (tile - overlap)) if length > tile else 1
    return [round(k * (length - tile) / max(count - 1, 1)) for k in range(count)]


def _hat(length: int) -> Tensor:
    middle = (length - 1) / 2
    return (length + 1) / 2 - (torch.arange(length) - middle).abs()
