"""Shared fixtures: real digits, real photographs, real CIFAR-10 where it is, trained flows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.real_data import cifar10, data_folder
from ijsat_aug import load_flow
from ijsat_aug.flows.checkpoint import load_state
from ijsat_aug.flows.data import load_images
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.flows.glow import GlowConfig, build_glow

# One thread for each of pytest's processes: two that share the cores wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if data_folder() is None:
        missing = pytest.mark.skip(reason="IJSAT_DATA does not name the real data sets")
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(missing)


@pytest.fixture(scope="session")
def digits() -> Tensor:
    """Held-out real digits in [0, 1]."""
    return load_images("digits", train=False).images.float() / 16


@pytest.fixture(scope="session")
def photographs() -> Tensor:
    """32-pixel pieces of the two real photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    pieces = []
    for photograph in load_sample_images().images:
        image = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[:, :416, :640] / 255
        small = torch.nn.functional.avg_pool2d(image, 4)
        pieces.append(small.unfold(1, 32, 32).unfold(2, 32, 32).flatten(1, 2).transpose(0, 1))
    return torch.cat(pieces)[:24].contiguous()


@pytest.fixture(scope="session")
def cifar_test() -> Tensor:
    """The first real CIFAR-10 test images in [0, 1]."""
    return cifar10(train=False)[0][:64] / 255


def random_glow(config: GlowConfig, spread: float = 0.02, seed: int = 0) -> Any:
    """A Glow with all weights away from their initial values."""
    torch.manual_seed(seed)
    model = build_glow(config)
    labels = None if config.num_classes is None else torch.arange(16) % config.num_classes
    with torch.no_grad():
        model(torch.rand(16, *config.shape), labels)
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model.requires_grad_(False)


def trained_glow(name: str) -> tuple[GlowConfig, Any]:
    """The normflows model of a shipped checkpoint."""
    config, state = load_state(name)
    model = build_glow(config)
    model.load_state_dict(state)
    return config, model.requires_grad_(False)


def small_network(classes: int = 10) -> nn.Sequential:
    """Convolution, BatchNorm and dropout: everything that an attack could disturb."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Dropout(0.1), nn.Flatten(), nn.Linear(512, classes),
    )  # fmt: skip


def trained_network(
    outputs: int, targets: Callable[[Tensor], Tensor], loss: Callable[[Tensor, Tensor], Tensor]
) -> nn.Sequential:
    """A small network that has learnt something of the digits."""
    torch.manual_seed(0)
    data = load_images("digits")
    x, y = data.images.float() / 16, targets(data.labels)
    net = small_network(outputs)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(250):
        index = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss(net(x[index]), y[index]).backward()
        optimizer.step()
    net.zero_grad()
    return net


@pytest.fixture(scope="session")
def _trained_network() -> nn.Sequential:
    return trained_network(10, lambda digits: digits, nn.functional.cross_entropy)


@pytest.fixture
def network(_trained_network: nn.Sequential) -> nn.Sequential:
    """A network of its own for each test, trained on digits, in train mode."""
    net = small_network()
    net.load_state_dict(_trained_network.state_dict())
    return net.train()


@pytest.fixture
def net(network: nn.Sequential) -> nn.Sequential:
    """The same in eval mode."""
    return network.eval()


@pytest.fixture(scope="session")
def labels() -> Tensor:
    """The classes of ``digits``."""
    return load_images("digits", train=False).labels


@pytest.fixture(scope="session")
def flow() -> FrozenGlow:
    """The shipped flow of the digits."""
    return load_flow("digits")


@dataclass(frozen=True)
class IdentityFlow:
    """A manifold whose latents are the pixels."""

    shape: tuple[int, int, int] = (1, 8, 8)
    latent_dim: int = 64

    def encode(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def decode(self, z: Tensor) -> Tensor:
        return z.unflatten(1, self.shape)
