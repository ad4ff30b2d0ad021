"""Reasons to doubt a robust accuracy, looked for on a few images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..attack.traces import buffers_kept
from ..transforms.functional import joint_space_adv
from .draws import Draws
from .threats import fooling, pgd
from .victim import Victim

__all__ = ["black_box_wins", "doubts"]

_EPS = 8 / 255
_CHANCES = 20
# A share of images below which a difference is chance.
_SLACK = 0.05
# Whose two modes differ, of torch's own modules.
_MODAL = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.modules.dropout._DropoutNd,
)


def doubts(
    victim: Victim, images: Tensor, labels: Tensor, seed: int = 0, *, attacked: bool = True
) -> list[str]:
    """What makes the robust accuracy of this model hard to believe; nothing, if all is well.

    Args:
        victim: The model.
        images: Some real images ``(B, C, H, W)`` in [0, 1]; about a hundred tell enough.
        labels: Their classes.
        seed: Of everything random.
        attacked: Doubt the model's gradients too, which attacks follow.

    Example:
        >>> broken = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4),
        ...                              torch.nn.Softmax(1)).eval()
        >>> found = doubts(Victim(broken), torch.rand(16, 1, 8, 8), torch.arange(16) % 4)
        >>> found[0].split(":")[0]
        'The model returns probabilities, not logits'
    """
    training = _trains(victim.handle.modules)
    with victim.frozen():
        logits = victim(images).detach()
        lost = logits.isnan().any(1)
        if lost.any():
            return [_not_finite(float(lost.float().mean()))]
        right = logits.argmax(1) == labels
        x, y = images[right], labels[right]
        chance = _random(victim, images)
        found = [
            _in_train_mode(training),
            _probabilities(logits),
            chance or _depends_on_batch(victim, images, logits),
        ]
        if attacked:
            found += _of_gradients(victim, x, y, seed) if len(x) else [_none_right(len(images))]
    return [warning for warning in found if warning is not None]


def _of_gradients(victim: Victim, x: Tensor, y: Tensor, seed: int) -> list[str | None]:
    """What makes attacks along the gradient weak, on images that the model gets right."""
    flat = _flat(victim, x, y)
    if flat is None:
        return [_no_gradient(1.0)]
    draws = Draws(seed, "doubts", range(len(x)), x.device)
    attacked = pgd("linf", _EPS, 20)(victim, x, y, draws).images
    return [
        _no_gradient(float(flat.float().mean())),
        _more_steps_are_weaker(victim, x, y),
        _large_budget_fails(victim, x, y, draws),
        _noise_wins(victim, x, y, attacked, draws),
        _depends_on_statistics(victim, x, attacked, y),
    ]


def black_box_wins(right: Mapping[str, int], count: int) -> str | None:
    """Whether Square, which sees no gradient, found what the parts with gradients did not.

    Args:
        right: Images that are right after each part of AutoAttack, in order.
        count: Of all images.

    Example:
        >>> black_box_wins({"APGD-CE": 50, "FAB-T": 50, "Square": 40}, 100)[:57]
        'Square, an attack without gradients, fools 20.0% of the i'
    """
    names, counts = list(right), list(right.values())
    if "Square" not in names[1:]:
        return None
    place = names.index("Square")
    left = counts[place - 1]
    gained = left - counts[place]
    if gained <= 0.002 * count:
        return None
    return (
        f"Square, an attack without gradients, fools {gained / left:.1%} of the images that "
        "gradients could not change: the model may hide its gradients, and be less robust than it "
        "seems."
    )


def _not_finite(share: float) -> str:
    return (
        f"The model answers {share:.0%} of the images with no numbers (NaN): they count as wrong, "
        "and no other doubt was looked into."
    )


def _none_right(count: int) -> str:
    return (
        f"None of the {count} images that were looked at is right, so that nothing is known of the "
        "gradients that attacks follow."
    )


def _trains(modules: Sequence[nn.Module]) -> bool:
    """Whether a model is in train mode, or a part of it that is another then.

    A container that was put around a model in eval mode says nothing.
    """
    modules = [module for module in modules if hasattr(module, "training")]  # a jit.freeze has none
    modes = [module.training for module in modules]
    return any(modes) and (
        all(modes) or any(t for m, t in zip(modules, modes, strict=True) if isinstance(m, _MODAL))
    )


def _in_train_mode(training: bool) -> str | None:
    if not training:
        return None
    return (
        "The model came in train mode and was evaluated in eval mode: call model.eval() first, so "
        "that what you evaluate is what you use."
    )


def _probabilities(logits: Tensor) -> str | None:
    if not ((logits >= -1e-5) & (logits <= 1 + 1e-5)).all():
        return None
    return (
        "The model returns probabilities, not logits: attacks lose their gradient where it is "
        "sure. Evaluate it without its softmax or sigmoid."
    )


@torch.no_grad()
def _random(victim: Victim, x: Tensor) -> str | None:
    outputs = [victim(x) for _ in range(5)]
    apart = max(_apart(o, outputs[0]) for o in outputs[1:])
    if apart <= 1e-4:
        return None
    changed = max(float((o.argmax(1) != outputs[0].argmax(1)).float().mean()) for o in outputs[1:])
    return (
        f"The model is random: five passes over the same images differ, and {changed:.0%} of its "
        "predictions. These attacks take its gradients as they come; a randomised defence needs "
        "attacks that average over them."
    )


@torch.no_grad()
def _depends_on_batch(victim: Victim, x: Tensor, logits: Tensor) -> str | None:
    few = range(min(8, len(x)))
    alone = torch.cat([victim(x[i : i + 1]) for i in few])
    if _apart(alone, logits[: len(alone)]) <= 1e-2:
        return None
    return (
        "A prediction depends on the other images of the batch, as with BatchNorm that has no "
        "running statistics: the accuracies below hold for this batch size alone."
    )


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, against the largest value; a class that is masked may be infinite."""
    scale = other.where(other.isfinite(), 0).abs().amax().clamp(min=1e-6)
    return float((one - other).where(one != other, 0).abs().max() / scale)


