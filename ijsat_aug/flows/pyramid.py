"""A flow of one size at any size: on the low band of an image, or on overlapping tiles."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .manifold import (
    Manifold,
    TapedManifold,
    as_manifold,
    is_of_each_sample,
    needs_labels,
    of_samples,
)

__all__ = ["Pyramid", "Tiles", "at_size"]

R = TypeVar("R", bound="_Resized")


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


class _Resized:
    """What a flow of one size hands on to images of another."""

    flow: Manifold
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the images."""
        return (self.flow.shape[0], *self.size)

    @property
    def needs_labels(self) -> bool:
        """Whether the flow is another one for every class."""
        return needs_labels(self.flow)

    @property
    def is_of_each_sample(self) -> bool:
        """Whether the flow is another one for every sample."""
        return is_of_each_sample(self.flow)

    def to(self: R, device: torch.device | str | None = None, **options: Any) -> R:
        """The same of the flow elsewhere; itself where nothing changes."""
        flow: Any = self.flow
        return self._of(flow.to(device, **options)) if hasattr(flow, "to") else self

    def of_labels(self: R, labels: Tensor) -> R:
        """The same of the flow of a batch with these labels."""
        flow: Any = self.flow
        return self._of(flow.of_labels(labels.repeat_interleave(self._per_image, 0)))

    def of_samples(self: R, index: Tensor) -> R:
        """The same for some samples of the batch."""
        parts = torch.arange(self._per_image, device=index.device)
        return self._of(of_samples(self.flow, (index[:, None] * self._per_image + parts).flatten()))

    @property
    def _per_image(self) -> int:
        """Images of the flow in one of ours."""
        return 1

    def _of(self: R, flow: Manifold) -> R:
        if flow is self.flow:
            return self
        twin = copy.copy(self)
        twin.flow = flow
        return twin

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"{type(self).__name__} takes images of shape (B, "
                f"{', '.join(map(str, self.shape))}), got {tuple(x.shape)}."
            )


class Pyramid(_Resized):
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
        self.flow, self.size = as_manifold(flow), _checked(size)

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
        """The latent, and a tape for :meth:`vjp` at it; of a flow that has one."""
        return self._taped.encode_with_tape(self._down(x))

    def vjp(self, tape: Any, g: Tensor) -> Tensor:
        """The gradient ``g^T d decode(z) / dz`` where the tape was recorded."""
        with torch.inference_mode(False), torch.enable_grad():
            g = g.clone() if g.is_inference() else g
            low = torch.zeros(len(g), *self.flow.shape, dtype=g.dtype, device=g.device)
            (g_low,) = torch.autograd.grad(self._up(low.requires_grad_()), low, g)
        return self._taped.vjp(tape, g_low)

    def __repr__(self) -> str:
        return f"Pyramid({self.flow!r}, size={self.size})"

    @property
    def _taped(self) -> TapedManifold:
        return self.flow  # type: ignore[return-value]

    def _down(self, x: Tensor) -> Tensor:
        self._check(x)
        return _resample(x, self.flow.shape[1:])

    def _up(self, low: Tensor) -> Tensor:
        return _resample(low, self.size)


class Tiles(_Resized):
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
        height, width = as_manifold(flow).shape[1:]
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
        self._weights: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # copies share it

    def __len__(self) -> int:
        return len(self.places)

    @property
    def latent_dim(self) -> int:
        """Length of a latent: the flow's, for every tile."""
        return len(self) * self.flow.latent_dim

    @property
    def info(self) -> Any:
        """The flow's own, with L2 radii for all tiles of this size together.

        A calibrated radius so moves every tile as far as the flow moves an image.
        """
        info: Mapping[str, Any] = getattr(self.flow, "info", {})
        if not info.get("calibration"):
            return info
        return {**info, "calibration": _widened(info["calibration"], math.sqrt(len(self)))}

    def encode(self, x: Tensor) -> Tensor:
        """The latents of all tiles, one behind the other."""
        self._check(x)
        height, width = self.flow.shape[1:]
        tiles = torch.stack([x[:, :, i : i + height, j : j + width] for i, j in self.places], 1)
        return self.flow.encode(tiles.flatten(0, 1)).reshape(len(x), self.latent_dim)

    def decode(self, z: Tensor) -> Tensor:
        """The tiles of a latent, blended."""
        tiles = self.flow.decode(z.reshape(len(z) * len(self), self.flow.latent_dim))
        tiles = tiles.unflatten(0, (len(z), len(self)))
        tiles = tiles * self._blending(tiles)
        height, width = self.flow.shape[1:]
        image: Tensor = tiles.new_zeros(len(z), *self.shape)
        for k, (i, j) in enumerate(self.places):
            around = (j, self.size[1] - j - width, i, self.size[0] - i - height)
            image = image + F.pad(tiles[:, k], around)
        return image

    def __repr__(self) -> str:
        return f"Tiles({self.flow!r}, size={self.size}, overlap={self.overlap})"

    @property
    def _per_image(self) -> int:
        return len(self)

    def _blending(self, tiles: Tensor) -> Tensor:
        """Weights of every tile ``(T, 1, H, W)``: high in its middle; they sum to 1 everywhere."""
        place = (tiles.device, tiles.dtype)
        if place not in self._weights:
            height, width = self.flow.shape[1:]
            with torch.inference_mode(False):
                hat = _hat(height)[:, None] * _hat(width)
                total = hat.new_zeros(self.size)
                for i, j in self.places:
                    total[i : i + height, j : j + width] += hat
                shares = [hat / total[i : i + height, j : j + width] for i, j in self.places]
                self._weights[place] = torch.stack(shares)[:, None].to(*place)
        return self._weights[place]


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not (pair and all(isinstance(n, Integral) and n >= 1 for n in size)):
        raise ValueError(f"size is (height, width), both at least 1; got {size!r}.")
    return int(size[0]), int(size[1])


def _widened(table: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A calibration whose L2 radii are ``factor`` times as wide."""
    rows = [{**row, "eta": factor * row["eta"]} for row in table.get("l2", ())]
    recommended = dict(table["recommended"])
    recommended["l2"] = factor * recommended["l2"]
    return {**table, "l2": rows, "recommended": recommended}


def _resample(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    full = x if x.dtype == torch.float64 else x.float()  # a CPU resamples no halves
    small = F.interpolate(
        full, size=tuple(size), mode="bilinear", antialias=True, align_corners=False
    )
    return small.to(x.dtype)


def _places(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin, evenly, so that neighbours share ``overlap`` pixels or more."""
    count = math.ceil((length - overlap) / (tile - overlap)) if length > tile else 1
    return [round(k * (length - tile) / max(count - 1, 1)) for k in range(count)]


def _hat(length: int) -> Tensor:
    middle = (length - 1) / 2
    return (length + 1) / 2 - (torch.arange(length, dtype=torch.float64) - middle).abs()
