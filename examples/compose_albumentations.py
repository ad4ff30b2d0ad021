"""Around a per-sample albumentations pipeline.

Run:  pip install -e ".[albumentations,demo]"
      python examples/compose_albumentations.py     (ten seconds)

It shows both ways: the pipeline in the dataset, ending in floats, which is faster because workers
run it; and as a step of a batch pipeline, which can stand behind an attack too. The pictures are in
runs/compose_albumentations.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import albumentations as A
import torch
from albumentations.pytorch import ToTensorV2
from photographs import grid, network, pieces
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ijsat_aug import RobustMixup
from ijsat_aug.integrations.albumentations import BatchPipeline


class Photographs(Dataset[tuple[Any, int]]):
    """8-bit arrays through a compose, as albumentations' users write it."""

    def __init__(self, x: Tensor, y: Tensor, compose: A.Compose) -> None:
        self.arrays = (255 * x).byte().permute(0, 2, 3, 1).numpy()
        self.labels, self.compose = y.tolist(), compose

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.compose(image=self.arrays[index])["image"], self.labels[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compose_albumentations.png"))
    options = parser.parse_args()
    torch.manual_seed(0)

    x, y = pieces()
    net = network(x, y)
    x, y = x[:16], y[:16]
    mix = RobustMixup(net, num_classes=2, eps=8 / 255, steps=3)

    compose = A.Compose(
        [A.Affine(rotate=20), A.HueSaturationValue(p=1), A.ToFloat(255), ToTensorV2()], seed=0
    )
    image, label = next(iter(DataLoader(Photographs(x, y, compose), batch_size=16)))
    rows = {"clean": (x, y), "in the dataset": (image, label), "+ RobustMixup": mix(image, label)}

    holes = BatchPipeline(A.Compose([A.CoarseDropout(p=1.0), A.GaussianBlur(p=0.5)]), seed=0)
    rows["RobustMixup,\n+ holes and blur"] = v2.Compose([mix, holes])(x, y)
    grid(rows, options.out)


if __name__ == "__main__":
    main()
