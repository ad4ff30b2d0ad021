"""The studies of accuracy and robustness on one GPU, the trainings of each side by side.

Run:  IJSAT_DATA=... python benchmarks/all_on_a_gpu.py --studies finetuning --minutes 5

What each is, their own scripts tell: ``accuracy/finetune.py`` with a ResNet-18 of full width,
``accuracy/lowdata.py`` with 500 and 2,500 labels, ``robustness/train.py`` and its evaluation.
First the plain networks that are trained on, and the time of every step when nothing else runs;
then all at once, until the deadline; what is not finished then is left out. The fine-tuning against
corruptions is chosen on the validation images of seed 100: the best there of those that lose no
more than 0.3 points on clean images, or the one that loses least. "few labels" takes a core for
each of five flows of labelled images. One study at a time: an H100 did the nine adversarial
trainings in two and a half minutes and five seeds of the fine-tunings in four. It is no place for
their evaluation: AutoAttack in eight processes at once was not done in three minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.accuracy import lowdata
from benchmarks.accuracy.augmentations import LATENT, LONG, MIXED
from benchmarks.accuracy.finetune import RIVALS, FineTuning
from benchmarks.accuracy.lowdata import SPLIT, LowData
from benchmarks.accuracy.study import TUNING, Study, prepare
from benchmarks.accuracy.together import courses_of, train_row
from benchmarks.graphs import Training, finish, side_by_side
from benchmarks.harness import record
from benchmarks.robustness import train as robustness
from benchmarks.training import LOW_PRECISION
from ijsat_aug import load_flow
from ijsat_aug.flows.frozen import FrozenGlow

CANDIDATES = (
    "joint step, half of each batch", "joint step, third of each batch",
    "joint step, quarter of each batch",
)  # fmt: skip
SPLIT_JOINT = "joint step of 1 level, split BatchNorm"
TRANSFER = (
    "plain", "mixup", LATENT, MIXED, LONG.format("plain", MIXED), LONG.format("mixup", MIXED),
)  # fmt: skip
SHARED = (
    "plain", "mixup", "CutMix", "latent noise", "OM", "pixel step", "JointSpaceAdv", "RobustMixup",
    "IJSAT", MIXED, LONG.format("mixup", MIXED),
)  # fmt: skip
MORE = (*SPLIT, LATENT, "CutMix + latent step, second half", LONG.format("mixup", "IJSAT"))
SEEDS = tuple(range(5))
STUDIES = ("robustness", "finetuning", "transfer", "few labels")
Begin = Callable[[], Training]


def later(ready: Callable[[], bool], then: Begin) -> Training:
    """A training that waits for something."""
    while not ready():
        yield
    yield from then()


def is_there(study: Study, row: str, setting: str | int, seed: int) -> bool:
    """Whether a run is finished."""
    return study.file(study.planned(row, setting, seed)).is_file()


def best_of(study: FineTuning, setting: str) -> str:
    """The candidate that the images that validate choose."""
    plain, *found = (study.run(row, setting, TUNING) for row in ("plain", *CANDIDATES))
    cheap = [one for one in found if one["last"] >= plain["last"] - 0.3]
    by = itemgetter("corruptions" if cheap else "last")
    return str(max(cheap or found, key=by)["row"])


def finetunings(study: FineTuning, device: torch.device, seeds: Sequence[int]) -> list[Begin]:
    """A little more training with all images."""
    setting = "48000"
    beside = (SPLIT_JOINT, LATENT, LONG.format("plain", LATENT))
    courses = courses_of(study, ("plain", *CANDIDATES, *beside), setting, TUNING, device)

    def of(row: str, *wanted: int) -> Begin:
        return partial(train_row, study, row, [setting], wanted, courses)

    def chosen() -> Training:
        row = best_of(study, setting)
        print("chosen:", row, flush=True)
        yield from of(row, *seeds)()

    def has_tuned() -> bool:
        return all(is_there(study, row, setting, TUNING) for row in ("plain", *CANDIDATES))

    return [
        of("plain", TUNING, *seeds), *(of(row, TUNING) for row in CANDIDATES),
        partial(later, has_tuned, chosen), *(of(row, *seeds) for row in beside),
    ]  # fmt: skip


def transfers(study: FineTuning, device: torch.device) -> list[Begin]:
    """Few images of new classes."""
    courses = courses_of(study, TRANSFER, "transfer", 0, device)
    return [partial(train_row, study, row, ["transfer"], SEEDS, courses) for row in TRANSFER]


def few_labels(
    work: Path, flow: FrozenGlow, device: torch.device
) -> tuple[list[Begin], list[Begin]]:
    """Trainings with 500 labels, and then with 2,500; at last with flows of these images."""
    study = LowData("cifar10", work, flow, own_flow=False)
    own = LowData("cifar10", work, flow, own_flow=True)
    courses = courses_of(study, (*SHARED, *MORE), 500, 0, device)

    def flow_is_there(seed: int) -> bool:
        return (own.work / f"flow-2500-{seed}" / "model.safetensors").is_file()

    def with_own_flow(seed: int) -> Begin:
        then = partial(train_row, own, MIXED, [2500], [seed], courses)
        return partial(later, partial(flow_is_there, seed), then)

    first: list[Begin] = [
        partial(train_row, study, row, [500], SEEDS, courses) for row in (*SHARED, *MORE)
    ]
    second: list[Begin] = [partial(train_row, study, row, [2500], SEEDS, courses) for row in SHARED]
    return first, [*map(with_own_flow, SEEDS), *second]


def adversarial(
    options: argparse.Namespace, flow: FrozenGlow, until: float
) -> tuple[list[Begin], Begin]:
    """Adversarial trainings, and their evaluation in processes of its own."""
    work: Path = options.work / "robust"
    defaults = robustness.parser().parse_args(["--work", str(work)])
    plan = robustness.planned(defaults)
    begin = robustness.trainings(robustness.ROWS, plan, flow.to(plan.device))

    def evaluate() -> Training:
        left = until - time.monotonic() - 40  # a threat that has begun is finished
        command = [sys.executable, robustness.__file__, "--evaluate", "--work", str(work)]
        command += ["--processes", str(options.processes), "--images", str(options.images)]
        with (work / "evaluation.log").open("w") as log:
            process = subprocess.Popen([*command, "--seconds", str(left)], stdout=log, stderr=log)
        try:
            while process.poll() is None:
                yield
        finally:
            process.terminate()

    def trained() -> bool:
        return all(robustness.is_trained(work, row) for row in robustness.ROWS)

    return begin, partial(later, trained, evaluate)


def train_flow(work: Path, seed: int) -> None:
    """The flow of the labelled images of a seed."""
    torch.set_num_threads(1)
    study = LowData("cifar10", work, load_flow("cifar10-fast"), own_flow=True)
    study.flow_of(study.planned(MIXED, 2500, seed))


def begin_flows(options: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """The flows of labelled images, each on a core."""
    alone = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--work", str(options.work), "--flow"]
    return [subprocess.Popen([*command, str(seed)], env=alone) for seed in SEEDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--width", type=int, default=64, help="of the ResNet-18")
    parser.add_argument("--batch", type=int, default=256, help="of the fine-tunings")
    parser.add_argument("--seeds", type=int, default=4, help="of the fine-tunings")
    parser.add_argument("--images", type=int, default=1000, help="under attack")
    parser.add_argument("--processes", type=int, default=3, help="that attack")
    parser.add_argument("--flow", type=int, help="train that of this seed alone")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    if options.flow is not None:
        train_flow(options.work / "lowdata", options.flow)
        return
    prepare()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flow = load_flow("cifar10-fast", compute_dtype=LOW_PRECISION)
    flows = begin_flows(options) if "few labels" in options.studies else []
    try:
        run(options, flow, device, until)
    finally:
        for process in flows:
            process.kill()
    finish(device)
    for name, result in results(options, flow).items():
        print(record(name, result))


def run(options: argparse.Namespace, flow: FrozenGlow, device: torch.device, until: float) -> None:
    """Measure, and train until the deadline."""
    now: list[Begin] = []
    then: list[Begin] = []
    study = tuned(options, flow)
    if "robustness" in options.studies:
        trainings, evaluation = adversarial(options, flow, until)
        now += [*trainings, evaluation]
    if "finetuning" in options.studies:
        now += finetunings(study, device, range(options.seeds))
    if "transfer" in options.studies:
        now += transfers(study, device)
    if "few labels" in options.studies:
        first, then = few_labels(options.work / "lowdata", flow, device)
        now += first
    print(f"measured, {until - time.monotonic():.0f} s are left", flush=True)
    side_by_side([*now, *then], len(now), until=until)


def tuned(options: argparse.Namespace, flow: FrozenGlow) -> FineTuning:
    """The study of fine-tunings."""
    return FineTuning(options.work / "finetune", flow, options.width, options.batch)


def results(options: argparse.Namespace, flow: FrozenGlow) -> dict[str, dict[str, Any]]:
    """What is finished of the accuracy studies; ``robustness/train.py --record`` has its own."""
    found = {}
    if {"finetuning", "transfer"} & set(options.studies):
        study = tuned(options, flow)
        for name, seeds in (("cifar10", SEEDS), ("tuning", (TUNING,))):
            result = study.result(seeds, RIVALS)
            found[f"finetune-{name}-gpu"] = study.facts | result
    if "few labels" in options.studies:
        few = LowData("cifar10", options.work / "lowdata", flow, own_flow=False)
        found["lowdata-cifar10-gpu"] = few.facts | few.result(SEEDS, lowdata.RIVALS)
    return found


if __name__ == "__main__":
    main()
