"""Losses of adversarial training: TRADES, MART and IAT, for classes or mixed labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..attack.model import in_full
from ..transforms.labels import as_target
from ..words import is_between

__all__ = ["IATLoss", "MARTLoss", "TRADESLoss"]


class TRADESLoss(nn.Module):
    """Cross-entropy of the clean prediction, and its divergence from the adversarial one.

    ``CE(clean, y) + beta KL(p_clean || p_adversarial)`` (Zhang et al., 2019); make the images with
    ``JointSpaceAdv(..., objective="kl")``.

    Args:
        beta: Weight of the divergence.

    Example:
        >>> import torch
        >>> clean, adversarial = torch.randn(4, 10), torch.randn(4, 10)
        >>> loss = TRADESLoss(beta=6.0)(clean, adversarial, torch.tensor([3, 1, 4, 1]))
        >>> loss.shape
        torch.Size([])
    """

    def __init__(self, beta: float = 6.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, clean: Tensor, adversarial: Tensor, target: Tensor) -> Tensor:
        """The loss of logits against classes ``(B,)`` or probabilities ``(B, C)``."""
        target = as_target(target, len(clean), values=False)
        log_p, log_q = _log_softmax(clean, adversarial)
        divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return F.cross_entropy(in_full(clean), target) + self.beta * divergence


class MARTLoss(nn.Module):
    """Boosted cross-entropy of the adversarial prediction, and KL where the clean one is unsure.

    ``-log p_adv[y] - log(1 - max_{k != y} p_adv[k]) + beta KL(p_clean || p_adv) (1 - p_clean[y])``
    (Wang et al., 2020). With probabilities as target, p[y] is the probability of the mixed label,
    the sum of ``target * p``, and the classes "other than y" are those of least weight in it: of
    none, or of no more than a label smoothing gives to all.

    Args:
        beta: Weight of the divergence.

    Example:
        >>> import torch
        >>> clean, adversarial = torch.randn(4, 10), torch.randn(4, 10)
        >>> loss = MARTLoss(beta=5.0)(clean, adversarial, torch.tensor([3, 1, 4, 1]))
        >>> loss.shape
        torch.Size([])
    """

    def __init__(self, beta: float = 5.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, clean: Tensor, adversarial: Tensor, target: Tensor) -> Tensor:
        """The loss of logits against classes ``(B,)`` or probabilities ``(B, C)``."""
        log_p, log_q = _log_softmax(clean, adversarial)
        target = as_target(target, len(clean), values=False)
        if target.ndim == 1:
            target = F.one_hot(target, clean.shape[1])
        target = target.to(log_p.dtype)
        meant = target > target.amin(1, keepdim=True) + 1e-6
        wrong = log_q.exp().masked_fill(meant, 0).amax(1)
        boosted = -(target * log_q).sum(1) - (1.0001 - wrong).log()
        unsure = 1 - (target * log_p.exp()).sum(1)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
        return (boosted + self.beta * divergence * unsure).mean()


class IATLoss(nn.Module):
    """Half the loss of mixed clean images, half that of mixed attacked ones (Lamb et al., 2019).

    Args:
        adversarial_share: Weight of the attacked half.

    Example:
        >>> import torch
        >>> logits, target = torch.randn(4, 10), torch.randn(4, 10).softmax(1)
        >>> loss = IATLoss()(logits, target, logits, target)
        >>> bool(torch.isclose(loss, torch.nn.functional.cross_entropy(logits, target)))
        True
    """

    def __init__(self, adversarial_share: float = 0.5) -> None:
        super().__init__()
        if not is_between(adversarial_share, 0, 1):
            raise ValueError(f"adversarial_share is from 0 to 1, got {adversarial_share!r}.")
        self.adversarial_share = adversarial_share

    def forward(
        self, clean: Tensor, clean_target: Tensor, adversarial: Tensor, adversarial_target: Tensor
    ) -> Tensor:
        """The loss of both logits, each against its own mixed labels."""
        share = self.adversarial_share
        pairs = ((clean, clean_target), (adversarial, adversarial_target))
        one, two = (
            F.cross_entropy(in_full(logits), as_target(target, len(logits), values=False))
            for logits, target in pairs
        )
        return (1 - share) * one + share * two


def _log_softmax(clean: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of two batches of the same samples."""
    if clean.shape != adversarial.shape:
        raise ValueError(
            f"clean and adversarial are logits of the same samples, got {tuple(clean.shape)} and "
            f"{tuple(adversarial.shape)}."
        )
    return in_full(clean).log_softmax(1), in_full(adversarial).log_softmax(1)
