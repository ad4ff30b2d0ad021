"""Labels: classes ``(B,)`` or rows ``(B, C)``, and what is wrong with others."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attack.model import in_full

__all__ = ["Rows", "as_target", "check_logits", "soft_labels"]

# What rows hold: chances of classes that exclude each other, of labels that do not, or anything.
Rows = Literal["classes", "labels", "any"]

# Of torchvision, by name: it need not be imported.
_NO_LABELS = ("BoundingBoxes", "KeyPoints", "Mask", "Video")


_OTHERS = (
    'objective="bce" takes several labels an image, a callable objective whatever it understands.'
)
_WEIGHED = "lam_steps and draws compare predictions with such rows alone."


def as_target(
    labels: Tensor, count: int, *, values: bool, rows: Rows = "classes", others: str = _OTHERS
) -> Tensor:
    """Labels as the objectives take them: int64 classes or floating rows.

    Args:
        labels: Of the batch.
        count: Of its images.
        values: Look at the rows too, which costs a host sync.
        rows: What they hold.
        others: What to do with rows that are no probabilities.

    Example:
        >>> as_target(torch.tensor([[True, True]]), 1, values=True, rows="labels")
        tensor([[1., 1.]])
    """
    if not isinstance(labels, Tensor) or type(labels).__name__ in _NO_LABELS:
        numbers = isinstance(labels, (list, tuple, np.ndarray))
        fix = "pass torch.as_tensor(labels)" if numbers else "labels_getter= tells where they are"
        raise TypeError(
            "labels must be a tensor of classes or probabilities, got "
            f"{type(labels).__name__}; {fix}."
        )
    free = rows != "classes" and labels.ndim == 2
    if rows == "any" and labels.shape[1:] == (1,):  # a column of class numbers is a mistake
        free = labels.is_floating_point()
    if labels.is_complex() or (labels.dtype == torch.bool and not free):
        fix = f"; {others}" if labels.dtype == torch.bool and labels.ndim == 2 else "."
        raise TypeError(f"labels must be class numbers or probabilities, got {labels.dtype}{fix}")
    if labels.ndim == 0 or len(labels) != count:
        raise ValueError(f"there are {count} images and labels of shape {tuple(labels.shape)}.")
    if free:
        found = in_full(labels) if labels.is_floating_point() else labels.float()
        if rows == "labels" and values and not _are_chances(found):
            raise ValueError('the labels of objective="bce" must lie between 0 and 1.')
        return found
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[1] < 2:
            one = "" if rows == "classes" else ", and labels of one output as labels[:, None]"
            raise ValueError(
                f"floating labels must be {'rows' if one else 'probabilities'} of shape ({count}, "
                f"classes), got {tuple(labels.shape)}; pass class numbers as integers: "
                f"labels.long(){one}."
            )
        if values and count and not _are_probabilities(labels):
            raise ValueError(
                f"floating labels must be probabilities: rows >= 0 that sum to 1; {others}"
            )
        return in_full(labels)
    if labels.ndim > 2:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} are none of images: JointSpaceAdv takes masks "
            "with an objective= of your own (docs/tasks.md), RobustMixup blends none."
        )
    if labels.ndim != 1:
        column = labels.shape[1] == 1
        fix = "squeeze them" if column else "pass labels.argmax(1) if one in each row is set"
        raise ValueError(
            f"integer labels must have shape ({count},), got {tuple(labels.shape)}; {fix}, or pass "
            "rows as floats: labels.float()."
        )
    return labels.long()


def soft_labels(
    labels: Any,
    count: int,
    num_classes: int | None,
    *,
    values: bool,
    rows: Rows = "classes",
    weighed: bool = False,
) -> Tensor:
    """Labels as float32 rows ``(B, C)``; the rest as of :func:`as_target`.

    Where mixing weights are ``weighed`` by the model, they are probabilities whatever climbs then.

    Example:
        >>> soft_labels(torch.tensor([1]), 1, 3, values=True)
        tensor([[0., 1., 0.]])
    """
    if labels is None:
        raise ValueError(
            "mixup needs labels: call it with (images, labels), or tell labels_getter= where "
            "they are in the batch; inside kornia, ijsat_aug.integrations.kornia."
            'AugmentationSequential hands them over, with "class" among its data_keys.'
        )
    rows, others = ("classes", _WEIGHED) if weighed else (rows, _OTHERS)
    target = as_target(labels, count, values=values, rows=rows, others=others)
    if target.ndim == 2:
        if num_classes is not None and target.shape[1] != num_classes:
            raise ValueError(
                f"the labels have {target.shape[1]} classes, num_classes is {num_classes}."
            )
        exact = target.dtype == labels.dtype
        return target.float() if exact or rows == "labels" else _summing_to_one(target)
    if num_classes is None:
        one = " Where one output says no or yes, pass labels.float()[:, None]." * (rows == "labels")
        raise ValueError(f"class numbers need num_classes= to become probabilities.{one}")
    if values and count:
        low, high = (int(v) for v in target.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"the labels go from {low} to {high}, num_classes={num_classes} allows 0 to "
                f"{num_classes - 1}; if they are another item of the batch, say so by "
                "labels_getter=."
            )
    hot: Tensor = F.one_hot(target, num_classes)
    return hot.float()


def _are_probabilities(labels: Tensor) -> bool:
    rows = labels.detach().float()
    return bool((rows >= 0).all() & _about_one(rows.sum(1)).all())


def _about_one(total: Tensor) -> Tensor:
    return (total - 1).abs() < 1e-2


def _summing_to_one(rows: Tensor) -> Tensor:
    """Rounded rows of half precision need not; rows of other labels do not either."""
    total = rows.sum(1, keepdim=True)
    return rows / total.where(_about_one(total), 1)


def _are_chances(rows: Tensor) -> bool:
    return bool(((rows >= 0) & (rows <= 1)).all())


def check_logits(
    logits: Tensor, count: int, target: Tensor | None, *, values: bool, least: int = 2
) -> None:
    """Whether logits and target fit each other; ``values`` costs a host sync.

    Args:
        logits: What the model returned.
        count: Of its images.
        target: Classes or rows.
        values: Look at the classes too.
        least: Outputs that there must be.
    """
    if logits.ndim != 2 or len(logits) != count or logits.shape[1] < least:
        single = tuple(logits.shape) == (count, 1)
        fix = (
            'objective="bce" is for one output, no or yes'
            if single
            else "pass a callable objective for other outputs"
        )
        raise ValueError(
            f"the model returned shape {tuple(logits.shape)} for {count} images; the built-in "
            f"objectives need ({count}, classes): {fix}."
        )
    classes = logits.shape[1]
    if target is None:
        return
    if target.ndim == 2 and target.shape[1] != classes:
        raise ValueError(
            f"the labels have {target.shape[1]} classes and the model {classes}; they must agree"
            + (": pass labels.float()[:, None] for one output." if classes == 1 else ".")
        )
    if target.ndim == 1 and values:
        low, high = (int(v) for v in target.aminmax())
        last = max(classes, 2) - 1  # one output tells no and yes
        if low < 0 or high > last:
            raise ValueError(
                f"the labels go from {low} to {high}, the model knows the classes 0 to {last}; if "
                "they are another item of the batch, say so by labels_getter=."
            )
