"""In the middle of a kornia sequence, with images and labels together.

Run:  pip install -e ".[demo]"
      python examples/compose_kornia.py             (ten seconds)

It shows one container with kornia's augmentations and ours, the replay of its parameters, and a
flow of 32-pixel images on 64-pixel ones: their low band moves along its manifold. The pictures are
in runs/compose_kornia.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import kornia.augmentation as K
import torch
from photographs import SIZE, grid, network, pieces

from ijsat_aug import JointSpaceAdv, RobustMixup, load_flow
from ijsat_aug.flows import Pyramid
from ijsat_aug.integrations.kornia import AugmentationSequential


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compose_kornia.png"))
    options = parser.parse_args()
    torch.manual_seed(0)

    x, y = pieces()
    net = network(x, y)
    x, y = x[:16], y[:16]
    flow = Pyramid(load_flow("cifar10-fast"), (SIZE, SIZE))
    latent = JointSpaceAdv(net, flow, eps=0, steps=3, random_start=False)
    steps = {
        "flip": K.RandomHorizontalFlip(p=0.5),
        "latent move": latent,
        "colours": K.ColorJiggle(0.2, 0.2, 0.2, 0.05, p=1.0),
        "RobustMixup": RobustMixup(net, num_classes=2, eps=8 / 255, steps=3),
    }
    rows = {"clean": (x, y)}
    for count in range(1, len(steps) + 1):
        augment = AugmentationSequential(
            *list(steps.values())[:count], data_keys=["input", "class"]
        )
        torch.manual_seed(1)  # the same draws, one step more
        image, label = augment(x, y)
        rows["+ " + list(steps)[count - 1]] = (image, label)
    again, _ = augment(x, y, params=augment._params)
    print("replayed exactly:", torch.equal(again, image))
    grid(rows, options.out)


if __name__ == "__main__":
    main()