def _flat(victim: Victim, x: Tensor, y: Tensor) -> Tensor | None:
    """Which images have no gradient; None where no way leads from the loss to any image."""
    leaf = x.clone().requires_grad_()
    loss = fooling(victim(leaf), y).sum()
    if not loss.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    # NaN is no way either.
    return None if gradient is None else ~(gradient.flatten(1).abs().amax(1) > 0)


def _no_gradient(share: float) -> str | None:
    if share == 0:
        return None
    return (
        f"{share:.0%} of the images have no gradient at all, or none that is a number: attacks "
        "that follow it stay where they are. A quantised or saturated model needs attacks made for "
        "it."
    )


def _more_steps_are_weaker(victim: Victim, x: Tensor, y: Tensor) -> str | None:
    def accuracy(steps: int) -> float:
        return _right(victim, _plain_pgd(victim, x, y, _EPS, steps), y)

    after = {steps: accuracy(steps) for steps in (1, 5, 20)}
    few = min((1, 5), key=lambda steps: after[steps])
    if after[20] <= after[few] + _SLACK:
        return None
    return (
        f"PGD is stronger with {few} step{'s' * (few > 1)} ({after[few]:.0%} right) than with 20 "
        f"({after[20]:.0%}): the model hides its gradients."
    )


def _large_budget_fails(victim: Victim, x: Tensor, y: Tensor, draws: Draws) -> str | None:
    classes = victim(x[:1]).shape[1]
    left = _right(victim, pgd("linf", 0.5, 20)(victim, x, y, draws).images, y)
    if left <= max(1 / classes + _SLACK, 1 / len(x)):
        return None
    return (
        f"With half of the whole pixel range to spend, PGD leaves {left:.0%} of the images right, "
        "which grey images alone would beat: its gradients lead nowhere."
    )


@torch.no_grad()
def _noise_wins(victim: Victim, x: Tensor, y: Tensor, attacked: Tensor, draws: Draws) -> str | None:
    held = victim.predict(attacked) == y
    broken = torch.zeros_like(held)
    for _ in range(_CHANCES):
        noise = _EPS * torch.sign(draws.uniform(tuple(x.shape)) - 0.5)
        broken |= victim.predict((x + noise).clamp(0, 1)) != y
    share = float((held & broken).float().mean())
    if share <= 0.02:
        return None
    return (
        f"Noise of the same size fools {share:.0%} of the images that PGD could not: the model "
        "hides its gradients, and is less robust than it seems."
    )


def _depends_on_statistics(
    victim: Victim, clean: Tensor, attacked: Tensor, y: Tensor
) -> str | None:
    norms = _batch_norms(victim)
    if not norms or len(clean) < 16:
        return None
    frozen = _right(victim, attacked, y)
    with _batch_statistics(norms):
        batch = _right(victim, attacked, y)
        # What the batch's own statistics do to clean images is no matter of robustness.
        lost = 1 - _right(victim, clean, y)
    if abs(batch - frozen) <= _SLACK + lost:
        return None
    return (
        f"Of the attacked images {frozen:.0%} are right with BatchNorm's running statistics and "
        f"{batch:.0%} with those of the batch: robustness depends on BatchNorm's mode. Say which "
        "one you use, and see whether the statistics were learned on attacked images."
    )


def _plain_pgd(victim: Victim, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """From the image itself, and without memory of better ones."""
    return joint_space_adv(x, y, victim, eps=eps, steps=steps, check_values=False)


@torch.no_grad()
def _right(victim: Victim, x: Tensor, y: Tensor) -> float:
    return float((victim.predict(x) == y).float().mean())


def _batch_norms(victim: Victim) -> list[nn.Module]:
    kind = nn.modules.batchnorm._BatchNorm
    found = [m for m in victim.handle.modules if isinstance(m, kind)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # They would wait for other processes, which may do something else.
        found = [norm for norm in found if not isinstance(norm, nn.SyncBatchNorm)]
    return [norm for norm in found if norm.running_mean is not None]


@contextmanager
def _batch_statistics(norms: list[nn.Module]) -> Iterator[None]:
    """BatchNorm asks the batch, and forgets what it heard."""
    with buffers_kept(norms):
        try:
            for module in norms:
                module.training = True
            yield
        finally:
            for module in norms:
                module.training = False
