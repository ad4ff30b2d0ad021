"""Pairs of images as a function of their mixing weight, in pixels or along the manifold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..attack.ascent import Values
from ..attack.clip import clip
from ..flows.manifold import Manifold
from ..precision import full_precision

__all__ = ["Blend", "LatentBlend", "PixelBlend", "Space", "blend", "geometric_weight"]

Space = Literal["pixel", "latent", "spherical"]


@dataclass(frozen=True, eq=False)
class PixelBlend:
    """``weight * own + (1 - weight) * partner``.

    Example:
        >>> own, partner = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        >>> PixelBlend(own, partner)({"weight": torch.full((1, 1, 1, 1), 0.25)}).unique()
        tensor([0.2500])
    """

    own: Tensor
    partner: Tensor

    def __call__(self, values: Values) -> Tensor:
        """``(B, C, H, W)``."""
        return torch.lerp(self.partner, self.own, values["weight"])

    def take(self, index: Tensor) -> PixelBlend:
        """The same for some samples."""
        return PixelBlend(self.own[index], self.partner[index])


@dataclass(frozen=True, eq=False)
class LatentBlend:
    """The decoded blend of two exact latents, straight or along the sphere.

    What the flow's round trip loses of the two images is blended as well, so that weight 1 is the
    sample's own image and weight 0 its partner.
    """

    flow: Manifold
    own: Tensor
    partner: Tensor
    lost_own: Tensor
    lost_partner: Tensor
    spherical: bool

    @classmethod
    def of(cls, flow: Manifold, images: Tensor, *, spherical: bool) -> LatentBlend:
        """Each image with its neighbour in the batch."""
        with torch.no_grad(), full_precision(images.device):
            z = flow.encode(images)
            lost = images - flow.decode(z).to(images.dtype)
        return cls(flow, z, z.roll(1, 0), lost, lost.roll(1, 0), spherical)

    def __call__(self, values: Values) -> Tensor:
        """``(B, C, H, W)``."""
        weight = values["weight"]
        flat = weight.flatten(1)
        mix = _slerp if self.spherical else torch.lerp
        with full_precision(weight.device):
            image = self.flow.decode(mix(self.partner, self.own, flat.to(self.own.dtype)))
        return clip(image.to(weight.dtype) + torch.lerp(self.lost_partner, self.lost_own, weight))

    def take(self, index: Tensor) -> LatentBlend:
        """The same for some samples."""
        names = ("own", "partner", "lost_own", "lost_partner")
        return replace(self, **{name: getattr(self, name)[index] for name in names})


Blend = PixelBlend | LatentBlend


def blend(images: Tensor, space: Space, flow: Manifold | None) -> Blend:
    """Each image with its neighbour in the batch."""
    if space == "pixel":
        return PixelBlend(images, images.roll(1, 0))
    assert flow is not None
    return LatentBlend.of(flow, images, spherical=space == "spherical")


def geometric_weight(images: Tensor, own: Tensor, partner: Tensor, weight: Tensor) -> Tensor:
    """Where images lie on the way from the partner to the own image, as AOM labels them.

    Example:
        >>> own, partner = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
        >>> moved = torch.tensor([[[[0.9, 0.3]]]])
        >>> geometric_weight(moved, own, partner, torch.full((1, 1, 1, 1), 0.5)).item()
        0.6000000238418579
    """
    way = own - partner
    length = way.square().sum((1, 2, 3), keepdim=True)
    along = ((images - partner) * way).sum((1, 2, 3), keepdim=True) / length
    return torch.where(length > 0, along.clamp(0, 1), weight)


def _slerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """From ``start`` to ``end`` at constant angular speed; lengths are blended linearly."""
    lengths = [v.norm(dim=1, keepdim=True) for v in (start, end)]
    one, two = (v / n.clamp(min=1e-12) for v, n in zip((start, end), lengths, strict=True))
    angle = (one * two).sum(1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    direction = ((1 - weight) * angle).sin() * one + (weight * angle).sin() * two
    mixed: Tensor = direction / angle.sin() * torch.lerp(lengths[0], lengths[1], weight)
    return mixed
