"""One joint-space attack on one batch: everything random or remembered comes in from outside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attack.ascent import (
    Ascent,
    Deferred,
    Landscape,
    Picture,
    Pixels,
    Variable,
    ascend,
    begin,
    finish,
    select,
)
from ..attack.balls import BALLS
from ..attack.friendly import ascend_friendly
from ..attack.model import ModelHandle
from ..flows.manifold import Manifold
from .joint_picture import exact, linear
from .labels import check_logits
from .scale import Scale
from .threat import Threat

__all__ = ["climb", "climb_along", "usable"]

Model = Callable[[Tensor], Tensor]

_SOFTMAX = (
    "the model returns probabilities, of which the objective takes the softmax once more, so that "
    "its gradient is faint: give a model of logits, such as model[:-1] without its nn.Softmax."
)


def climb(
    images: Tensor,
    target: Any,
    handle: ModelHandle,
    flow: Manifold | None,
    threat: Threat,
    scale: Scale,
    *,
    pixel_start: Tensor | None = None,
    latent_start: Tensor | None = None,
    seed: int | None = None,
    careful: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attack a batch: its new images, and what an observer may want to know of them.

    ``careful`` checks values too, which costs a host sync on a GPU.
    """
    starts = (pixel_start if threat.moves_pixels else None,
              latent_start if threat.moves_latent else None)  # fmt: skip
    if starts[1] is not None and threat.method == "linear":
        raise ValueError('method="linear" starts at the clean latent; leave latent_start out.')
    idle = threat.steps == 0 and all(start is None for start in starts)
    if idle or not (threat.moves_pixels or threat.moves_latent) or len(images) == 0:
        return images.detach(), {}
    if threat.tau is not None:
        handle.check_alone("tau=None")
    with handle.frozen(images.device, seed):
        images = usable(images)
        target = usable(target) if isinstance(target, Tensor) else target
        pixels = scale.to_pixels(images).clamp(0, 1)
        if handle.memory_format is not None:
            pixels = pixels.contiguous(memory_format=handle.memory_format)
        model = _checked(lambda image: handle(scale.to_model(image)), target, threat, careful)
        goal = _goal(model, pixels, target, threat, *starts)
        picture, variables = _space(pixels, flow, threat, *starts)
        landscape = Landscape(picture, model, threat.losses, goal, threat.targeted)
        found = _search(landscape, variables, threat)
        facts = _losses(found, threat) | _moves(found, variables)
        return _moved(images, pixels, found, scale), facts


