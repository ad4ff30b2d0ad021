"""The joint-space threat model: budgets, norms, and who moves when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..attack.balls import BALLS, Norm
from ..attack.objectives import OBJECTIVES, Objective
from ..words import check_count, is_between
from .labels import Rows
from .settings import check_choices, usual_step

__all__ = ["Method", "Threat", "Update"]

Update = Literal["joint", "alternating", "sequential"]
Method = Literal["exact", "linear"]


@dataclass(frozen=True, kw_only=True)
class Threat:
    """How far a pixel perturbation ``delta`` and a latent move ``lambda`` may go, and how.

    Attributes:
        eps: Radius of ``delta``, in pixel units: 1.0 is from black to white.
        eta: Radius of ``lambda``, in standard deviations of the latents.
        norm: ``"linf"`` or ``"l2"``, of ``delta``.
        latent_norm: The same of ``lambda``.
        steps: Forward and backward passes of the model.
        step_size: Of ``delta``; by default 2.5 ``eps`` / its moves, 1.25 ``eps`` at most.
        latent_step_size: Of ``lambda``; by default the same share of ``eta``.
        update: ``"joint"`` moves both from one backward pass, ``"alternating"`` them in turn,
            ``"sequential"`` first ``lambda``, then ``delta``.
        latent_steps: In how many of the steps ``lambda`` moves: by default in all of a joint
            ascent, in half of the others. The flow is not called in the other steps.
        method: ``"exact"`` goes through the decoder in every step that moves ``lambda``.
            ``"linear"`` moves it once, along the gradient at the clean latent that the tape of
            ``encode`` gives, and then decodes once.
        objective: ``"ce"``, ``"bce"``, ``"kl"``, ``"margin"``, or a callable
            ``(logits, target) -> (B,)``.
        targeted: The target is where the attack wants to go, not where it comes from.
        best: Keep the worst image of each sample that the model saw (one more forward pass).
        tau: Friendly stop: leave a sample alone that was wrong more than ``tau`` times.

    Example:
        >>> threat = Threat(eps=8 / 255, eta=0.02, steps=4, update="alternating")
        >>> threat.latent_moves, threat.pixel_moves
        ((True, False, True, False), (False, True, False, True))
        >>> round(threat.pixel_step * 255, 2)
        10.0
    """

    eps: float = 0.0
    eta: float = 0.0
    norm: Norm = "linf"
    latent_norm: Norm = "linf"
    steps: int = 1
    step_size: float | None = None
    latent_step_size: float | None = None
    update: Update = "joint"
    latent_steps: int | None = None
    method: Method = "exact"
    objective: str | Objective = "ce"
    targeted: bool = False
    best: bool = False
    tau: int | None = None

    def __post_init__(self) -> None:
        for name in ("eps", "eta", "step_size", "latent_step_size"):
            value = getattr(self, name)
            optional = name.endswith("step_size")
            if value is None and optional:
                continue
            if not is_between(value, 0):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}.")
        if self.eps > 1 and self.norm == "linf":
            raise ValueError(
                f"eps={self.eps} is wider than the whole range of pixels; it counts in [0, 1], so "
                f"write {self.eps:g}/255 if you meant 8-bit levels."
            )
        check_choices(self, _CHOICES)
        if self.norm == "l2" and self.eps == 1 / 255:
            raise ValueError(
                "eps=1/255, the default, is meant for L-inf; in L2 no pixel moves by more than one "
                "level: give a radius, such as eps=0.5."
            )
        if not callable(self.objective) and self.objective not in OBJECTIVES:
            choices = ", ".join(f'"{name}"' for name in OBJECTIVES)
            raise ValueError(
                f"objective must be one of {choices} or a callable (logits, target) -> per-sample "
                f"losses; got {self.objective!r}."
            )
        if self.targeted and self.objective == "kl":
            raise ValueError(
                'objective="kl" leaves the model\'s own prediction, whatever the labels are: '
                'targeted=True needs another, such as "ce".'
            )
        check_count("steps", self.steps, 0)
        if self.tau is not None:
            check_count("tau", self.tau, 0)
            if self.objective == "bce":
                raise ValueError(
                    'tau asks whether a class is wrong, and objective="bce" has several.'
                )
            if self.best:
                raise ValueError(
                    "best and tau exclude each other: keep the worst image, or stop at the first "
                    "wrong one."
                )
        self._check_latent_steps()
        for name, moves in (("delta", self.moves_pixels), ("lambda", self.moves_latent)):
            moved = self.pixel_moves if name == "delta" else self.latent_moves
            if moves and self.steps and not any(moved):
                raise ValueError(
                    f'update="{self.update}" never moves {name} in steps={self.steps}: give it '
                    "more steps, or no budget."
                )
        latent_alone = self.moves_latent and not self.moves_pixels
        if self.method == "linear" and latent_alone and self.steps > 1:
            raise ValueError('method="linear" moves lambda once: with eps=0, set steps=1.')

    def _check_latent_steps(self) -> None:
        if self.latent_steps is None:
            return
        check_count("latent_steps", self.latent_steps, 1)
        if self.latent_steps > self.steps:
            raise ValueError(
                f"latent_steps={self.latent_steps} is more than steps={self.steps}; it says in how "
                "many of them lambda moves."
            )
        if self.method == "linear" and self.latent_steps != 1:
            raise ValueError('method="linear" moves lambda once; leave latent_steps out.')
        if self.moves_latent and not self.moves_pixels and self.latent_steps != self.steps:
            raise ValueError("with eps=0 nothing moves in the other steps; leave latent_steps out.")

    def begins_clean(self, *, pixel: bool, latent: bool) -> bool:
        """Whether the first forward pass is at the clean image; the arguments: random starts."""
        moved = latent and self.moves_latent and self.method == "exact"
        return not (moved or (pixel and self.moves_pixels))

    def check_start(self, *, pixel: bool, latent: bool) -> None:
        """Refuse to climb the KL divergence from its minimum."""
        if self.steps and self.begins_clean(pixel=pixel, latent=latent):
            raise ValueError(
                'objective="kl" needs a random start (with method="linear", of the pixels): at the '
                "clean image its gradient is zero."
            )

    @property
    def moves_pixels(self) -> bool:
        """Whether there is a ``delta``."""
        return self.eps > 0

    @property
    def moves_latent(self) -> bool:
        """Whether there is a ``lambda``, and so any need of a flow."""
        return self.eta > 0

    @property
    def latent_moves(self) -> tuple[bool, ...]:
        """In which steps ``lambda`` moves: spread evenly, or the first ones."""
        if not self.moves_latent:
            return (False,) * self.steps
        count = self._count_latent_steps()
        if self.update == "sequential" or count == 0:
            return tuple(k < count for k in range(self.steps))
        chosen = {math.ceil(i * self.steps / count) for i in range(count)}
        return tuple(k in chosen for k in range(self.steps))

    @property
    def pixel_moves(self) -> tuple[bool, ...]:
        """In which steps ``delta`` moves."""
        if not self.moves_pixels:
            return (False,) * self.steps
        if self.update == "joint" or not self.moves_latent:
            return (True,) * self.steps
        return tuple(not moves for moves in self.latent_moves)

    @property
    def pixel_step(self) -> float:
        """Step size of ``delta``."""
        moves = sum(self.pixel_moves)
        return usual_step(moves) * self.eps if self.step_size is None else self.step_size

    @property
    def latent_step(self) -> float:
        """Step size of ``lambda``."""
        if self.latent_step_size is not None:
            return self.latent_step_size
        return usual_step(sum(self.latent_moves)) * self.eta

    @property
    def rows(self) -> Rows:
        """What the objective takes rows of labels for."""
        if callable(self.objective):
            return "any"
        return "labels" if self.objective == "bce" else "classes"

    @property
    def losses(self) -> Objective:
        """The objective as a function."""
        return self.objective if callable(self.objective) else OBJECTIVES[self.objective]

    def predicted(self, logits: Tensor) -> Tensor:
        """The labels that a model gives, as the objective takes them."""
        return (logits > 0).to(logits.dtype) if self.rows == "labels" else logits.argmax(1)

    def _count_latent_steps(self) -> int:
        if self.latent_steps is not None:
            return self.latent_steps
        if self.method == "linear":
            return min(self.steps, 1)
        if self.update == "joint" or not self.moves_pixels:
            return self.steps
        return math.ceil(self.steps / 2)


_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": tuple(BALLS),
    "latent_norm": tuple(BALLS),
    "update": ("joint", "alternating", "sequential"),
    "method": ("exact", "linear"),
}
