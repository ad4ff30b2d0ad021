"""Losses of the outer loop against their papers' code, written out plainly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijsat_aug.training import IATLoss, MARTLoss, TRADESLoss


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(16, 10), torch.randn(16, 10), torch.randint(10, (16,))


def trades(clean: Tensor, adversarial: Tensor, y: Tensor, beta: float) -> Tensor:
    natural = nn.CrossEntropyLoss()(clean, y)
    p, q = F.softmax(clean, dim=1), F.log_softmax(adversarial, dim=1)
    robust = (p * (p.log() - q)).sum() / len(y)
    return natural + beta * robust


def mart(clean: Tensor, adversarial: Tensor, y: Tensor, beta: float) -> Tensor:
    total = torch.zeros(())
    for p, q, label in zip(clean.softmax(1), adversarial.softmax(1), y.tolist(), strict=True):
        others = torch.cat([q[:label], q[label + 1 :]])
        boosted = -q[label].log() - (1 - others.max()).log()
        divergence = (p * (p.log() - q.log())).sum()
        total = total + boosted + beta * divergence * (1 - p[label])
    return total / len(y)


def test_trades(case) -> None:
    clean, adversarial, y = case
    expected = trades(clean, adversarial, y, 6.0)
    assert torch.allclose(TRADESLoss(6.0)(clean, adversarial, y), expected, rtol=1e-5)
    soft = F.one_hot(y, 10).float()
    assert torch.allclose(TRADESLoss(6.0)(clean, adversarial, soft), expected, rtol=1e-5)


def test_mart(case) -> None:
    clean, adversarial, y = case
    expected = mart(clean, adversarial, y, 5.0)
    assert torch.allclose(MARTLoss(5.0)(clean, adversarial, y), expected, rtol=1e-4)
    soft = F.one_hot(y, 10).float()
    assert torch.allclose(MARTLoss(5.0)(clean, adversarial, soft), expected, rtol=1e-4)


def test_mart_of_mixed_labels(case) -> None:
    clean, adversarial, y = case
    t = 0.7 * F.one_hot(y, 10) + 0.3 * F.one_hot((y + 1) % 10, 10)
    p, q = clean.softmax(1), adversarial.softmax(1)
    wrong = torch.stack([row[label == 0].max() for row, label in zip(q, t, strict=True)])
    boosted = -(t * q.log()).sum(1) - (1 - wrong).log()
    divergence = (p * (p.log() - q.log())).sum(1)
    expected = (boosted + 5 * divergence * (1 - (t * p).sum(1))).mean()
    assert torch.allclose(MARTLoss(5.0)(clean, adversarial, t), expected, rtol=1e-4)


@pytest.mark.parametrize("loss", [TRADESLoss(), MARTLoss()])
def test_saturated_predictions_have_finite_gradients(loss) -> None:
    for scale in (1e3, 1e-9):
        clean = (scale * torch.randn(8, 10)).requires_grad_()
        adversarial = (scale * torch.randn(8, 10)).requires_grad_()
        value = loss(clean, adversarial, torch.randint(10, (8,)))
        gradients = torch.autograd.grad(value, (clean, adversarial))
        assert value.isfinite()
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
def test_iat(share, case) -> None:
    clean, adversarial, y = case
    t = torch.randn(16, 10).softmax(1)
    expected = (1 - share) * F.cross_entropy(clean, t) + share * F.cross_entropy(adversarial, y)
    assert torch.allclose(IATLoss(share)(clean, t, adversarial, y), expected)
    with pytest.raises(ValueError, match="from 0 to 1"):
        IATLoss(1.5)


def test_mart_of_fooled_samples_and_smoothed_labels() -> None:
    """The margin pulls where the model is surest of the wrong class; smoothing hides none."""
    clean = torch.zeros(1, 3)
    fooled = torch.tensor([[0.0, 0.0, 12.0]], requires_grad=True)
    y = torch.tensor([0], dtype=torch.int32)
    (g,) = torch.autograd.grad(MARTLoss(beta=0)(clean, fooled, y), fooled)
    p = fooled.detach().softmax(1)
    official = -F.log_softmax(fooled, 1)[0, 0] - torch.log(1.0001 - p.amax(1))[0]
    assert torch.isclose(MARTLoss(beta=0)(clean, fooled, y), official)
    assert g[0, 2] > 1.05
    smooth = F.one_hot(y.long(), 3) * 0.9 + 0.1 / 3
    hard, soft = (MARTLoss(beta=0)(clean, fooled.detach(), t) for t in (y, smooth))
    assert (hard - soft).abs() < 2  # not the whole margin of 8


@pytest.mark.parametrize("loss", [TRADESLoss(), MARTLoss(), lambda a, b, y: IATLoss()(a, y, b, y)])
def test_labels_of_each_kind(loss, case) -> None:
    clean, adversarial, y = case
    expected = loss(clean, adversarial, y)
    assert torch.equal(loss(clean, adversarial, y.int()), expected)
    rows = F.one_hot(y, clean.shape[1]).to(clean.dtype)
    assert torch.allclose(loss(clean, adversarial, rows), expected, rtol=1e-4)
    with pytest.raises(ValueError, match=r"must have shape .* squeeze them"):
        loss(clean, adversarial, y[:, None])
    with pytest.raises(ValueError, match="images and labels of shape"):
        loss(clean, adversarial, y[:-1])


@pytest.mark.parametrize("loss", [TRADESLoss(), MARTLoss()])
def test_logits_of_other_samples_are_refused(loss) -> None:
    with pytest.raises(ValueError, match="logits of the same samples"):
        loss(torch.randn(4, 3), torch.randn(1, 3), torch.tensor([0, 1, 2, 0]))


def test_float64_stays() -> None:
    clean, worse = torch.randn(2, 4, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0])
    for loss in (TRADESLoss(), MARTLoss()):
        found = loss(clean, worse, y)
        assert found.dtype == torch.float64
        assert found != loss(clean.float(), worse.float(), y)
    assert IATLoss()(clean, y, worse, y).dtype == torch.float64


def test_low_precision_is_the_models_alone() -> None:
    low = [torch.randn(16, 10).bfloat16() for _ in range(2)]
    full, y = [t.float() for t in low], torch.randint(10, (16,))
    for loss in (TRADESLoss(), lambda a, b, y: IATLoss()(a, y, b, y)):
        assert loss(*low, y).dtype == torch.float32
        assert torch.equal(loss(*low, y), loss(*full, y))
