"""Learning really happens: a small network on real digits, with each transform in the loader."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ijsat_aug import AugmentedLoader, JointSpaceAdv, RobustMixup
from ijsat_aug.flows import load_images
from tests.conftest import small_network

EPS = 0.1


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


def attacked(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """PGD that keeps the worst image."""
    return JointSpaceAdv(net, eta=0, eps=EPS, steps=20, best=True, generator=0)(x, y)[0]


def trained(augment, epochs: int = 7) -> nn.Module:
    data = load_images("digits")
    torch.manual_seed(0)
    net = small_network()
    transform = augment(net)
    loader = DataLoader(
        TensorDataset(data.images.float() / 16, data.labels), batch_size=100, shuffle=True
    )
    if transform is not None:
        loader = AugmentedLoader(loader, transform, "cpu")
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return trained(lambda net: None)


def test_plain_training_is_good_and_not_robust(plain, digits, labels) -> None:
    assert accuracy(plain, digits, labels) > 0.96
    assert accuracy(plain, attacked(plain, digits, labels), labels) < 0.75


def joint(net: nn.Module, flow) -> JointSpaceAdv:
    return JointSpaceAdv(net, flow, eps=EPS, steps=2)


def latent_step(net: nn.Module, flow) -> JointSpaceAdv:
    return JointSpaceAdv(net, flow, eps=0, method="linear", target="prediction")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "standard", "gain"),
    [
        (lambda net, flow: RobustMixup(num_classes=10, eps=0), 0.95, None),
        (lambda net, flow: latent_step(net, flow), 0.96, None),
        (lambda net, flow: joint(net, flow), 0.95, 0.15),
        (lambda net, flow: RobustMixup(net, num_classes=10, eps=EPS, steps=2), 0.94, 0.15),
        (
            lambda net, flow: RobustMixup(
                net, num_classes=10, attack=joint(net, flow), mode="append"
            ),
            0.96,
            0.15,
        ),
    ],
    ids=["mixup", "latent step", "JointSpaceAdv", "RobustMixup", "IJSAT"],
)  # fmt: skip
def test_networks_learn_and_those_that_saw_attacks_withstand_them(
    make, standard, gain, plain, digits, labels, flow
) -> None:
    net = trained(partial(make, flow=flow))
    assert accuracy(net, digits, labels) > standard
    if gain is not None:
        before = accuracy(plain, attacked(plain, digits, labels), labels)
        assert accuracy(net, attacked(net, digits, labels), labels) > before + gain