def climb_along(
    images: Tensor,
    gradient: Tensor,
    flow: Manifold | None,
    threat: Threat,
    scale: Scale,
    *,
    pixel_start: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Move a batch one step along a gradient of the loss that somebody else found; no model.

    Args:
        images: The batch, in its own units.
        gradient: Of the loss at (nearly) these images, in the same units; any positive factor is
            without meaning.
        flow: Where it maps the gradient to the latent space.
        threat: Of one step, with ``method="linear"``.
        scale: Of the batch.
        pixel_start: Where the pixel perturbation starts.
    """
    if not (threat.moves_pixels or threat.moves_latent) or len(images) == 0:
        return images.detach(), {}
    with torch.inference_mode(False), torch.enable_grad():
        images = usable(images)
        pixels = scale.to_pixels(images).clamp(0, 1)
        slope = scale.to_pixel_gradient(usable(gradient).to(pixels.dtype))
        picture, variables = _space(pixels, flow, threat, pixel_start, None)
        found = ascend(Landscape(picture, _itself, _along, slope), variables)
        return _moved(images, pixels, found, scale), _moves(found, variables)


def _itself(image: Tensor) -> Tensor:
    return image


def _along(image: Tensor, slope: Tensor) -> Tensor:
    """A loss whose gradient is the slope everywhere."""
    return (image * slope).flatten(1).sum(1)


def usable(tensor: Tensor) -> Tensor:
    """Without graph, and fit for autograd: a tensor of inference mode is not.

    Example:
        >>> with torch.inference_mode():
        ...     x = torch.zeros(2)
        >>> x.is_inference(), usable(x).is_inference()
        (True, False)
    """
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _space(
    pixels: Tensor,
    flow: Manifold | None,
    threat: Threat,
    pixel_start: Tensor | None,
    latent_start: Tensor | None,
) -> tuple[Picture, dict[str, Variable]]:
    """What moves, and the picture of it."""
    pixel_ball = BALLS[threat.norm]
    moves, size = threat.pixel_moves, threat.pixel_step
    if not threat.moves_latent:
        ball = pixel_ball(pixels, threat.eps, (0.0, 1.0))
        start = pixels if pixel_start is None else ball.project(pixels + pixel_start)
        return Pixels(), {"pixel": Variable(start, ball, size, moves)}
    assert flow is not None
    if threat.method == "linear":
        z, picture = linear(flow, pixels)
    else:
        z, picture = exact(flow, pixels, zero_start=latent_start is None)
    latent_ball = BALLS[threat.latent_norm](z, threat.eta)
    start = z if latent_start is None else latent_ball.project(z + latent_start)
    variables = {"latent": Variable(start, latent_ball, threat.latent_step, threat.latent_moves)}
    if threat.moves_pixels:
        nothing = torch.zeros_like(pixels)
        ball = pixel_ball(nothing, threat.eps)
        start = nothing if pixel_start is None else ball.project(nothing + pixel_start)
        variables["pixel"] = Variable(start, ball, size, moves)
    return picture, variables


def _goal(
    model: Model,
    pixels: Tensor,
    target: Any,
    threat: Threat,
    pixel_start: Tensor | None,
    latent_start: Tensor | None,
) -> Any:
    """What the objective compares with: given, or asked of the model."""
    starts = {"pixel": pixel_start is not None, "latent": latent_start is not None}
    if threat.steps == 0:
        return target
    if threat.objective == "kl":
        threat.check_start(**starts)
        with torch.no_grad():
            return model(pixels).log_softmax(1)
    if target is not None:
        return target
    if threat.begins_clean(**starts):
        return Deferred(threat.predicted)
    with torch.no_grad():
        return threat.predicted(model(pixels))


def _search(landscape: Landscape, variables: dict[str, Variable], threat: Threat) -> Ascent:
    if threat.steps == 0:  # nothing but the start, whose loss nobody asked for
        values = begin(variables)
        none = next(iter(values.values())).flatten(1)[:, 0] * 0
        return finish(landscape.picture(values), values, none, none, none)
    if threat.tau is not None:
        return ascend_friendly(landscape, variables, threat.tau)
    return ascend(landscape, variables, best=threat.best)


def _checked(
    model: Model,
    target: Any,
    threat: Threat,
    careful: bool,
) -> Model:
    """The model, whose first logits are compared with what the objective expects of them."""
    unchecked = not callable(threat.objective)
    known = target if isinstance(target, Tensor) else None

    def call(image: Tensor) -> Tensor:
        nonlocal unchecked
        logits = model(image)
        if unchecked:
            least = 1 if threat.rows == "labels" else 2
            check_logits(logits, len(image), known, values=careful, least=least)
            if careful and least == 2 and _are_of_softmax(logits):
                warnings.warn(_SOFTMAX, stacklevel=2)
            unchecked = False
        return logits

    return call


def _are_of_softmax(logits: Tensor) -> bool:
    """Whether the rows are probabilities; of a single one that may be chance."""
    sums = logits.detach().sum(1)
    return len(logits) > 1 and bool((logits >= 0).all() & ((sums - 1).abs() < 1e-3).all())


def _moved(images: Tensor, pixels: Tensor, found: Ascent, scale: Scale) -> Tensor:
    """The batch where it came out, in its own units and layout; as it was where nothing did."""
    new = select(found.finite, scale.moved(images, pixels, found.image), images)
    return torch.empty_like(images).copy_(new)


def _losses(found: Ascent, threat: Threat) -> dict[str, Tensor]:
    sign = -1.0 if threat.targeted else 1.0
    return {"loss_start": sign * found.first, "loss": sign * found.last} if threat.steps else {}


def _moves(found: Ascent, variables: dict[str, Variable]) -> dict[str, Tensor]:
    lost = ~found.finite
    norms = {
        f"{name}_norm": v.ball.distance(found.values[name]).masked_fill(lost, 0)
        for name, v in variables.items()
    }
    return {**norms, "fallback": lost}
