"""Show a batch several times, moved along the gradient that the training step itself left on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .batch import BatchTransform
from .climb import usable
from .structure import Parts

__all__ = ["calmed", "replay"]


def replay(transform: BatchTransform, batch: Any, times: int) -> Iterator[Any]:
    """The batch without attack, then moved along the gradient of each step before.

    The gradient comes from the ``backward()`` that training does anyway, so that the attack asks no
    model: it costs what the flow costs, and nothing in pixel space. Every move starts anew from the
    batch without attack.

    Args:
        transform: What moves the batch: ``calm`` shows it at first, ``follow`` moves it.
        batch: As the transform takes it.
        times: How often it is shown.

    Example:
        >>> import torch
        >>> from ijsat_aug import JointSpaceAdv
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
        >>> adv = JointSpaceAdv(eta=0, eps=0.1, random_start=False)
        >>> losses = []
        >>> for x, y in replay(adv, (torch.rand(8, 1, 4, 4), torch.arange(8) % 2), 2):
        ...     loss = torch.nn.functional.cross_entropy(net(x), y)
        ...     loss.backward()
        ...     losses.append(loss.item())
        >>> losses[1] > losses[0]
        True
    """
    if not transform.training:
        for turn in range(times):
            yield calmed(transform, batch, again=turn + 1 < times)
        return
    parts = transform.parts_of((batch,))
    calm, labels, index = transform.calm(parts.images, parts.labels)
    images = calm = usable(calm)
    for turn in range(times):
        # Shown as a copy: a loop that changes its images in place may not change a leaf.
        again = turn + 1 < times
        leaf = images.detach().requires_grad_(again)
        shown = (leaf.clone(), _copied(labels, parts)) if again else (leaf, labels)
        yield parts.rebuild(*shown)
        if again:
            moved = transform.follow(calm, labels, _gradient(leaf), index)
            images = moved.as_subclass(type(calm))


def calmed(transform: BatchTransform, batch: Any, again: bool = False) -> Any:
    """The batch without attack; a copy where it is shown again, as a loop may change it in place.

    Example:
        >>> import torch
        >>> from ijsat_aug import JointSpaceAdv
        >>> x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 2
        >>> [a is b for a, b in zip(calmed(JointSpaceAdv(eta=0), (x, y)), (x, y))]
        [False, True]
    """
    if not (transform.training or again):
        return batch
    parts = transform.parts_of((batch,))
    images, labels = parts.images, parts.labels
    if transform.training:
        images, labels, _ = transform.calm(images, labels)
        images = usable(images).detach()
    if again:
        images, labels = images.clone(), _copied(labels, parts)
    return parts.rebuild(images, labels)


def _copied(labels: Any, parts: Parts) -> Any:
    """Labels that a loop may change, where the batch has a place for them."""
    return labels.clone() if isinstance(labels, Tensor) and parts.has_place else labels


def _gradient(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise ValueError(
            "the batch came back without a gradient: with replay, loss.backward() must reach the "
            "images of every batch before the next one is asked for."
        )
    return leaf.grad
