"""AutoAttack against the port of torchattacks, and its limits."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torchattacks
from torch import nn

from ijsat_aug.evaluation import Victim, autoattack, evaluate
from ijsat_aug.evaluation.autoattack import auto_attack
from ijsat_aug.evaluation.draws import Draws


def attacked(net, x, y, norm="linf", eps=0.15, queries=200):
    victim = Victim(net)
    with victim.frozen():
        assert (victim.predict(x) == y).all()
        return auto_attack(norm, eps, queries=queries)(victim, x, y, Draws(0, "t", range(len(x))))


@pytest.fixture
def right(net, digits, labels):
    with torch.no_grad():
        index = (net(digits).argmax(1) == labels).nonzero().flatten()[:16]
    return digits[index], labels[index]


@pytest.mark.slow
def test_it_is_as_strong_as_the_port(net, right) -> None:
    x, y = right
    attacks = [
        torchattacks.APGD(net, eps=0.1, steps=100, loss="ce", seed=0),
        torchattacks.APGDT(net, eps=0.1, steps=100, n_classes=10, seed=0),
    ]
    theirs = torch.ones(len(x), dtype=torch.bool)
    for attack in attacks:
        with torch.no_grad():
            theirs &= net(attack(x, y)).argmax(1) == y
    ours = attacked(net, x, y, eps=0.1).right
    assert abs(int(ours["APGD-T"].sum()) - int(theirs.sum())) <= 1


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), ("l2", 0.6)])
def test_budgets_and_parts(norm, eps, net, right) -> None:
    x, y = right
    found = attacked(net, x, y, norm, eps)
    assert list(found.right) == ["APGD-CE", "APGD-T", "FAB-T", "Square"]
    away = (found.images - x).flatten(1)
    length = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
    assert (length <= eps + 1e-5).all()
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    parts = list(found.right.values())
    for before, after in pairwise(parts):
        assert not (after & ~before).any()
    with torch.no_grad():
        assert torch.equal(net(found.images).argmax(1) == y, parts[-1])
    assert 0 < int(parts[-1].sum()) < len(x)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes(classes, digits, labels) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).eval()
    x = digits[:12]
    with torch.no_grad():
        y = net(x).argmax(1)
    found = attacked(net, x, y, eps=0.05, queries=50)
    assert ("APGD-T" in found.right) == (classes >= 4)
    assert not found.right["FAB-T"].all()


def test_nothing_left_to_attack(net, digits, labels) -> None:
    wrong = (labels[:5] + 1) % 10
    found = evaluate(net, digits[:5], wrong, threats=["autoattack"], corruptions=[])
    assert found.accuracy("autoattack") == 0


def test_the_seed_decides_what_it_draws(monkeypatch) -> None:
    seeds = []
    monkeypatch.setattr(autoattack, "_parts", lambda *given: seeds.append(given[4]) or {})
    victim, x = Victim(nn.Flatten()), torch.rand(4, 1, 2, 2)
    for seed in (0, 0, 1):
        autoattack.auto_attack("linf", 0.1)(victim, x, torch.arange(4), Draws(seed, "a", range(4)))
    assert seeds[0] == seeds[1] != seeds[2]


def test_models_in_double_precision(net, digits, labels) -> None:
    found = evaluate(
        copy.deepcopy(net).double(), digits[:6], labels[:6], threats=["autoattack=0.02"],
        corruptions=[],
    )  # fmt: skip
    assert found.accuracy("autoattack") <= found.accuracy("clean")
