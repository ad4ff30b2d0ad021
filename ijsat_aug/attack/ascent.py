"""The loop: variables -> image -> model -> loss -> gradient -> step -> project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .balls import Ball
from .objectives import Objective

__all__ = ["Ascent", "Deferred", "Landscape", "Picture", "Pixels", "Values", "Variable", "ascend"]

Values = Mapping[str, Tensor]


class Picture(Protocol):
    """Images as a differentiable function of named variables.

    Example:
        >>> class Shifted:
        ...     def __init__(self, x):
        ...         self.x = x
        ...     def __call__(self, values):
        ...         return self.x + values["shift"]
        ...     def take(self, index):
        ...         return Shifted(self.x[index])
        >>> picture: Picture = Shifted(torch.zeros(2, 3, 4, 4))
        >>> picture({"shift": torch.ones(2, 1, 1, 1)}).unique()
        tensor([1.])
    """

    def __call__(self, values: Values) -> Tensor:
        """``(B, C, H, W)``."""

    def take(self, index: Tensor) -> Picture:
        """The same function for some samples."""


class Pixels:
    """The picture whose only variable, ``"pixel"``, is the image itself.

    Example:
        >>> x = torch.rand(2, 3, 4, 4)
        >>> Pixels()({"pixel": x}) is x
        True
    """

    def __call__(self, values: Values) -> Tensor:
        """The image."""
        return values["pixel"]

    def take(self, index: Tensor) -> Pixels:
        """The same: there is nothing of the samples in it."""
        return self


@dataclass(frozen=True, eq=False)
class Variable:
    """What climbs: its start, the ball that it may not leave, and its steps.

    Example:
        >>> from ijsat_aug.attack import LinfBall
        >>> ball = LinfBall(torch.zeros(2, 3), radius=0.1)
        >>> Variable(ball.centre, ball, step_size=0.05, moves=(True, False)).moves
        (True, False)
    """

    start: Tensor
    ball: Ball
    step_size: float
    moves: tuple[bool, ...]

    def take(self, index: Tensor) -> Variable:
        """The same for some samples."""
        return replace(self, start=self.start[index], ball=self.ball.take(index))


@dataclass(frozen=True)
class Deferred:
    """A target that the first logits tell, such as the model's own prediction.

    Example:
        >>> Deferred(lambda logits: logits.argmax(1)).find(torch.tensor([[1.0, 2.0]]))
        tensor([1])
    """

    find: Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Landscape:
    """What is climbed: the loss of a model at a picture of the variables.

    A deferred target is found once, from the first logits.

    Example:
        >>> from ijsat_aug.attack import cross_entropy
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> own = Deferred(lambda logits: logits.argmax(1))
        >>> land = Landscape(Pixels(), model, cross_entropy, target=own)
        >>> losses, logits = land.losses(torch.rand(3, 1, 2, 2), {})
        >>> bool((land.target == logits.argmax(1)).all())
        True
    """

    picture: Picture
    model: Callable[[Tensor], Tensor]
    objective: Objective
    target: Any
    descend: bool = False

    def losses(self, image: Tensor, values: Values) -> tuple[Tensor, Tensor]:
        """Per-sample losses (higher is where the attack goes) and logits."""
        logits = self.model(image)
        losses = self.objective(logits, self.goal(logits, values))
        if losses.shape != image.shape[:1]:
            raise ValueError(
                f"the objective returned shape {tuple(losses.shape)} for {len(image)} images; it "
                "must return one loss a sample."
            )
        return (-losses if self.descend else losses), logits

    def goal(self, logits: Tensor, values: Values) -> Tensor:
        """What the logits are compared with."""
        if isinstance(self.target, Deferred):
            self.target = self.target.find(logits.detach())
        return self.target  # type: ignore[no-any-return]

    def reached(self, logits: Tensor) -> Tensor:
        """Which samples are where the attack wants them."""
        target = self.target
        if logits.ndim != 2 or not isinstance(target, Tensor) or target.ndim > 2:
            raise ValueError(
                "tau asks whether a class is wrong: it needs logits (B, C) and labels."
            )
        classes = target if target.ndim == 1 else target.argmax(1)
        return (logits.argmax(1) == classes) == self.descend

    def take(self, index: Tensor) -> Landscape:
        """The same for some samples."""
        target = self.target[index] if isinstance(self.target, Tensor) else self.target
        return replace(self, picture=self.picture.take(index), target=target)


@dataclass(frozen=True, eq=False)
class Ascent:
    """Where an ascent came out.

    Attributes:
        image: ``(B, C, H, W)``.
        values: The variables there.
        first: ``(B,)`` losses at the start.
        last: ``(B,)`` losses of the last image that the model saw; with ``best``, of ``image``.
        finite: ``(B,)`` whether the image, the losses and every gradient were finite; with
            ``best``, whether the image and its own loss are.

    Example:
        >>> zeros = torch.zeros(2)
        >>> found = Ascent(torch.rand(2, 3, 4, 4), {}, zeros, zeros + 1, zeros == 0)
        >>> (found.last - found.first)[found.finite]
        tensor([1., 1.])
    """

    image: Tensor
    values: Values
    first: Tensor
    last: Tensor
    finite: Tensor


class Sight(NamedTuple):
    """What the model made of some values."""

    values: Values
    image: Tensor
    losses: Tensor
    logits: Tensor


def ascend(
    landscape: Landscape, variables: Mapping[str, Variable], *, best: bool = False
) -> Ascent:
    """Move the variables uphill; a step is one forward and one backward pass of the model.

    Args:
        landscape: What is climbed.
        variables: What moves, by name.
        best: Return the worst image of each sample that the model saw. The last one is then shown
            to it as well, which costs one forward pass more.

    Example:
        >>> from ijsat_aug.attack import LinfBall, Pixels, cross_entropy
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
        >>> pixels = Variable(x, LinfBall(x, 0.1, box=(0, 1)), step_size=0.05, moves=(True,) * 4)
        >>> found = ascend(Landscape(Pixels(), model, cross_entropy, y), {"pixel": pixels})
        >>> bool((found.last > found.first).all())
        True
    """
    values = begin(variables)
    first = worst = sight = None
    doubt: Tensor | None = None
    for step in range(count_steps(variables)):
        sight = look(landscape, values)
        first = first if first is not None else sight.losses.detach()
        worst = _worse(worst, sight) if best else None
        values, suspect = move(variables, sight, step)
        doubt = suspect if doubt is None else doubt + suspect
    assert sight is not None
    assert first is not None
    assert doubt is not None
    with torch.no_grad():
        if worst is None:
            return finish(landscape.picture(values), values, first, sight.losses, doubt)
        worst = _worse(worst, look(landscape, values))
        return finish(worst.image, worst.values, first, worst.losses, None)


def begin(variables: Mapping[str, Variable]) -> Values:
    """The values at the start, as leaves of their own."""
    return {n: v.start.detach().requires_grad_(any(v.moves)) for n, v in variables.items()}


def count_steps(variables: Mapping[str, Variable]) -> int:
    """The number of steps."""
    return max(len(v.moves) for v in variables.values())


def look(landscape: Landscape, values: Values) -> Sight:
    """Show the model the picture of these values."""
    image = landscape.picture(values)
    return Sight(values, image, *landscape.losses(image, values))


def move(variables: Mapping[str, Variable], sight: Sight, step: int) -> tuple[Values, Tensor]:
    """The values after a step, and a number for each sample that is finite if its gradients are."""
    moving = [name for name, v in variables.items() if v.moves[step]]
    ones = torch.ones_like(sight.losses)  # the sum: no sample weakens another's gradient
    if not sight.losses.requires_grad:
        raise ValueError(
            "the loss has no gradient: the model runs under no_grad, or detaches its input."
        )
    gradients = torch.autograd.grad(sight.losses, [sight.values[n] for n in moving], ones)
    values = dict(sight.values)
    with torch.no_grad():
        for name, gradient in zip(moving, gradients, strict=True):
            variable = variables[name]
            values[name] = variable.ball.step(values[name], gradient, variable.step_size)
    # The sign of NaN is 0, so that only the gradient itself shows it.
    doubts = [gradient.sum(tuple(range(1, gradient.ndim))) for gradient in gradients]
    for name, value in values.items():  # who rests from now on needs no tape
        value.requires_grad_(any(variables[name].moves[step + 1 :]))
    return values, sum(doubts[1:], doubts[0])


def select(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """``yes`` for the samples in ``mask``, ``no`` for the others."""
    return torch.where(mask.reshape(-1, *(1,) * (no.ndim - 1)), yes, no)


def finish(
    image: Tensor, values: Values, first: Tensor, last: Tensor, doubt: Tensor | None
) -> Ascent:
    """The outcome, without graph; no doubt is where the loss of the image itself tells enough."""
    sound = last if doubt is None else doubt + first + last
    # Of pixels in [0, 1] the sum tells, in a tenth of the time.
    finite = image.sum(tuple(range(1, image.ndim))).isfinite() & sound.isfinite()
    values = {name: value.detach() for name, value in values.items()}
    return Ascent(image.detach(), values, first.detach(), last.detach(), finite)


def _worse(worst: Sight | None, sight: Sight) -> Sight:
    if worst is None:
        return sight
    worse = (sight.losses > worst.losses) | worst.losses.isnan()
    with torch.no_grad():
        values = {n: select(worse, new, worst.values[n]) for n, new in sight.values.items()}
        image = select(worse, sight.image, worst.image)
        return Sight(values, image, select(worse, sight.losses, worst.losses), sight.logits)
