"""One robust mixup of one batch: everything random comes in from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attack.ascent import Landscape, Values, Variable, ascend, select
from ..attack.balls import LinfBall
from ..attack.model import ModelHandle
from ..attack.objectives import Objective, cross_entropy
from ..attack.traces import version_of
from ..flows.manifold import Manifold
from ..words import check_count, is_between
from .blend import Blend, Space, blend, geometric_weight
from .climb import usable
from .labels import check_logits
from .scale import Scale
from .settings import check_choices, usual_step

__all__ = ["Attack", "Mix", "adversity", "guarded", "images_of", "mix_batch"]

Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How pairs are mixed, and how the weight itself climbs.

    Attributes:
        lam_steps: Ascent steps of the mixing weight.
        rho: How far the ascent may take a weight from its draw.
        lam_step_size: By default 2.5 ``rho`` / steps, 1.25 ``rho`` at most.
        lam_objective: ``"kl"`` of the prediction from the mixed label, or ``"ce"``, which pulls
            every weight to 1/2, because there the mixed label itself is least certain.
        order: ``"mix-attack"`` (Robust Mixup), or ``"attack-mix"`` (IAT).
        space: Where images are mixed: ``"pixel"``, or ``"latent"`` and ``"spherical"`` on the
            manifold.
        label: ``"linear"`` in the weight, or ``"geometric"``: where the attacked image lies.

    Example:
        >>> Mix(lam_steps=5, rho=0.2).lam_step
        0.1
    """

    lam_steps: int = 0
    rho: float = 0.25
    lam_step_size: float | None = None
    lam_objective: Literal["kl", "ce"] = "kl"
    order: Literal["mix-attack", "attack-mix"] = "mix-attack"
    space: Space = "pixel"
    label: Literal["linear", "geometric"] = "linear"

    def __post_init__(self) -> None:
        check_choices(self, _CHOICES)
        check_count("lam_steps", self.lam_steps, 0)
        if not is_between(self.rho, 0, 1):
            raise ValueError(f"rho is a distance of weights, from 0 to 1, got {self.rho!r}.")
        if not (self.lam_step_size is None or is_between(self.lam_step_size, 0)):
            raise ValueError(f"lam_step_size must be a number >= 0, got {self.lam_step_size!r}.")
        if self.label == "geometric" and self.space != "pixel":
            raise ValueError('label="geometric" needs the straight line of space="pixel".')
        if self.label == "geometric" and self.order == "attack-mix":
            raise ValueError(
                'label="geometric" needs order="mix-attack": it labels what was moved.'
            )

    @property
    def lam_step(self) -> float:
        """Step size of the weight."""
        if self.lam_step_size is not None:
            return self.lam_step_size
        return usual_step(self.lam_steps) * self.rho


_CHOICES: dict[str, tuple[str, ...]] = {
    "lam_objective": ("kl", "ce"),
    "order": ("mix-attack", "attack-mix"),
    "space": ("pixel", "latent", "spherical"),
    "label": ("linear", "geometric"),
}


