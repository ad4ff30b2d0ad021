"""Pictures of frost: drawn feathers of ice, or photographs from a folder."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .filters import gaussian

__all__ = ["ice_pictures", "load_pictures"]

_SIDE = 512
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Pane(NamedTuple):
    """A window: how its ice looks."""

    feathers: int
    length: int
    width: float
    spacing: float
    contrast: float
    colour: tuple[int, int, int]


# Colours and contrasts of the order of the five photographs that the original draws from.
_PANES = (
    Pane(770, 110, 0.3, 2, 14, (95, 140, 155)),
    Pane(1600, 90, 0.15, 1.5, 18, (200, 205, 214)),
    Pane(1600, 60, 0.3, 1.5, 18, (190, 200, 212)),
    Pane(2560, 35, 0.35, 1.3, 27, (138, 153, 165)),
    Pane(770, 80, 0.3, 1.5, 38, (112, 123, 135)),
)


@lru_cache(maxsize=1)
def ice_pictures() -> tuple[Tensor, ...]:
    """Five drawn pictures of frost on a window, ``(3, 512, 512)`` uint8, always the same.

    Example:
        >>> pictures = ice_pictures()
        >>> len(pictures), pictures[0].shape, pictures[0].dtype
        (5, torch.Size([3, 512, 512]), torch.uint8)
    """
    return tuple(_draw(pane, np.random.default_rng(i)) for i, pane in enumerate(_PANES))


def load_pictures(folder: str | Path) -> tuple[Tensor, ...]:
    """All pictures of a folder, in the order of their names, as ``(3, H, W)`` uint8.

    Of the six that the original comes with the first five, from which it draws.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (6, 4)).save(Path(folder, "frost1.png"))
        ...     [picture.shape for picture in load_pictures(folder)]
        [torch.Size([3, 4, 6])]
    """
    from PIL import Image

    files = sorted(f for f in Path(folder).expanduser().iterdir() if f.suffix.lower() in _SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no picture of frost ({', '.join(sorted(_SUFFIXES))}).")
    if [f.stem for f in files] == [f"frost{i}" for i in range(1, 7)]:
        files.pop()  # the original has six and draws from five
    pictures = []
    for file in files:
        with Image.open(file) as picture:
            pictures.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    return tuple(pictures)


def _draw(pane: Pane, rng: np.random.Generator) -> Tensor:
    """Feathers, each above those before it; blurred a little, and brighter here than there."""
    canvas = np.zeros((_SIDE, _SIDE))
    for _ in range(pane.feathers):
        y, x, light = _feather(pane, rng)
        canvas[y % _SIDE, x % _SIDE] = light
    ice = torch.from_numpy(canvas)
    ice = gaussian(ice, 0.7) - gaussian(ice, 40.0)
    clouds = gaussian(torch.from_numpy(rng.standard_normal((_SIDE, _SIDE))), 40.0, "symmetric")
    ice = ice / ice.std() + 0.5 * clouds / clouds.std()
    colour = torch.from_numpy(np.array(pane.colour, dtype=float)).view(3, 1, 1)
    return (colour + pane.contrast * ice / ice.std()).clamp(0, 255).round().to(torch.uint8)


def _feather(
    pane: Pane, rng: np.random.Generator
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """A stem with uneven barbs at 60 degrees, shorter towards its tip, darker at their ends."""
    root, heading = rng.uniform(0, _SIDE, 2), rng.uniform(0, 2 * np.pi)
    length = pane.length * rng.uniform(0.4, 1.4)
    barbs = round(length / pane.spacing)
    stem = np.linspace(0, 1, barbs)[:, None, None]
    side = np.array([-1, 1])[:, None]
    along = np.linspace(0, 1, round(length * pane.width) + 2)
    reach = pane.width * (1 - stem) * rng.uniform(0.3, 1, (barbs, 2, 1)) * along
    y, x = (
        start + length * (stem * turn(heading) + reach * turn(heading + side * np.pi / 3))
        for start, turn in zip(root, (np.sin, np.cos), strict=True)
    )
    light = rng.uniform(0.3, 1, (barbs, 2, 1)) * (1 - 0.7 * along) * rng.uniform(0.4, 1)
    return np.floor(y).astype(int), np.floor(x).astype(int), light
