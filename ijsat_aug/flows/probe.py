"""A small network that gives calibration and demo an honest gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["as_they_are", "probe_network", "several"]


def probe_network(
    images: Tensor, labels: Tensor | None, seed: int = 0, steps: int = 300
) -> nn.Module:
    """A small convolutional network trained for some seconds; an honest source of gradients.

    It classifies the images, or, without labels, tells how they were mirrored.

    Example:
        >>> network = probe_network(torch.rand(16, 1, 8, 8), None, steps=2)
        >>> network(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 4])
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    classes = 4 if labels is None else int(labels.max()) + 1
    with torch.enable_grad(), torch.inference_mode(False):
        labels = None if labels is None else labels.to(images.device)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            network = _small_cnn(images.shape[1], classes)
        network.to(images.device, images.dtype)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        for _ in range(steps):
            index = torch.randint(
                len(images), (min(64, len(images)),), generator=generator, device=images.device
            )
            x = images[index]
            y = None if labels is None else labels[index]
            if y is None:
                y = torch.randint(4, (len(x),), generator=generator, device=x.device)
                x = _mirror(x, y)
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.requires_grad_(False).eval()


def as_they_are(images: Tensor) -> Tensor:
    """What a network that tells how images were mirrored should say of these: not at all.

    Example:
        >>> as_they_are(torch.rand(2, 1, 8, 8))
        tensor([0, 0])
    """
    return torch.zeros(len(images), dtype=torch.long, device=images.device)


def several(labels: Tensor | None) -> Tensor | None:
    """Labels of more than one class; None of others, which teach a network nothing.

    Example:
        >>> several(torch.tensor([3, 3])), several(torch.tensor([3, 4]))
        (None, tensor([3, 4]))
    """
    return None if labels is None or len(labels.unique()) < 2 else labels


def _small_cnn(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, classes),
    )  # fmt: skip


def _mirror(x: Tensor, how: Tensor) -> Tensor:
    wide = (slice(None), None, None, None)
    x = torch.where((how % 2 == 1)[wide], x.flip(3), x)
    return torch.where((how >= 2)[wide], x.flip(2), x)