def mix_batch(
    images: Tensor,
    targets: Tensor,
    lam: Tensor,
    mix: Mix,
    *,
    attack: Attack | None,
    handle: ModelHandle,
    flow: Manifold | None,
    scale: Scale,
    seed: int | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Mixed and attacked images, their targets, and facts: the weights of the own images.

    A blend whose decode is not finite becomes the straight blend, and is counted.

    Args:
        images: The batch, in its own units.
        targets: ``(B, C)`` probabilities.
        lam: ``(B,)`` weights of the own image, or ``(M, B)`` of which the worst is taken.
        mix: How.
        attack: Images and targets to attacked images, in the batch's units.
        handle: The model, for the choice and the ascent of the weights.
        flow: For mixing in latent space, on the batch's device.
        scale: Of the batch.
        seed: Of dropout in the model's train mode.
    """
    if mix.order == "attack-mix" and attack is not None:
        images = attack(images, targets)
    with torch.inference_mode(False), torch.no_grad():
        images, targets, lam = (usable(t) for t in (images, targets, lam))
        pixels = scale.to_pixels(images)
        draws = lam[None] if lam.ndim == 1 else lam
        draws = draws[:, :, None, None, None].to(pixels.dtype)
        picture = blend(pixels, mix.space, flow)
        if len(draws) > 1 or mix.lam_steps:
            with handle.frozen(images.device, seed):
                weight = _worst_weight(picture, targets, draws, mix, handle, scale)
        else:
            weight = draws[0]
        new = picture({"weight": weight})
        facts = {}
        if mix.space != "pixel":
            lost = ~new.flatten(1).isfinite().all(1)
            new = select(lost, blend(pixels, "pixel", None)({"weight": weight}), new)
            facts["fallback"] = lost
        mixed = scale.moved(images, pixels, new)
        labels = _mixed_labels(targets, weight)
    if mix.order == "mix-attack" and attack is not None:
        attacked = attack(mixed, labels)
        if mix.label == "geometric":
            moved = scale.to_pixels(attacked)
            weight = geometric_weight(moved, pixels, pixels.roll(1, 0), weight)
            labels = _mixed_labels(targets, weight)
        mixed = attacked
    facts["lam"] = weight.flatten()
    return torch.empty_like(images).copy_(mixed), labels, facts


def images_of(attack: Callable[[Tensor, Tensor], Any]) -> Attack:
    """The images alone of an attack that may return labels too.

    Example:
        >>> x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
        >>> images_of(lambda images, labels: (1 - images, labels))(x, y).shape
        torch.Size([2, 1, 2, 2])
    """

    def call(images: Tensor, targets: Tensor) -> Tensor:
        given = targets.clone()  # it may write on what it gets
        version = version_of(given)
        out = attack(images.clone(), given)
        moved, *more = out if isinstance(out, (tuple, list)) and out else (out,)
        if more and (more[0] is not given or version_of(given) != version):
            check_labels_left(more[0], targets)
        if not isinstance(moved, Tensor) or moved.shape != images.shape:
            got = tuple(moved.shape) if isinstance(moved, Tensor) else type(moved).__name__
            raise ValueError(
                f"attack must return images of shape {tuple(images.shape)}, alone or before the "
                f"targets; got {got}."
            )
        return moved.detach().to(images.dtype)

    return call


def check_labels_left(labels: Any, targets: Tensor) -> None:
    """Refuse an attack that returns other labels than it got, and not only logits beside images.

    Example:
        >>> check_labels_left(torch.zeros(1, 2), torch.ones(1, 2))
        Traceback (most recent call last):
        ...
        ValueError: attack changed the labels ...
    """
    if labels is targets or not isinstance(labels, Tensor) or labels.shape != targets.shape:
        return
    labels = labels.to(targets)
    shares = bool((labels >= 0).all() & (labels <= 1).all())
    if shares and not torch.allclose(labels, targets, atol=1e-3):
        raise ValueError(
            "attack changed the labels (what it returns second), which are those of the blends: "
            "put what mixes before RobustMixup, or behind it."
        )


def guarded(
    attack: Callable[[Tensor, Tensor], Any], handle: ModelHandle, seed: int | None
) -> Attack:
    """The images of an attack of the user's own, beside which the model is frozen as beside ours.

    Example:
        >>> net = torch.nn.Linear(2, 2)
        >>> attack = guarded(lambda x, y: x * net.training, ModelHandle(net), None)
        >>> net.training, attack(torch.ones(1, 2), torch.ones(1, 2))
        (True, tensor([[0., 0.]]))
    """
    images = images_of(attack)
    owner = getattr(attack, "__self__", attack)  # of a method
    own = [owner] if isinstance(owner, nn.Module) else []  # what it holds may be the model

    def call(pictures: Tensor, targets: Tensor) -> Tensor:
        with handle.beside(pictures.device, seed, own):
            return images(pictures, targets)

    return images if handle.model is None else call


def adversity(kind: str) -> Objective:
    """How badly a prediction fits a mixed label, as a function of both.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> half = torch.tensor([[0.5, 0.5]])
        >>> adversity("kl")(logits, half), adversity("ce")(logits, half)
        (tensor([0.]), tensor([0.6931]))
    """
    return _kl if kind == "kl" else cross_entropy


def _kl(logits: Tensor, target: Tensor) -> Tensor:
    # Clamped, so that the gradient to a target of 0 is finite.
    log_target = target.clamp(min=torch.finfo(target.dtype).tiny).log()
    return (target * (log_target - logits.log_softmax(1))).sum(1)


def _mixed_labels(targets: Tensor, weight: Tensor) -> Tensor:
    return torch.lerp(targets.roll(1, 0), targets, weight.flatten(1).to(targets.dtype))


@dataclass(eq=False)
class _Adversity(Landscape):
    """The loss at a blend, under the label that the same weight mixes."""

    partner: Tensor | None = None

    def goal(self, logits: Tensor, values: Values) -> Tensor:
        assert isinstance(self.target, Tensor)
        assert self.partner is not None
        return torch.lerp(self.partner, self.target, values["weight"].flatten(1))


def _worst_weight(
    picture: Blend, targets: Tensor, draws: Tensor, mix: Mix, handle: ModelHandle, scale: Scale
) -> Tensor:
    targets = targets.to(draws.dtype)

    def model(image: Tensor) -> Tensor:
        logits = handle(scale.to_model(image))
        check_logits(logits, len(image), targets, values=False)
        return logits

    landscape = _Adversity(
        picture, model, adversity(mix.lam_objective), targets, partner=targets.roll(1, 0)
    )
    weight = draws[0] if len(draws) == 1 else _worst_of(draws, landscape)
    if not mix.lam_steps or mix.rho == 0:
        return weight
    ball = LinfBall(weight, mix.rho, (0.0, 1.0))
    variable = Variable(weight, ball, mix.lam_step, (True,) * mix.lam_steps)
    found = ascend(landscape, {"weight": variable})
    return select(found.finite, found.values["weight"], weight)


@torch.no_grad()
def _worst_of(draws: Tensor, landscape: _Adversity) -> Tensor:
    losses = [landscape.losses(landscape.picture(v), v)[0] for v in ({"weight": w} for w in draws)]
    worst = torch.stack(losses).nan_to_num(-torch.inf).argmax(0)
    return draws[worst, torch.arange(draws.shape[1], device=draws.device)]
