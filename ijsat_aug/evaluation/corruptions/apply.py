"""The nineteen corruptions, and how a batch of 8-bit images goes through one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...words import check_count
from . import blur, digital, noise, spatter, weather
from .dice import Dice
from .filters import cut
from .ice import load_pictures
from .severities import EXTRA, SEVERITIES, STANDARD, parameters

__all__ = ["CORRUPTIONS", "Corruption", "FrostImages", "corrupt"]

FrostImages = str | Path | Sequence[Tensor]

# Pixel values at work at once: some of the temporaries are float64.
_AT_ONCE = 2**20


@dataclass(frozen=True)
class Corruption:
    """One kind of damage.

    Attributes:
        name: As in the file names of CIFAR-10-C.
        apply: From pixels ``(N, C, H, W)`` in [0, 1], their :class:`~.dice.Dice` and the
            parameters of a severity to damaged pixels, which may lie outside [0, 1].
        random: Whether the seed matters.

    Example:
        >>> [name for name, kind in CORRUPTIONS.items() if not kind.random][:2]
        ['defocus_blur', 'zoom_blur']
    """

    name: str
    apply: Callable[..., Tensor]
    random: bool = True


_PLAIN = {
    "defocus_blur", "gaussian_blur", "zoom_blur", "brightness", "contrast", "pixelate",
    "jpeg_compression", "saturate",
}  # fmt: skip


def _find(name: str) -> Callable[..., Tensor]:
    rooms = (noise, blur, weather, digital, spatter)
    found: Callable[..., Tensor] = next(getattr(r, name) for r in rooms if name in r.__all__)
    return found


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {name: Corruption(name, _find(name), name not in _PLAIN) for name in (*STANDARD, *EXTRA)}
)
"""The 15 standard corruptions, then the 4 extra ones."""


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    seed: int = 0,
    first: int = 0,
    device: torch.device | str | None = None,
    frost_images: FrostImages | None = None,
) -> Tensor:
    """Damage 8-bit images as CIFAR-10-C and ImageNet-C do (Hendrycks and Dietterich, 2019).

    An image's damage depends on its pixels, ``name``, ``severity``, ``seed`` and its index in the
    data set: not on the batch or the device, but for a level here and there where rounding differs.
    The parameters are those of CIFAR-10-C where the shorter side is below 128 pixels, else those of
    ImageNet-C: see ``SMALL`` and ``LARGE`` in :mod:`~ijsat_aug.evaluation.corruptions.severities`.
    The files of ImageNet-C were saved as JPEG of quality 85 afterwards, which is not done here.
    Grey images pass those that need colour as grey RGB ones, and are turned to grey again.

    Args:
        images: ``(N, C, H, W)`` uint8, grey or RGB.
        name: One of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: Of the random ones.
        first: Index of the first image in its data set, for one that comes in pieces.
        device: Where to work and to return; by default where the images are. JPEG and all random
            numbers are made on the CPU.
        frost_images: For ``"frost"``: ``(3, H, W)`` uint8 pictures of frost, or a folder of them
            such as that of the package ``imagecorruptions``; by default drawn ones.

    Example:
        >>> images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
        >>> foggy = corrupt(images, "fog", severity=3)
        >>> foggy.shape, foggy.dtype
        (torch.Size([4, 3, 32, 32]), torch.uint8)
        >>> bool((corrupt(images[2:], "fog", 3, first=2) == foggy[2:]).all())
        True
    """
    check_choice(name, severity, seed=seed, first=first)
    check_images(images)
    apply = CORRUPTIONS[name].apply
    if name == "frost" and frost_images is not None:
        apply = partial(apply, pictures=as_pictures(frost_images))
    values = parameters(name, severity, *images.shape[2:])
    place = images.device if device is None else torch.device(device)
    # float64 keeps TF32 and the order of sums out of the levels; Apple's GPUs have none.
    precision = torch.float32 if place.type == "mps" else torch.float64
    damaged = torch.empty_like(images, device=place)
    at_once = max(1, _AT_ONCE // max(1, images[:1].numel()))
    for begin in range(0, len(images), at_once):
        part = images[begin : begin + at_once]
        pixels = part.to(place).to(precision) / 255
        indices = range(first + begin, first + begin + len(part))
        damage = apply(pixels, Dice(seed, name, severity, indices, pixels), *values)
        damaged[begin : begin + len(part)] = cut(damage).to(torch.uint8)
    return damaged


def check_choice(name: str, severity: int = 1, **counts: int) -> None:
    """Whether there is such a corruption; ``counts`` must not be negative."""
    if name not in CORRUPTIONS:
        raise ValueError(f"there is no corruption {name!r}; there are {', '.join(CORRUPTIONS)}.")
    whole = isinstance(severity, Integral) and not isinstance(severity, bool)
    if not whole or severity not in SEVERITIES:
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}.")
    for word, value in counts.items():
        check_count(word, value, 0)


def check_images(images: Any) -> None:
    """Whether they are 8-bit images."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"images must be a uint8 tensor of levels 0..255, got {kind}; turn pixels in [0, 1] "
            "into levels with (255 * images).round().to(torch.uint8)."
        )
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise ValueError(
            f"images must be (N, C, H, W) with 1 or 3 channels, got {tuple(images.shape)}."
        )


def as_pictures(source: FrostImages) -> Sequence[Tensor]:
    """Pictures of frost, loaded where they are a folder."""
    if isinstance(source, (str, Path)):
        return load_pictures(source)
    if len(source) == 0:
        raise ValueError("frost_images is empty; give a picture, or None for the drawn ones.")
    for picture in source:
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise ValueError(
                f"a picture of frost must be (3, H, W) uint8, got {tuple(picture.shape)} "
                f"{picture.dtype}."
            )
    return source
