"""L-inf and L2 balls, one a sample: where a variable starts, how it steps, where it must stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

__all__ = ["BALLS", "Ball", "Draw", "L2Ball", "LinfBall", "Norm", "unit_ball"]

Norm = Literal["linf", "l2"]
Draw = Callable[[tuple[int, ...]], Tensor]


class Ball(Protocol):
    """A ball around ``centre`` in each sample, cut by ``box`` where there is one.

    Example:
        >>> ball: Ball = LinfBall(torch.zeros(2, 3), 0.5)
        >>> ball.project(torch.full((2, 3), 2.0)).unique()
        tensor([0.5000])
    """

    @property
    def centre(self) -> Tensor:
        """``(B, ...)``."""

    def step(self, value: Tensor, gradient: Tensor, size: float) -> Tensor:
        """The steepest step of length ``size`` uphill, projected."""

    def project(self, value: Tensor) -> Tensor:
        """The nearest point of the ball, then of the box."""

    def distance(self, value: Tensor) -> Tensor:
        """``(B,)`` distances from the centre."""

    def take(self, index: Tensor) -> Ball:
        """The balls of some samples."""


@dataclass(frozen=True, eq=False)
class LinfBall:
    """Every entry within ``radius`` of its centre; the ball and the box are one pair of bounds.

    Example:
        >>> ball = LinfBall(torch.tensor([[0.1, 0.9]]), 0.3, box=(0.0, 1.0))
        >>> ball.step(ball.centre, torch.tensor([[-2.0, 1.0]]), size=1.0)
        tensor([[0., 1.]])
        >>> ball.distance(torch.tensor([[0.1, 0.7]]))
        tensor([0.2000])
    """

    centre: Tensor
    radius: float
    box: tuple[float, float] | None = None

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each entry."""
        low, high = self.centre - self.radius, self.centre + self.radius
        return (low, high) if self.box is None else (low.clamp_(*self.box), high.clamp_(*self.box))

    def step(self, value: Tensor, gradient: Tensor, size: float) -> Tensor:
        """A step of ``size`` along the sign of the gradient, projected."""
        return self.project(torch.add(value, gradient.sign(), alpha=size))

    def project(self, value: Tensor) -> Tensor:
        """Clamp to the bounds."""
        return torch.clamp(value, *self.bounds)

    def distance(self, value: Tensor) -> Tensor:
        """The largest absolute difference of each sample."""
        return (value - self.centre).abs().flatten(1).amax(1)

    def take(self, index: Tensor) -> LinfBall:
        """The balls of some samples."""
        return replace(self, centre=self.centre[index])


@dataclass(frozen=True, eq=False)
class L2Ball:
    """Every sample within Euclidean ``radius`` of its centre.

    Example:
        >>> ball = L2Ball(torch.zeros(1, 2), 1.0)
        >>> ball.step(ball.centre, torch.tensor([[3.0, 4.0]]), size=0.5)
        tensor([[0.3000, 0.4000]])
        >>> ball.distance(ball.project(torch.tensor([[3.0, 4.0]])))
        tensor([1.])
    """

    centre: Tensor
    radius: float
    box: tuple[float, float] | None = None

    def step(self, value: Tensor, gradient: Tensor, size: float) -> Tensor:
        """A step of ``size`` along the normalised gradient, projected."""
        return self.project(torch.add(value, unit(gradient), alpha=size))

    def project(self, value: Tensor) -> Tensor:
        """Scale back to the sphere from outside, then clamp to the box.

        The centre lies in the box, so that clamping only comes nearer to it.
        """
        away = value - self.centre
        least = max(self.radius, torch.finfo(away.dtype).tiny)  # a radius of 1e-50 is 0 in float32
        inside = self.centre + away * (self.radius / _length(away).clamp_(min=least))
        return inside if self.box is None else inside.clamp_(*self.box)

    def distance(self, value: Tensor) -> Tensor:
        """The Euclidean distance of each sample."""
        return _length(value - self.centre).flatten()

    def take(self, index: Tensor) -> L2Ball:
        """The balls of some samples."""
        return replace(self, centre=self.centre[index])


BALLS: dict[str, type[LinfBall] | type[L2Ball]] = {"linf": LinfBall, "l2": L2Ball}


def unit_ball(norm: Norm, shape: tuple[int, ...], uniform: Draw, normal: Draw) -> Tensor:
    """A uniformly distributed point of the unit ball of each sample.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        shape: ``(B, ...)``.
        uniform: Draws from [0, 1), such as ``torch.rand``.
        normal: Draws from a standard normal, such as ``torch.randn``.

    Example:
        >>> unit_ball("l2", (4, 3), torch.rand, torch.randn).norm(dim=1).max() <= 1
        tensor(True)
    """
    if norm == "linf":
        return uniform(shape).mul_(2).sub_(1)
    ones = (1,) * (len(shape) - 1)
    dimensions = torch.Size(shape[1:]).numel()
    radius = uniform((shape[0], *ones)).pow_(1 / dimensions)
    return unit(normal(shape)) * radius


def unit(v: Tensor) -> Tensor:
    """The direction of each sample; zero of a sample that is zero.

    Example:
        >>> unit(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    # A saturated network has gradients near 1e-30, whose squares are all zero: scale them first.
    v = at_full_size(v)
    return v / _length(v).clamp_(min=torch.finfo(v.dtype).tiny)


def at_full_size(v: Tensor) -> Tensor:
    """Each sample with 1 as its largest absolute value; zero of a sample that is zero.

    Example:
        >>> at_full_size(torch.tensor([[1e-30, -4e-30], [0.0, 0.0]]))
        tensor([[ 0.2500, -1.0000],
                [ 0.0000,  0.0000]])
    """
    return v / _length(v, ord=float("inf")).clamp_(min=torch.finfo(v.dtype).tiny)


def _length(v: Tensor, ord: float = 2) -> Tensor:
    if v.ndim == 1:
        return v.abs()
    length: Tensor = torch.linalg.vector_norm(v, ord, tuple(range(1, v.ndim)), keepdim=True)
    return length
