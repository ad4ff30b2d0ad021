"""The ascent on samples that lose their loss or a gradient on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ijsat_aug.attack import LinfBall
from ijsat_aug.attack.ascent import Ascent, Landscape, Pixels, Values, Variable, ascend
from ijsat_aug.attack.friendly import ascend_friendly

X, CLASSES = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2).long()


class Lossy:
    """The sum of the logits, with a term for each call."""

    def __init__(self, *terms: float) -> None:
        self.terms = list(terms)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        return logits.sum(1) + self.terms.pop(0)


def climbed(objective: Lossy, steps: int, best: bool = False) -> Ascent:
    pixels = Variable(X, LinfBall(X, 0.1), step_size=0.1, moves=(True,) * steps)
    landscape = Landscape(Pixels(), lambda image: image.flatten(1), objective, CLASSES)
    return ascend(landscape, {"pixel": pixels}, best=best)


def test_a_start_without_a_loss_is_never_the_worst() -> None:
    found = climbed(Lossy(torch.nan, 0.0), 1, best=True)
    assert found.finite.all()
    assert (found.image == 0.6).all()


def test_a_start_whose_loss_is_no_number_is_told() -> None:
    assert not climbed(Lossy(torch.nan, 0.0), 2).finite.any()
    assert climbed(Lossy(0.0, 0.0), 2).finite.all()


class LostAtFirst(torch.autograd.Function):
    """The identity, whose first gradient is no number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, calls: list[int]) -> Tensor:
        ctx.calls = calls
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.calls.append(1)
        return (g * torch.nan if len(ctx.calls) == 1 else g), None


class Sum:
    """Two variables, the second without a finite gradient in the first step."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, values: dict[str, Tensor]) -> Tensor:
        return values["one"] + LostAtFirst.apply(values["two"], self.calls)

    def take(self, index: Tensor) -> Sum:
        return self


def climb_of_two(steps: int) -> tuple[Landscape, dict[str, Variable]]:
    landscape = Landscape(Sum(), lambda image: image.flatten(1), lambda z, t: z.sum(1), CLASSES)
    moves = (True,) * steps
    return landscape, {name: Variable(X, LinfBall(X, 0.1), 0.1, moves) for name in ("one", "two")}


@pytest.mark.parametrize("steps", [1, 2])
def test_every_gradient_of_every_step_counts(steps) -> None:
    assert not ascend(*climb_of_two(steps)).finite.any()


def test_gradients_of_earlier_steps_count_in_a_friendly_ascent() -> None:
    assert not ascend_friendly(*climb_of_two(2), patience=9).finite.any()


def test_the_values_of_the_worst_are_those_of_its_image() -> None:
    found = climbed(Lossy(9.0, 0.0, 0.0), 2, best=True)
    assert torch.equal(found.image, X)
    assert torch.equal(found.values["pixel"], X)


class LostAtLast(Pixels):
    """Pixels, of which one sample is no number where no gradient is asked for."""

    def __call__(self, values: Values) -> Tensor:
        lost = torch.tensor([0.0, 0.0 if torch.is_grad_enabled() else torch.nan])
        return values["pixel"] + lost.reshape(2, 1, 1, 1)


def test_a_last_image_that_is_no_number_is_told() -> None:
    pixels = {"pixel": Variable(X, LinfBall(X, 0.1), 0.1, (True, True))}
    land = Landscape(LostAtLast(), lambda image: image.flatten(1), lambda z, t: z.sum(1), CLASSES)
    assert ascend(land, pixels).finite.tolist() == [True, False]


def test_a_friendly_ascent_tells_its_losses() -> None:
    pixels = {"pixel": Variable(X, LinfBall(X, 0.1), 0.05, (True, True))}
    land = Landscape(Pixels(), lambda image: image.flatten(1), lambda z, t: z.sum(1), CLASSES)
    plain, friendly = ascend(land, pixels), ascend_friendly(land, pixels, patience=9)
    assert torch.equal(friendly.first, plain.first)
    assert torch.equal(friendly.last, plain.last)


def test_a_gradient_that_is_lost_is_that_of_its_own_sample() -> None:
    """The first of three rests at once, so that the others have other places from then on."""
    x = X[:1].expand(3, -1, -1, -1)

    def model(image: Tensor) -> Tensor:
        image = image + 0
        if len(image) == 3:
            weights = torch.tensor([1.0, torch.nan, 1.0]).reshape(3, 1, 1, 1)
            image.register_hook(lambda gradient: gradient * weights)
        return image.flatten(1)

    land = Landscape(Pixels(), model, lambda z, t: z.sum(1), torch.tensor([1, 0, 0]))
    pixels = {"pixel": Variable(x, LinfBall(x, 0.1), 0.05, (True, True))}
    assert ascend_friendly(land, pixels, patience=0).finite.tolist() == [True, False, True]


def test_patience_counts_on_where_others_rest() -> None:
    """Wrong above 0.6: one sample from the start, one from the second step, one never."""
    x = torch.tensor([0.7, 0.55, 0.0]).reshape(3, 1, 1, 1)

    def model(image: Tensor) -> Tensor:
        level = image.flatten(1)
        return torch.cat([torch.full_like(level, 0.6), level], 1)

    land = Landscape(Pixels(), model, lambda z, t: z.sum(1), torch.zeros(3).long())
    pixels = {"pixel": Variable(x, LinfBall(x, 1.0), 0.1, (True,) * 4)}
    found = ascend_friendly(land, pixels, patience=1)
    assert torch.allclose(found.image.flatten(), torch.tensor([0.8, 0.75, 0.4]))
