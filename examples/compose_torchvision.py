"""Beside torchvision's own augmentations: TrivialAugment, AugMix, CutMix, RandomErasing.

Run:  pip install -e ".[demo]"
      python examples/compose_torchvision.py       (ten seconds)

It shows the order that works: what changes single images first, then mixing and attacks on whole
batches, in [0, 1] (or with mean and std told), and erasing last, so that it hides attacked pixels
too. CutMix gives soft labels, and ours take them. The pictures are in runs/compose_torchvision.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from photographs import grid, network, pieces
from torchvision.transforms import v2

from ijsat_aug import RobustMixup


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compose_torchvision.png"))
    options = parser.parse_args()
    torch.manual_seed(0)

    x, y = pieces()
    net = network(x, y)
    x, y = x[:16], y[:16]
    as_bytes = v2.ToDtype(torch.uint8, scale=True)  # what these two want
    single = {
        "TrivialAugment": v2.Compose([as_bytes, v2.TrivialAugmentWide()]),
        "AugMix": v2.Compose([as_bytes, v2.AugMix()]),
    }
    rows = {"clean": (x, y)}
    for name, augment in single.items():
        each = torch.stack([augment(image) for image in x]) / 255
        rows[name] = (each, y)
        mix = RobustMixup(net, num_classes=2, eps=8 / 255, steps=3)
        rows[f"{name},\nRobustMixup"] = mix(each, y)
    batch = v2.Compose(
        [
            v2.CutMix(num_classes=2),
            RobustMixup(net, eps=8 / 255, steps=3),
            v2.RandomErasing(p=1.0),
        ]
    )
    rows["CutMix,\nRobustMixup,\nRandomErasing"] = batch(x, y)
    grid(rows, options.out)


if __name__ == "__main__":
    main()
