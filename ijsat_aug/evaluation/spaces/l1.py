"""The L1 ball: few entries move far."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...attack.balls import Draw

__all__ = ["L1Ball", "unit_l1_ball"]


@dataclass(frozen=True, eq=False)
class L1Ball:
    """Every sample within L1 distance ``radius`` of its centre.

    Attributes:
        centre: ``(B, ...)``.
        radius: Of the ball.
        box: Lowest and highest value of every entry.
        stride: How far an entry moves in a step at most. Otherwise a step without a box would move
            a single entry, which a network hardly feels.

    Example:
        >>> ball = L1Ball(torch.zeros(1, 3), 2.0, box=(-1.5, 1.5))
        >>> ball.project(torch.tensor([[3.0, -1.0, 0.5]]))
        tensor([[1.5000, 0.0000, 0.0000]])
        >>> ball.step(ball.centre, torch.tensor([[0.1, -0.3, 0.2]]), size=2.0)
        tensor([[ 0.0000, -1.5000,  0.5000]])
    """

    centre: Tensor
    radius: float
    box: tuple[float, float] | None = None
    stride: float = math.inf

    def step(self, value: Tensor, gradient: Tensor, size: float) -> Tensor:
        """The steepest step of length ``size``, projected.

        It is spent on the largest gradient entries in turn, each as far as stride and box allow.
        """
        sign = gradient.sign().flatten(1)
        order = gradient.flatten(1).abs().argsort(1, descending=True)
        room = self._room(value.flatten(1), sign).clamp(0, min(size, self.stride)).gather(1, order)
        before = room.cumsum(1) - room
        way = torch.minimum((size - before).clamp(min=0), room)
        moved = torch.zeros_like(sign).scatter(1, order, way) * sign
        return self.project(value + moved.reshape(value.shape))

    def _room(self, value: Tensor, sign: Tensor) -> Tensor:
        if self.box is None:
            return torch.full_like(value, math.inf)
        low, high = self.box
        return torch.where(sign > 0, high - value, value - low)

    def project(self, value: Tensor) -> Tensor:
        """The nearest point of the ball, then of the box.

        The nearest point shrinks all entries by as much (Duchi et al., 2008); the centre lies in
        the box, so that clamping only comes nearer to it.
        """
        away = value - self.centre
        size = away.flatten(1).abs()
        largest = size.sort(1, descending=True).values
        count = torch.arange(1, size.shape[1] + 1, device=size.device)
        excess = largest.cumsum(1) - self.radius
        kept = (largest * count > excess).sum(1, keepdim=True).clamp(min=1)
        shrink = (excess.gather(1, kept - 1) / kept).clamp(min=0)
        near = (away.flatten(1).sign() * (size - shrink).clamp(min=0)).reshape(value.shape)
        inside = self.centre + near
        return inside if self.box is None else inside.clamp_(*self.box)

    def distance(self, value: Tensor) -> Tensor:
        """The sum of the absolute differences of each sample."""
        return (value - self.centre).abs().flatten(1).sum(1)

    def take(self, index: Tensor) -> L1Ball:
        """The balls of some samples."""
        return replace(self, centre=self.centre[index])


def unit_l1_ball(shape: tuple[int, ...], uniform: Draw) -> Tensor:
    """A uniformly distributed point of the unit L1 ball of each sample.

    Exponential lengths over their sum and one more (Barthe et al., 2005), with random signs.

    Example:
        >>> unit_l1_ball((4, 3), torch.rand).abs().sum(1).max() < 1
        tensor(True)
    """
    entries = torch.Size(shape[1:]).numel()
    lengths = -(1 - uniform((shape[0], entries + 1))).log()
    signs = 2 * (uniform(shape) < 0.5).to(lengths.dtype) - 1
    return signs * (lengths[:, 1:] / lengths.sum(1, keepdim=True)).reshape(shape)
