"""What is climbed: per-sample losses of logits; any ``(logits, target) -> (B,)`` does."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "OBJECTIVES", "Objective", "binary_cross_entropy", "cross_entropy", "kl_divergence", "margin",
]  # fmt: skip

Objective = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy against classes ``(B,)`` or probabilities ``(B, C)``.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> cross_entropy(logits, torch.tensor([1]))
        tensor([0.6931])
        >>> cross_entropy(logits, torch.tensor([[0.5, 0.5]]))
        tensor([0.6931])
    """
    return F.cross_entropy(logits, target, reduction="none")


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of every output, summed: for labels that do not exclude each other.

    Class numbers ``(B,)`` are one label of many, or, where there is one output, no and yes.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> binary_cross_entropy(logits, torch.tensor([[1.0, 1.0]]))
        tensor([1.3863])
        >>> binary_cross_entropy(logits, torch.tensor([1]))
        tensor([1.3863])
    """
    if target.ndim == 1:
        target = target[:, None] if logits.shape[1] == 1 else F.one_hot(target, logits.shape[1])
    losses = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
    return losses.sum(1)


def kl_divergence(logits: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL divergence of the prediction from a reference one, as in TRADES.

    The reference is given as log-probabilities: in probabilities, exact zeros make NaN gradients.

    Example:
        >>> logits = torch.tensor([[1.0, -1.0]])
        >>> kl_divergence(logits, logits.log_softmax(1))
        tensor([0.])
    """
    log_q = logits.log_softmax(1)
    return F.kl_div(log_q, log_probabilities, reduction="none", log_target=True).sum(1)


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """The best other logit minus that of the target class (Carlini and Wagner): > 0 when fooled.

    Probabilities count by their largest entry.

    Example:
        >>> margin(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
        tensor([-1.])
    """
    classes = (target if target.ndim == 1 else target.argmax(1))[:, None]
    others = logits.scatter(1, classes, -torch.inf)
    return others.amax(1) - logits.gather(1, classes).squeeze(1)


OBJECTIVES: dict[str, Objective] = {
    "ce": cross_entropy,
    "bce": binary_cross_entropy,
    "kl": kl_divergence,
    "margin": margin,
}
