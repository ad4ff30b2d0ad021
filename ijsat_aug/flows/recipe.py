"""How long and how a flow is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Literal

from ..words import check_count, is_between

__all__ = ["Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how a flow is trained; the defaults suit 32-pixel images on a CPU.

    Args:
        epochs: Passes over the training images, each without a last batch that is not full. With
            ``minutes`` too, whichever ends first.
        minutes: Time budget of the whole training, also over interruptions.
        batch_size: Images per step, over all processes.
        lr: Peak learning rate, after a linear warm-up and before a cosine to zero.
        optimizer: ``"adamax"`` or ``"adamw"``.
        weight_decay: Decay of the optimizer.
        warmup: Steps of the linear warm-up.
        ema: Decay of the weight average, which is what is validated and saved.
        clip: Largest gradient norm, in bits per dimension.
        flip: Mirror images at random.
        precision: ``"bf16"`` runs the coupling networks, and only them, in bfloat16. CPUs without
            AVX-512 or AMX emulate it, which takes tens of times longer.
        held_out: Share of the images that chooses the best weights; 64 images at least, or a fifth
            of fewer.
        every: Steps between validations; each also writes pictures and a resumable state.
        init_images: Images that initialise ActNorm.
        seed: Of the weights, the order, the noise and the held-out share.
        tensorboard: Write TensorBoard logs to the output folder.

    Example:
        >>> Recipe(minutes=2, batch_size=128).optimizer
        'adamax'
    """

    epochs: float | None = None
    minutes: float | None = None
    batch_size: int = 64
    lr: float = 2e-3
    optimizer: Literal["adamax", "adamw"] = "adamax"
    weight_decay: float = 0.0
    warmup: int = 200
    ema: float = 0.999
    clip: float = 20.0
    flip: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    held_out: float = 0.02
    every: int = 500
    init_images: int = 512
    seed: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.epochs is None and self.minutes is None:
            raise ValueError("say how long to train: epochs=..., minutes=..., or both.")
        for name in ("epochs", "minutes", "lr", "clip"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and float(value) > 0):
                raise ValueError(f"{name} must be greater than 0, got {value!r}.")
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}.")
        if not is_between(self.weight_decay, 0):
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay!r}.")
        for name in ("seed", "warmup"):
            check_count(name, getattr(self, name), 0)
        for name in ("batch_size", "every", "init_images"):
            check_count(name, getattr(self, name), 1)
        for field in fields(self):  # numbers of NumPy are no JSON
            value = getattr(self, field.name)
            if isinstance(value, Real) and not isinstance(value, (int, float)):
                plain = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(self, field.name, plain)
        if self.optimizer not in ("adamax", "adamw"):
            raise ValueError(f'optimizer must be "adamax" or "adamw", got {self.optimizer!r}.')
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f'precision must be "fp32" or "bf16", got {self.precision!r}.')
        if not (isinstance(self.held_out, Real) and 0 < self.held_out < 1):
            raise ValueError(f"held_out must lie in (0, 1), got {self.held_out!r}.")
        if not (isinstance(self.ema, Real) and 0 <= self.ema < 1):
            raise ValueError(f"ema must lie in [0, 1), got {self.ema!r}.")
