"""Budgets for Fog, Snow and Gabor at 32 pixels, where their source has none.

Run:  IJSAT_DATA=... python benchmarks/robustness/calibrate.py     (half an hour on one core)

A small ordinary ResNet is trained on CIFAR-10 with crop and flip, and attacked in each space at
budgets 1/32, 1/16, ... 8 Three budgets of each are recorded, the smallest, to 4 %, that bring the
accuracy down to: that under L-inf 8/255 plus one point; 10 %, which is chance; half of the clean
accuracy. Where the first cannot be reached, the smallest budget within one point of the lowest
accuracy stands for it, as "saturated".
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import record
from benchmarks.networks import cifar_resnet18
from benchmarks.real_data import cifar10
from benchmarks.training import LOW_PRECISION, train_plainly
from ijsat_aug.attack import (
    Landscape,
    LinfBall,
    ModelHandle,
    Picture,
    Pixels,
    Variable,
    ascend,
    cross_entropy,
)
from ijsat_aug.attack.balls import Draw
from ijsat_aug.evaluation.spaces import SPACES, Space

TO_CALIBRATE = ("fog", "snow", "gabor")
GRID = [2.0**k for k in range(-5, 4)]
POINT = 0.01
BATCH = 128


def linf(
    images: Tensor, budget: float, steps: int, uniform: Draw
) -> tuple[Picture, dict[str, Variable]]:
    """PGD on the pixels, with the steps of the other spaces."""
    ball = LinfBall(images, budget, box=(0.0, 1.0))
    start = ball.project(images + budget * (2 * uniform(tuple(images.shape)) - 1))
    return Pixels(), {"pixel": Variable(start, ball, budget / math.sqrt(steps), (True,) * steps)}


def accuracy(
    handle: ModelHandle, images: Tensor, labels: Tensor, steps: int, seed: int,
    space: Space, budget: float,
) -> float:  # fmt: skip
    """The share of images that are still told right."""
    uniform = partial(torch.rand, generator=torch.Generator().manual_seed(seed))
    right = 0
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        with handle.frozen(x.device):
            picture, variables = space(x, budget, steps, uniform)
            found = ascend(Landscape(picture, handle, cross_entropy, y), variables, best=True)
            with torch.no_grad():
                right += int((handle(found.image).argmax(1) == y).sum())
    return right / len(images)


class Curve:
    """Accuracy against the budget, each measured once."""

    def __init__(self, measure: Callable[[float], float]) -> None:
        self.measure = measure
        self.known: dict[float, float] = {}

    def at(self, budget: float) -> float:
        """The accuracy at a budget of three digits."""
        budget = float(f"{budget:.3g}")
        if budget not in self.known:
            self.known[budget] = self.measure(budget)
            print(f"  {budget:<8.3g} {self.known[budget]:.3f}")
        return self.known[budget]

    def smallest(self, target: float, halvings: int = 4) -> float | None:
        """The smallest budget with at most this accuracy; None where the grid has none."""
        reaching = next((budget for budget in GRID if self.at(budget) <= target), None)
        if reaching is None:
            return None
        low, high = reaching / 2, reaching
        for _ in range(halvings):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.at(middle) <= target else (middle, high)
        return float(f"{high:.3g}")


def calibrate(curve: Curve, clean: float, hard: float) -> dict[str, Any]:
    """The three budgets of a space, and all that was measured."""
    as_linf = curve.smallest(hard + POINT)
    lowest = min(curve.known.values())
    budgets = {
        "as_linf_8": as_linf,
        "saturated": None if as_linf is not None else curve.smallest(lowest + POINT),
        "to_chance": curve.smallest(0.1),
        "to_half": curve.smallest(clean / 2),
    }
    return {**budgets, "accuracy": {str(b): curve.known[b] for b in sorted(curve.known)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spaces", nargs="+", default=list(TO_CALIBRATE), choices=list(SPACES))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=Path, help="kept there, and used where it is")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    network = train_plainly(
        partial(cifar_resnet18, width=16), *cifar10(), options.epochs, seed=options.seed,
        weights=options.weights,
    )  # fmt: skip
    images, labels = (part[: options.images] for part in cifar10(train=False))
    images = images.float() / 255
    memory = torch.channels_last
    handle = ModelHandle(network, amp_dtype=LOW_PRECISION, memory_format=memory)
    under = partial(accuracy, handle, images, labels, options.steps, options.seed)
    clean, hard = under(linf, 0.0), under(linf, 8 / 255)
    print(f"clean {clean:.3f}, L-inf 8/255 {hard:.3f}")
    found = {}
    for name in options.spaces:
        print(name)
        found[name] = calibrate(Curve(partial(under, SPACES[name].space)), clean, hard)
        print({key: value for key, value in found[name].items() if key != "accuracy"})
    published = {
        name: under(info.space, info.budget)
        for name, info in SPACES.items()
        if name not in (*TO_CALIBRATE, "lpips")
    }
    print("at their published budgets", published)
    if not options.no_record:
        facts = {"network": "cifar_resnet18, width 16", "epochs": options.epochs}
        facts |= {"images": options.images, "steps": options.steps, "seed": options.seed}
        facts |= {"clean": clean, "linf_8": hard, "spaces": found, "published": published}
        print(record("calibration", facts))


if __name__ == "__main__":
    main()
