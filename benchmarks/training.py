"""Ordinary training, for the networks that benchmarks look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ijsat_aug.flows.files import write_atomically
from ijsat_aug.precision import is_emulated

BATCH = 128


def fast_precision() -> torch.dtype | None:
    """bfloat16; None where it is only emulated: on a processor it takes some forty times longer."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return None if is_emulated(torch.bfloat16, kind) else torch.bfloat16


LOW_PRECISION = fast_precision()
# Of an attack.
LOW: dict[str, Any] = {"amp_dtype": LOW_PRECISION, "memory_format": torch.channels_last}
Labelled = tuple[Tensor, Tensor]


def low_precision(x: Tensor) -> torch.autocast:
    """Autocast to it on the device of a tensor; a graph must not meet cached casts."""
    return torch.autocast(
        x.device.type, LOW_PRECISION or torch.bfloat16, enabled=LOW_PRECISION is not None,
        cache_enabled=not x.is_cuda,
    )  # fmt: skip


def train_plainly(
    make: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    epochs: int,
    *,
    seed: int = 0,
    weights: Path | None = None,
) -> nn.Module:
    """SGD, one cycle, crop and flip, low precision; the network comes back in eval mode.

    Args:
        make: Makes the network.
        images: ``(N, 3, H, W)``, uint8.
        labels: Their classes.
        epochs: How long.
        seed: Of the weights, the order and the crops.
        weights: A file that keeps the result, and is used instead where it is there.
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = make().to(device)
    if weights is not None and weights.is_file():
        network.load_state_dict(load_file(weights))
        return network.eval()
    network = network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    each = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=epochs * each)
    for epoch in range(epochs):
        for index in torch.randperm(len(images)).split(BATCH)[:each]:
            x = crop_and_flip(images[index]).to(device)
            with low_precision(x):
                logits = network(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")
    network = network.to(memory_format=torch.contiguous_format).eval()
    if weights is not None:
        save_weights(network.state_dict(), weights)
    return network


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write the weights of a network, whatever the layout of their memory."""
    write_atomically(path, save({name: value.contiguous() for name, value in state.items()}))


class Seen:
    """How many images a network is asked about, in the attacks too."""

    def __init__(self, network: nn.Module) -> None:
        self.images = 0
        self._hook = network.register_forward_pre_hook(self._count)

    def _count(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.images += len(inputs[0])

    def close(self) -> None:
        """Count no more."""
        self._hook.remove()


class Crops(NamedTuple):
    """How images are moved and mirrored: ``(B, 1)`` each."""

    down: Tensor
    right: Tensor
    mirrored: Tensor

    @classmethod
    def draw(
        cls, count: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Crops:
        """By up to 4 pixels each way, and every other image mirrored; a generator of the device."""
        own: dict[str, Any] = {"generator": generator, "device": device}
        down, right = torch.randint(9, (2, count, 1), **own)
        return cls(down, right, torch.rand(count, 1, **own) < 0.5)

    def of(self, images: Tensor) -> Tensor:
        """uint8 ``(B, C, H, W)`` to [0, 1]; what comes into sight is black."""
        batch, _, height, width = images.shape
        row, column, which = (torch.arange(n, device=images.device) for n in (height, width, batch))
        rows, columns = self.down + row, self.right + column
        columns = torch.where(self.mirrored, columns, columns.flip(1))
        padded = F.pad(images, (4, 4, 4, 4))
        moved = padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return moved.movedim(-1, 1).float() / 255


def crop_and_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random :class:`Crops` of images; by default from the global generator."""
    return Crops.draw(len(images), images.device, generator).of(images)
