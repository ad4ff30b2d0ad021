"""The friendly ascent: who is fooled goes no further, and the batch becomes smaller."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .ascent import (
    Ascent,
    Landscape,
    Values,
    Variable,
    begin,
    count_steps,
    finish,
    look,
    move,
    select,
)

__all__ = ["ascend_friendly"]


def ascend_friendly(
    landscape: Landscape, variables: Mapping[str, Variable], patience: int
) -> Ascent:
    """Like :func:`ascend`, but a sample rests once the attack has reached its aim often enough.

    A sample that the model gets wrong for the ``patience + 1``-th time stays as it was then (FAT;
    Zhang et al., 2020). Only the others go on through the model, so that the passes become cheaper,
    at the price of one host sync a step and of changing batch sizes.

    Args:
        landscape: What is climbed.
        variables: What moves, by name.
        patience: How often a sample may be wrong and still go on.

    Example:
        >>> from ijsat_aug.attack import LinfBall, Pixels, cross_entropy
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> x = torch.rand(3, 1, 2, 2)
        >>> wrong = model(x).argmin(1)
        >>> pixels = Variable(x, LinfBall(x, 0.1, box=(0, 1)), step_size=0.05, moves=(True,) * 4)
        >>> land = Landscape(Pixels(), model, cross_entropy, wrong)
        >>> bool((ascend_friendly(land, {"pixel": pixels}, patience=0).image == x).all())
        True
    """
    whole, values = landscape, begin(variables)
    index = torch.arange(len(next(iter(values.values()))), device=_device(values))
    strikes = torch.zeros_like(index)
    first: Tensor | None = None
    settled: dict[str, Tensor] = {}
    for step in range(count_steps(variables)):
        sight = look(landscape, values)
        values, doubt = move(variables, sight, step)
        with torch.no_grad():
            strikes = strikes + landscape.reached(sight.logits)
            rests = strikes > patience
            values = {n: _held(rests, sight.values[n], value) for n, value in values.items()}
            news = {**values, "loss": sight.losses, "doubt": doubt}
            if first is None:
                first, settled = sight.losses, {n: v.detach().clone() for n, v in news.items()}
            else:
                news["doubt"] = doubt + settled["doubt"][index]
                settled = {n: v.index_copy(0, index, news[n].detach()) for n, v in settled.items()}
            going = (~rests).nonzero().squeeze(1)
            if len(going) == 0:
                break
            if len(going) < len(index):
                index, strikes, landscape = index[going], strikes[going], landscape.take(going)
                values = {name: value[going] for name, value in values.items()}
                variables = {name: variable.take(going) for name, variable in variables.items()}
        for name, value in values.items():
            value.requires_grad_(any(variables[name].moves[step + 1 :]))
    assert first is not None
    with torch.no_grad():
        values = {name: settled[name] for name in variables}
        image = whole.picture(values)
        return finish(image, values, first, settled["loss"], settled["doubt"])


def _held(rests: Tensor, still: Tensor, moved: Tensor) -> Tensor:
    # What did not move stays the same object, so that its picture need not be drawn again.
    return moved if moved is still else select(rests, still, moved)


def _device(values: Values) -> torch.device:
    return next(iter(values.values())).device
