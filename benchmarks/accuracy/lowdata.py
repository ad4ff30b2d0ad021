"""What the augmentations are worth when labels are few: CIFAR-10 and Fashion-MNIST.

Run:  IJSAT_DATA=... python benchmarks/accuracy/lowdata.py        (days on two cores, all rows)

A ResNet-10 of 0.3 M parameters is trained from scratch on a class-balanced subset that the seed
draws. "Equal epochs" are equal optimiser steps. The rows "for as long as ..." train on until they
have used the processor time that the row they name used with the same seed. 1,000 other training
images with labels choose the best epoch; the test split is read at the end alone, with the weights
of the last and of the best epoch. Every run is a file of its own under ``--work`` and is not done
again, so that the study may be stopped; ``--only``, ``--settings`` and ``--seeds`` share it out
over processes. The flow has seen all training images, without labels; with ``--own-flow`` the
labelled ones alone, for five minutes. The settings of the latent step were chosen on the validation
images of seed 100: ``lowdata-tuning.json``, at 1,920 steps and with a flow of the same shape that
was trained for ten minutes. ``--record lowdata-cifar10`` writes what is there. On a GPU the runs
are trained side by side, as ``together.py`` says; an H100 does nine of 4,800 steps in a minute.
``--together --at-once 1`` does so on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.augmentations import EACH, LATENT, LONG, MIXED
from benchmarks.accuracy.study import (
    BATCH,
    DATA,
    TUNING,
    Run,
    Study,
    Task,
    arguments,
    flow_asked_for,
    of,
    of_each,
    prepare,
)
from benchmarks.accuracy.together import run_all
from benchmarks.harness import record
from benchmarks.networks import small_resnet
from benchmarks.training import LOW_PRECISION, Labelled
from ijsat_aug import load_flow
from ijsat_aug.flows.data import ImageData
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.flows.glow import GlowConfig
from ijsat_aug.flows.recipe import Recipe
from ijsat_aug.flows.trainer import train_flow

STEPS = {
    "cifar10": {500: 1440, 2500: 4800, 5000: 4800},
    "fashion-mnist": {500: 1440, 2500: 2880},
}
VALIDATION = 1000
OURS = ("OM", "pixel step", "JointSpaceAdv", "RobustMixup", "IJSAT")
SPLIT = tuple(f"{row}, split BatchNorm" for row in OURS)
TABLE = (
    "plain", "mixup", EACH, "CutMix", "latent noise", *OURS, *SPLIT, "mixup + OM", MIXED,
    LONG.format("mixup", MIXED), LONG.format(EACH, MIXED),
)  # fmt: skip
RIVALS = ("plain", "mixup", EACH, "CutMix", LATENT)
OWN = Recipe(
    minutes=5,
    lr=3e-3,
    warmup=300,
    flip=True,
    precision="bf16" if LOW_PRECISION else "fp32",
    held_out=0.1,
)


class LowData(Study):
    """Trainings from scratch on some images of a dataset."""

    def __init__(self, data: str, work: Path, flow: FrozenGlow, own_flow: bool) -> None:
        suffix = ", flow of the labelled images" if own_flow else ""
        super().__init__(work / data, "small_resnet", list(STEPS[data]), flow, suffix)
        self.data, self.own_flow = data, own_flow

    @property
    def facts(self) -> dict[str, Any]:
        """What its record says of all runs."""
        info = self.flow.info
        seen = {"sha256": info["weights"]["sha256"], "data": info["data"]}
        return {"flow": seen, "batch": BATCH}

    def start(self, run: Run) -> nn.Module:
        """New weights."""
        torch.manual_seed(run.seed)
        return small_resnet(channels=self.flow.shape[0])

    def task(self, run: Run) -> Task:
        """The images of the seed."""
        size = int(run.setting)
        data = DATA[self.data](train=True)
        learnt, validation = (of(data, part) for part in split(data[1], size, run.seed))
        return Task(learnt, validation, STEPS[self.data][size])

    def tested(self, run: Run) -> Labelled:
        """The test split; where settings are chosen, the images that validate."""
        tuning = run.seed >= TUNING
        return self.task(run).validation if tuning else DATA[self.data](train=False)

    def flow_of(self, run: Run) -> FrozenGlow:
        """The flow of all images, or one that has seen the labelled ones alone."""
        if not self.own_flow:
            return self.flow
        return self._flow_of(self.task(run).learnt, int(run.setting), run.seed)

    def _flow_of(self, learnt: Labelled, size: int, seed: int) -> FrozenGlow:
        """A flow that has seen the labelled images alone."""
        folder = self.work / f"flow-{size}-{seed}"
        if not (folder / "model.safetensors").is_file():
            name = f"{size} images of {self.data}, seed {seed}"
            data = ImageData(learnt[0], None, 256, name)
            config = GlowConfig.from_dict(self.flow.config.to_dict())
            train_flow(data, config, folder, OWN, resume=True, quiet=True)
        return load_flow(folder, compute_dtype=LOW_PRECISION)


def split(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """As many training images of each class, and the others that validate."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = of_each(order, labels, range(10), count // 10)
    rest = order[~torch.isin(order, chosen)]
    return chosen, rest[:VALIDATION]


def main() -> None:
    options = parse()
    prepare()
    study = LowData(options.data, options.work, flow_asked_for(options), options.own_flow)
    if options.unpack:
        study.unpack(options.unpack)
    if options.record:
        print(record(options.record, study.facts | study.result(options.seeds, RIVALS)))
    else:
        run_all(study, (MIXED,) if options.own_flow else TABLE, options)


def parse() -> argparse.Namespace:
    parser = arguments("runs/lowdata")
    parser.add_argument("--own-flow", action="store_true", help="trained on the labelled images")
    return parser.parse_args()


if __name__ == "__main__":
    main()
