"""What every space is made of: a picture of its variables, their ball, start and steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...attack.ascent import Picture, Values, Variable
from ...attack.balls import Draw, LinfBall
from ...attack.clip import clip
from ...precision import full_precision
from ...words import is_between
from ..corruptions.severities import LARGE_SIDE

__all__ = ["Drawn", "Space", "SpaceInfo", "check", "linf_variable"]

Space = Callable[[Tensor, float, int, Draw], tuple[Picture, dict[str, Variable]]]
"""``(images, budget, steps, uniform) -> (picture, variables)``, for ``ascend``."""


@dataclass(frozen=True)
class SpaceInfo:
    """A space and how it is usually set.

    Attributes:
        title: For people.
        space: ``(images, budget, steps, uniform) -> (picture, variables)``.
        budget: The default.
        steps: The default, after which more hardly raises the loss.
        reference: Where the threat and its budget come from.
        budgets: From weak to strong, where six were calibrated on CIFAR-10 (UAR: as hard as L-inf
            1, 2, 4, 8, 16 and 32 of 255 levels to a network trained against the same).
        large: The default for images whose shorter side is 128 or more, where it is another: those
            of UAR for ImageNet-100.

    Example:
        >>> from ijsat_aug.evaluation.spaces import SPACES
        >>> SPACES["elastic"].budgets[3] == SPACES["elastic"].budget
        True
    """

    title: str
    space: Space
    budget: float
    steps: int
    reference: str
    budgets: tuple[float, ...] = ()
    large: float | None = None

    def usual(self, shape: Sequence[int]) -> float:
        """The default for images ``(C, H, W)``.

        Example:
            >>> from ijsat_aug.evaluation.spaces import SPACES
            >>> [SPACES["jpeg_l1"].usual((3, side, side)) for side in (32, 224)]
            [256.0, 16384.0]
        """
        if self.large is not None and min(shape[1:]) >= LARGE_SIDE:
            return self.large
        return self.budget


@dataclass(frozen=True, eq=False)
class Drawn:
    """The picture ``clip(draw(values, *facts))``, where facts are tensors ``(B, ...)``.

    It is drawn in float32 even where the model runs under autocast.

    Example:
        >>> picture = Drawn(lambda values, x: x + values["light"], (torch.rand(3, 1, 2, 2),))
        >>> picture.take(torch.tensor([2]))({"light": torch.ones(1, 1, 1, 1)}).unique()
        tensor([1.])
    """

    draw: Callable[..., Tensor]
    facts: tuple[Tensor, ...]

    def __call__(self, values: Values) -> Tensor:
        """``(B, C, H, W)`` in [0, 1]."""
        with full_precision(self.facts[0].device):
            return clip(self.draw(values, *self.facts))

    def take(self, index: Tensor) -> Drawn:
        """The same for some samples."""
        return replace(self, facts=tuple(fact[index] for fact in self.facts))


def linf_variable(centre: Tensor, radius: float, steps: int, uniform: Draw) -> Variable:
    """A variable in an L-inf ball that starts anywhere in it; steps are ``radius / sqrt(steps)``.

    Example:
        >>> variable = linf_variable(torch.zeros(2, 3), 0.5, 25, torch.rand)
        >>> variable.step_size, bool((variable.ball.distance(variable.start) <= 0.5).all())
        (0.1, True)
    """
    ball = LinfBall(centre, radius)
    start = ball.project(centre + radius * (2 * uniform(tuple(centre.shape)) - 1))
    return Variable(start, ball, radius / math.sqrt(steps), (True,) * steps)


def check(images: Tensor, budget: float, steps: int, channels: tuple[int, ...] = ()) -> None:
    """One sentence for whoever passes what no space can use.

    Example:
        >>> check(torch.rand(1, 2, 8, 8), 0.1, 10, channels=(1, 3))
        Traceback (most recent call last):
        ValueError: this space needs images of 1 or 3 channels, got 2.
    """
    if images.ndim != 4 or images.dtype != torch.float32:
        raise ValueError(
            f"a space needs float32 images (B, C, H, W) in [0, 1], got {images.dtype} of shape "
            f"{tuple(images.shape)}."
        )
    if channels and images.shape[1] not in channels:
        known = " or ".join(map(str, channels))
        raise ValueError(f"this space needs images of {known} channels, got {images.shape[1]}.")
    if not is_between(budget, 0):
        raise ValueError(f"budget must be a number >= 0, got {budget}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
