"""Objectives against their definitions, and the shapes of outputs that models have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ijsat_aug.attack import cross_entropy, kl_divergence, margin
from ijsat_aug.attack.model import logits_of


def test_soft_and_hard_labels_agree() -> None:
    logits, y = torch.randn(7, 5), torch.randint(5, (7,))
    one_hot = F.one_hot(y, 5).float()
    assert torch.allclose(cross_entropy(logits, y), cross_entropy(logits, one_hot), atol=1e-6)
    assert torch.equal(margin(logits, y), margin(logits, one_hot))


def test_kl_is_that_of_probabilities_and_survives_exact_zeros() -> None:
    p, q = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    expected = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1)
    assert torch.allclose(kl_divergence(q, p.log_softmax(1)), expected)
    sure = torch.tensor([[200.0, 0.0, 0.0]])
    logits = torch.tensor([[1.0, 2.0, 0.0]], requires_grad=True)
    (g,) = torch.autograd.grad(kl_divergence(logits, sure.log_softmax(1)).sum(), logits)
    assert g.isfinite().all()


def test_margin_is_positive_exactly_when_fooled() -> None:
    logits, y = torch.randn(200, 10), torch.randint(10, (200,))
    assert torch.equal(margin(logits, y) > 0, logits.argmax(1) != y)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (t, "aux"),
        lambda t: [t],
        lambda t: {"aux": 1, "logits": t},
        lambda t: {"out": t},
        lambda t: SimpleNamespace(logits=t),
        lambda t: (SimpleNamespace(logits=t), 3),
    ],
)
def test_logits_are_found(wrap) -> None:
    logits = torch.randn(2, 3)
    assert logits_of(wrap(logits)) is logits


@pytest.mark.parametrize("output", [None, {}, (), {"features": torch.zeros(1)}, "text"])
def test_other_outputs_are_refused(output) -> None:
    with pytest.raises(TypeError, match="must return logits"):
        logits_of(output)


def test_logits_come_before_other_outputs() -> None:
    one, two = torch.rand(2, 3), torch.rand(2, 3)
    assert logits_of({"out": one, "logits": two}) is two
