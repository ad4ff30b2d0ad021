"""Real images from the folder that IJSAT_DATA names: CIFAR-10 (lossless sheets) and Fashion-MNIST.

Run:  IJSAT_DATA=... python benchmarks/real_data.py cifar10-train.npz   (for `train-flow`)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.datasets import FashionMNIST


def data_folder() -> Path | None:
    """The folder, or None when the variable is not set or names nothing."""
    value = os.environ.get("IJSAT_DATA")
    folder = Path(value) if value else None
    return folder if folder is not None and (folder / "cifar10").is_dir() else None


def cifar10(train: bool = True, batches: int = 5) -> tuple[Tensor, Tensor]:
    """Images ``(N, 3, 32, 32)`` uint8 and labels ``(N,)``, in the official order."""
    folder = _folder_of("cifar10")
    names = [f"data_batch_{i + 1}" for i in range(batches)] if train else ["test_batch"]
    sheets = [_sheet(folder / f"{name}.webp") for name in names]
    images = torch.from_numpy(np.concatenate(sheets)).permute(0, 3, 1, 2).contiguous()
    labels = np.load(folder / "labels.npz")["train" if train else "test"]
    return images, torch.from_numpy(labels.astype(np.int64))[: len(images)]


def fashion_mnist(train: bool = True) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 28, 28)`` uint8 and labels ``(N,)``."""
    found = FashionMNIST(_folder_of("fashion-mnist"), train=train)
    return found.data[:, None], found.targets


def _folder_of(name: str) -> Path:
    folder = data_folder()
    if folder is None:
        raise FileNotFoundError(f"set IJSAT_DATA to the folder that holds {name}/.")
    return folder / name


def _sheet(path: Path) -> NDArray[np.uint8]:
    sheet = np.asarray(Image.open(path).convert("RGB"), dtype=np.uint8)
    tiles = sheet.reshape(100, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(-1, 32, 32, 3))


if __name__ == "__main__":
    for target in sys.argv[1:]:
        read = fashion_mnist if "fashion" in target else cifar10
        pixels, classes = read(train="test" not in target)
        np.savez(target, images=pixels.numpy(), labels=classes.numpy())
        print(target, tuple(pixels.shape))
