"""What the compose examples share: pieces of two real photographs, a small network, a grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from ijsat_aug.flows.probe import probe_network

SIZE = 64
CLASSES = ("china", "flower")


def pieces() -> tuple[Tensor, Tensor]:
    """Squares of 64 pixels in [0, 1], and which of the two photographs they come from."""
    images, labels = [], []
    for label, photograph in enumerate(load_sample_images().images):
        picture = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[:, :384, :640] / 255
        squares = nn.functional.avg_pool2d(picture, 2).unfold(1, SIZE, SIZE).unfold(2, SIZE, SIZE)
        images.append(squares.flatten(1, 2).transpose(0, 1))
        labels += [label] * len(images[-1])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.cat(images)[order], torch.tensor(labels)[order]


def network(x: Tensor, y: Tensor) -> nn.Module:
    """A small network that tells the photographs apart."""
    return probe_network(x, y, steps=30)


def grid(rows: dict[str, tuple[Tensor, Tensor]], path: Path, count: int = 7) -> None:
    """Rows of images; below each, its label, or the shares of its labels."""
    figure = Figure(figsize=(1.35 * count + 1.4, 1.55 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (title, (images, labels)) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        for axis, image, label in zip(line, images, labels, strict=False):
            axis.imshow(np.clip(image.permute(1, 2, 0).numpy(), 0, 1))
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(_words(label), fontsize=8, labelpad=2)
    path = path.with_suffix(path.suffix or ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"Look at {path}.")


def _words(label: Tensor) -> str:
    if label.ndim == 0:
        return CLASSES[int(label)]
    return ", ".join(f"{share:.0%} {CLASSES[k]}" for k, share in enumerate(label) if share > 0.005)
