"""Balls: budgets, directions, uniform starts."""

from __future__ import annotations

import math

import pytest
import torch

from ijsat_aug.attack import L2Ball, LinfBall, unit_ball
from ijsat_aug.attack.balls import BALLS


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_unit_ball_is_filled_uniformly(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(kind):
        return lambda shape: kind(shape, generator=generator)

    points = unit_ball(norm, (40_000, 3), draw(torch.rand), draw(torch.randn))
    radius = BALLS[norm](torch.zeros_like(points), 1.0).distance(points)
    assert radius.max() <= 1 + 1e-6
    for r in (0.5, 0.8, 0.95):  # the share of the volume inside r is r^3 in both norms
        assert math.isclose((radius < r).float().mean(), r**3, abs_tol=0.01)
    assert points.mean(0).abs().max() < 0.01


@pytest.mark.parametrize("ball", [LinfBall, L2Ball])
def test_projection_leaves_the_inside_alone(ball) -> None:
    centre = torch.rand(5, 3, 4, 4)
    inside = centre + 0.001 * torch.randn_like(centre)
    assert torch.allclose(ball(centre, 0.5).project(inside), inside, atol=1e-7)


def test_l2_step_has_its_length_and_direction() -> None:
    ball = L2Ball(torch.zeros(4, 3, 8, 8), 10.0)
    g = torch.randn(4, 3, 8, 8)
    step = ball.step(ball.centre, g, 0.5)
    assert torch.allclose(ball.distance(step), torch.full((4,), 0.5), atol=1e-6)
    cosine = torch.nn.functional.cosine_similarity(step.flatten(1), g.flatten(1))
    assert torch.allclose(cosine, torch.ones(4), atol=1e-6)


@pytest.mark.parametrize("size", [1e-12, 1e-25, 1e-37])
def test_tiny_gradients_still_move(size: float) -> None:
    """A saturated network: the squares of its gradients are all zero in float32."""
    ball = L2Ball(torch.zeros(2, 12), 1.0)
    g = size * torch.randn(2, 12)
    assert torch.allclose(
        ball.distance(ball.step(ball.centre, g, 0.5)), torch.full((2,), 0.5), atol=1e-4
    )


@pytest.mark.parametrize("ball", [LinfBall, L2Ball])
def test_zero_gradient_does_not_move(ball) -> None:
    centre = torch.rand(2, 5)
    assert torch.equal(ball(centre, 0.5).step(centre, torch.zeros(2, 5), 0.2), centre)


@pytest.mark.parametrize("ball", [LinfBall, L2Ball])
def test_box_and_ball_hold_together(ball) -> None:
    centre = torch.rand(6, 3, 4, 4)
    far = centre + torch.randn_like(centre)
    b = ball(centre, 0.3, (0.0, 1.0))
    point = b.project(far)
    assert point.min() >= 0
    assert point.max() <= 1
    assert b.distance(point).max() <= 0.3 + 1e-6
    index = torch.tensor([4, 1])
    assert torch.equal(b.take(index).project(far[index]), point[index])
