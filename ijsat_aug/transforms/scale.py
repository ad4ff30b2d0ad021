"""Pixels in [0, 1] and what the batch holds instead: mean and std of a normalisation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..attack.model import in_full

__all__ = ["Scale"]

# Un-normalising leaves [0, 1] by rounding, that of the batch's own precision where it is low;
# anything more is a batch in other units.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Scale:
    """The normalisation ``(pixels - mean) / std`` of a batch; without one it holds pixels.

    Example:
        >>> scale = Scale.of(mean=[0.5], std=[0.25])
        >>> batch = scale.to_model(torch.full((1, 3, 2, 2), 0.75))
        >>> batch.unique(), scale.to_pixels(batch).unique()
        (tensor([1.]), tensor([0.7500]))
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, mean: Sequence[float] | float | None, std: Sequence[float] | float | None) -> Scale:
        """From what torchvision's ``Normalize`` takes."""
        if (mean is None) != (std is None):
            raise ValueError("mean and std belong together; give both or none of them.")
        if mean is None or std is None:
            return cls()
        means, stds = _floats(mean), _floats(std)
        if len(means) != len(stds):
            raise ValueError(f"mean has {len(means)} values and std {len(stds)}; one a channel.")
        if not all(s > 0 for s in stds):
            raise ValueError(f"every std must be > 0, got {stds}.")
        if not all(map(math.isfinite, (*means, *stds))):
            raise ValueError(f"mean and std must be finite, got {means} and {stds}.")
        if not all(0 <= m <= 1 for m in means) or max(stds) > 1:
            raise ValueError(
                f"mean and std are those of pixels in [0, 1], got {means} and {stds}: divide those "
                "of 8-bit levels by 255."
            )
        return cls(means, stds)

    def agrees(self, other: Scale) -> bool:
        """Whether a batch may be of both.

        Example:
            >>> one = Scale.of(0.5, 0.25)
            >>> one.agrees(Scale.of([0.5] * 3, [0.25] * 3)), one.agrees(Scale.of(0.4, 0.25))
            (True, False)
        """
        pairs = ((self.mean, other.mean), (self.std, other.std))
        return all(v is None or w is None or _wide(v, w) == _wide(w, v) for v, w in pairs)

    def check(self, images: Tensor, *, values: bool) -> None:
        """Whether the batch is what this scale says; ``values`` costs a host sync."""
        channels = images.shape[1]
        if self.mean is not None and len(self.mean) not in (1, channels):
            raise ValueError(
                f"mean and std have {len(self.mean)} values, the images {channels} channels; give "
                "one value, or one a channel."
            )
        if not values or images.numel() == 0:
            return
        low, high = (float(v) for v in self.to_pixels(images.detach()).aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                "the batch holds NaN or infinite values: look for them where it comes from."
            )
        tolerance = _TOLERANCE + torch.finfo(images.dtype).eps
        if low >= -tolerance and high <= 1 + tolerance:
            self._doubt(images, low)
            return
        if self.mean is None:
            raise ValueError(
                f"the batch has values from {low:.3g} to {high:.3g}, outside [0, 1]: pass the "
                "mean= and std= of its normalisation, divide 8-bit levels by 255, or clamp it."
            )
        raise ValueError(
            f"with this mean and std the batch has pixels from {low:.3g} to {high:.3g}, outside "
            "[0, 1]: pass the mean= and std= that it was normalised with, or leave them out; what "
            "is erased after the normalisation, erase with a constant, not with noise."
        )

    def _doubt(self, images: Tensor, darkest: float) -> None:
        """A word where a batch looks as if nobody had normalised it."""
        if self.mean is None or min(self.mean) == 0:
            return
        if darkest < min(self.mean) - _TOLERANCE:  # of normalised images as a rule
            return
        low, high = (float(v) for v in images.detach().aminmax())
        if low >= 0 and high <= 1:
            warnings.warn(
                "mean and std are given, and the batch lies in [0, 1] as if it were not "
                "normalised, so that moves would be too large: normalise it, or leave them out.",
                stacklevel=2,
            )

    def to_pixels(self, images: Tensor) -> Tensor:
        """The batch in [0, 1]; float32 at least."""
        images = in_full(images)
        if self.mean is None:
            return images
        mean, std = self._tensors(images)
        return torch.addcmul(mean, images, std)

    def to_model(self, pixels: Tensor) -> Tensor:
        """Pixels as the model expects them."""
        if self.mean is None:
            return pixels
        # One operation forth and few back, of constants that are made once.
        assert self.std is not None
        shift = tuple(-m / s for m, s in zip(self.mean, self.std, strict=True))
        inverse = tuple(1 / s for s in self.std)
        place = (pixels.dtype, pixels.device)
        return torch.addcmul(_column(shift, *place), pixels, _column(inverse, *place))

    def to_pixel_gradient(self, gradient: Tensor) -> Tensor:
        """A gradient with respect to the batch as one with respect to its pixels."""
        return gradient if self.std is None else gradient / self._tensors(gradient)[1]

    def moved(self, images: Tensor, pixels: Tensor, new: Tensor) -> Tensor:
        """The batch ``images`` with pixels ``new`` in place of ``pixels``."""
        if self.mean is not None:  # what did not move stays as it is, bit for bit
            new = images + (new - pixels) / self._tensors(pixels)[1]
        return new.to(images.dtype)

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        assert self.mean is not None
        assert self.std is not None
        return _column(self.mean, like.dtype, like.device), _column(
            self.std, like.dtype, like.device
        )


@lru_cache(maxsize=64)
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device).reshape(1, -1, 1, 1)


def _wide(values: tuple[float, ...], like: tuple[float, ...]) -> tuple[float, ...]:
    return values * len(like) if len(values) == 1 else values


def _floats(values: Sequence[float] | float) -> tuple[float, ...]:
    try:
        return tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist())
    except (TypeError, ValueError):
        raise TypeError(
            f"mean and std are numbers, one or one a channel, got {values!r}."
        ) from None
