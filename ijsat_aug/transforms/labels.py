"""Labels: classes ``(B,)`` or probabilities ``(B, C)``, and what is wrong with others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attack.model import in_full

__all__ = ["as_target", "check_logits", "soft_labels"]

# Of torchvision, by name: it need not be imported.
_NO_LABELS = ("BoundingBoxes", "KeyPoints", "Mask", "Video")


_OBJECTIVE = "for other targets pass a callable objective."
_BLENDS = "blends have no others; JointSpaceAdv takes them with a callable objective."


def as_target(labels: Tensor, count: int, *, values: bool, others: str = _OBJECTIVE) -> Tensor:
    """Labels as the objectives take them: int64 classes or floating probabilities.

    ``values`` looks at the probabilities too, which costs a host sync; ``others`` says what to do
    with labels that are neither.
    """
    if not isinstance(labels, Tensor) or type(labels).__name__ in _NO_LABELS:
        raise TypeError(
            f"labels must be a tensor of classes or probabilities, got {type(labels).__name__}; "
            "labels_getter= tells where they are."
        )
    if labels.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"labels must be class numbers or probabilities, got {labels.dtype}.")
    if labels.ndim == 0 or len(labels) != count:
        raise ValueError(f"there are {count} images and labels of shape {tuple(labels.shape)}.")
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[1] < 2:
            raise ValueError(
                f"floating labels must be probabilities of shape ({count}, classes), got "
                f"{tuple(labels.shape)}; pass class numbers as integers: labels.long()."
            )
        if values and count and not _are_probabilities(labels):
            raise ValueError(
                f"floating labels must be probabilities: rows >= 0 that sum to 1; {others}"
            )
        return in_full(labels)
    if labels.ndim != 1:
        raise ValueError(
            f"integer labels must have shape ({count},), got {tuple(labels.shape)}; squeeze them, "
            "or pass probabilities as floats."
        )
    return labels.long()


def soft_labels(labels: Any, count: int, num_classes: int | None, *, values: bool) -> Tensor:
    """Labels as float32 probabilities ``(B, C)``; ``values`` costs a host sync.

    Example:
        >>> soft_labels(torch.tensor([1]), 1, 3, values=True)
        tensor([[0., 1., 0.]])
    """
    if labels is None:
        raise ValueError(
            "mixup needs labels: call it with (images, labels), or tell labels_getter= where they "
            "are in the batch."
        )
    target = as_target(labels, count, values=values, others=_BLENDS)
    if target.ndim == 2:
        if num_classes is not None and target.shape[1] != num_classes:
            raise ValueError(
                f"the labels have {target.shape[1]} classes, num_classes is {num_classes}."
            )
        # Rounded rows of half precision need not sum to 1.
        exact = target.dtype == labels.dtype
        return target.float() if exact else target / target.sum(1, keepdim=True)
    if num_classes is None:
        raise ValueError("class numbers need num_classes= to become probabilities.")
    if values and count:
        low, high = (int(v) for v in target.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"the labels go from {low} to {high}, num_classes={num_classes} allows 0 to "
                f"{num_classes - 1}."
            )
    rows: Tensor = F.one_hot(target, num_classes)
    return rows.float()


def _are_probabilities(labels: Tensor) -> bool:
    rows = labels.detach().float()
    return bool((rows >= 0).all() & ((rows.sum(1) - 1).abs() < 1e-2).all())


def check_logits(logits: Tensor, count: int, target: Tensor | None, *, values: bool) -> None:
    """Whether logits and target fit each other; ``values`` costs a host sync."""
    if logits.ndim != 2 or len(logits) != count or logits.shape[1] < 2:
        raise ValueError(
            f"the model returned shape {tuple(logits.shape)} for {count} images; the built-in "
            f"objectives need ({count}, classes): pass a callable objective for other outputs."
        )
    classes = logits.shape[1]
    if target is None:
        return
    if target.ndim == 2 and target.shape[1] != classes:
        raise ValueError(
            f"the labels have {target.shape[1]} classes and the model {classes}; they must agree."
        )
    if target.ndim == 1 and values:
        low, high = (int(v) for v in target.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"the labels go from {low} to {high}, the model knows the classes 0 to "
                f"{classes - 1}."
            )
