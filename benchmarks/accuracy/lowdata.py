"""What the augmentations are worth when labels are few: CIFAR-10 with 500 and 2,500 of them.

Run:  IJSAT_DATA=... python benchmarks/accuracy/lowdata.py            (three hours on two cores)

A ResNet-10 of 0.3 M parameters is trained from scratch on a class-balanced subset that the seed
draws, with crop and flip everywhere, SGD, one learning-rate cycle, bfloat16 autocast and
channels-last. "Equal epochs" are equal optimiser steps. The rows "for as long as ..." train on
until they have used the processor time that the row they name used with the same seed. 1,000 other
training images with labels choose the best epoch; the test split is read at the end alone, with the
weights of the last and of the best epoch. Every run is a file of its own under ``--work`` and is
not done again, so that the study may be stopped; ``--only`` and ``--seeds`` share it out over
processes. The flow has seen all 50,000 training images, without labels. The settings were chosen on
the validation images of seed 100 alone: ``lowdata-tuning.json``, at 1,920 steps and with a flow of
the same shape that was trained for ten minutes. ``--record lowdata-cifar10`` writes what is there.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import record
from benchmarks.networks import small_resnet
from benchmarks.real_data import cifar10
from benchmarks.training import crop_and_flip
from ijsat_aug import JointSpaceAdv, RobustMixup, load_flow
from ijsat_aug.flows.calibration import recommended_eta
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.training import AugmentedLoader

STEPS = {500: 1440, 2500: 1600}
BATCH, VALIDATION, CHECKS = 128, 1000, 20
LOW: dict[str, Any] = {"amp_dtype": torch.bfloat16, "memory_format": torch.channels_last}
Batches = Iterator[tuple[Tensor, Tensor]]
# A transform and the loader's options, whose epochs are twentieths of the training.
Augmentation = tuple[Any, dict[str, Any]]
Augment = Callable[[nn.Module, FrozenGlow], Augmentation]


data = cache(cifar10)  # decoded once for all runs


def _none(network: nn.Module, flow: FrozenGlow) -> Augmentation:
    return (lambda batch: batch), {}


def _mixup(network: nn.Module, flow: FrozenGlow) -> Augmentation:
    mix = v2.MixUp(alpha=1.0, num_classes=10)
    return (lambda batch: mix(*batch)), {}


def _pixel(network: nn.Module, flow: FrozenGlow) -> Augmentation:
    return RobustMixup(network, num_classes=10, **LOW), {}


def _latent(
    network: nn.Module, flow: FrozenGlow, mixed: bool = True, begin: int = 0, **options: Any
) -> Augmentation:
    """A linear step on the manifold away from the model's own prediction, alone or on blends."""
    defaults = {"eps": 0, "target": "prediction", **LOW}
    latent = JointSpaceAdv(network, flow, **{**defaults, **options})
    transform = RobustMixup(network, num_classes=10, attack=latent) if mixed else latent
    return transform, {"epochs": (begin, None)}


def _replay(
    network: nn.Module, flow: FrozenGlow, mixed: bool = True, share: float = 1.0, **loading: Any
) -> Augmentation:
    """The same along the gradient of the training step, in every other step."""
    latent = JointSpaceAdv(None, flow, eps=0, eta=share * recommended_eta(flow, "linf"))
    transform = RobustMixup(network, num_classes=10, attack=latent) if mixed else latent
    return transform, {"replay": 2, **loading}


ROWS: dict[str, Augment] = {
    "plain": _none,
    "mixup": _mixup,
    "RobustMixup": _pixel,
    "latent step": partial(_latent, mixed=False),
    "latent step, replay": partial(_replay, mixed=False),
    "mixup + latent step": _latent,
    "latent step, second half": partial(_latent, mixed=False, begin=10),
    "mixup + latent step, second half": partial(_latent, begin=10),
    "mixup + latent step, half of each batch": partial(_latent, fraction=0.5),
    "mixup + latent step, replay": _replay,
    "mixup + latent step, replay, half the radius": partial(_replay, share=0.5),
    "mixup + latent step, replay, not in the last 30 %": partial(_replay, epochs=(0, 14)),
    "mixup + joint step": partial(_latent, eps=1 / 255),
}
# Who trains for as long as another row took, with the same seed.
AS_LONG = {
    f"{who}, for as long as {whom}": (who, whom)
    for who in ("plain", "mixup")
    for whom in ROWS
    if "latent" in whom
}


def endless(images: Tensor, labels: Tensor) -> Batches:
    """Batches of crops, in a new order each epoch; what is left of an epoch opens the next."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(images))])
        index, order = order[:BATCH], order[BATCH:]
        yield crop_and_flip(images[index]), labels[index]


class Part:
    """So many of the batches, and the next ones when it is asked again."""

    def __init__(self, batches: Batches, count: int) -> None:
        self.batches, self.count = batches, count

    def __iter__(self) -> Batches:
        return itertools.islice(self.batches, self.count)


def split(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """As many training images of each class, and the others that validate."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[labels[order] == c][: count // 10] for c in range(10)])
    rest = order[~torch.isin(order, chosen)]
    return chosen, rest[:VALIDATION]


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent right."""
    was = network.training
    network.eval()
    right = 0
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            x = (x.float() / 255).contiguous(memory_format=torch.channels_last)
            right += int((network(x).argmax(1) == y).sum())
    network.train(was)
    return 100 * right / len(labels)


def train(
    row: str, size: int, seed: int, flow: FrozenGlow, *, seconds: float | None = None
) -> dict[str, Any]:
    """One run: so many steps, or as many as fit into so much processor time."""
    images, labels = data(train=True)
    chosen, rest = split(labels, size, seed)
    torch.manual_seed(seed)
    network = small_resnet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    transform, options = ROWS[row](network, flow)
    times = options.get("replay", 1)
    part = Part(endless(images[chosen], labels[chosen]), STEPS[size] // (CHECKS * times))
    parts = itertools.repeat(AugmentedLoader(part, transform, **options))
    best: tuple[float, dict[str, Tensor]] = (-1.0, {})
    begin, paused, step, done = time.process_time(), 0.0, 0, 0.0
    next_check = 1 / CHECKS
    for x, y in itertools.chain.from_iterable(parts):
        optimizer.param_groups[0]["lr"] = cycle(done)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        used = time.process_time() - begin - paused
        done = step / STEPS[size] if seconds is None else used / seconds
        if done >= next_check or done >= 1:
            since = time.process_time()
            score = accuracy(network, images[rest], labels[rest])
            if score > best[0]:
                best = (score, copy.deepcopy(network.state_dict()))
            next_check += 1 / CHECKS
            paused += time.process_time() - since
        if done >= 1:
            break
    tested, answers = data(train=False)
    last = accuracy(network, tested, answers)
    network.load_state_dict(best[1])
    return {
        "row": row, "size": size, "seed": seed, "steps": step, "seconds": round(used, 1),
        "loss": round(float(loss.detach()), 4), "last": last,
        "best": accuracy(network, tested, answers), "validation": best[0],
    }  # fmt: skip


def cycle(done: float) -> float:
    """Up to 0.1 over the first tenth, and down to nothing along a cosine."""
    if done < 0.1:
        return 0.01 + 0.9 * done
    return 0.05 * (1 + math.cos(math.pi * min(1.0, (done - 0.1) / 0.9)))


def run(row: str, size: int, seed: int, flow: FrozenGlow, work: Path) -> dict[str, Any]:
    """A run, or what its file says."""
    name = row.replace(" ", "-").replace(",", "").replace("+", "and")
    path = work / f"{size}-{name}-{seed}.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    seconds = None
    trained = row
    if row in AS_LONG:
        trained, whom = AS_LONG[row]
        seconds = run(whom, size, seed, flow, work)["seconds"]
    result = train(trained, size, seed, flow, seconds=seconds) | {"row": row}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    print(json.dumps(result), flush=True)
    return result


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval (Student's t), which one value has not."""
    if len(values) < 2:
        return round(values[0], 2), None
    t = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
    half = t[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return round(statistics.mean(values), 2), round(half, 2)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For every size and row: accuracy, cost, and the paired difference to mixup and to plain."""
    table: dict[str, Any] = {}
    by_row: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for one in runs:
        by_row.setdefault((one["size"], one["row"]), {})[one["seed"]] = one
    for (size, row), seeds in by_row.items():
        entry: dict[str, Any] = {
            "seeds": sorted(seeds),
            "accuracy": interval([one["last"] for one in seeds.values()]),
            "best_epoch": interval([one["best"] for one in seeds.values()]),
            "steps": round(statistics.mean(one["steps"] for one in seeds.values())),
            "seconds": round(statistics.mean(one["seconds"] for one in seeds.values()), 1),
        }
        rivals = ["plain", "mixup", "latent step, second half"]
        for rival in [*rivals, f"mixup, for as long as {row}"]:
            other = by_row.get((size, rival), {})
            shared = sorted(seeds.keys() & other.keys())
            if rival != row and shared:
                gains = [seeds[s]["last"] - other[s]["last"] for s in shared]
                entry[f"over {rival}"] = interval(gains)
        table.setdefault(str(size), {})[row] = entry
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flow", default="cifar10-fast", help="name or folder")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--only", nargs="+", choices=(*ROWS, *AS_LONG), help="these rows alone")
    parser.add_argument("--work", type=Path, default=Path("runs/lowdata"))
    parser.add_argument("--record", help="write the JSON of this name of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flow = load_flow(options.flow, compute_dtype=torch.bfloat16)
    if options.record is None:
        for seed in options.seeds:
            for size in options.sizes:
                for row in options.only or (*ROWS, *AS_LONG):
                    run(row, size, seed, flow, options.work)
        return
    runs = [json.loads(path.read_text()) for path in sorted(options.work.glob("*.json"))]
    runs = [one for one in runs if one["seed"] in options.seeds]
    result = {
        "network": "small_resnet", "batch": BATCH, "threads": 1,
        "seed": sorted({one["seed"] for one in runs}),
        "flow": {"sha256": flow.info["weights"]["sha256"], "data": flow.info["data"]},
        "table": summary(runs), "runs": runs,
    }  # fmt: skip
    print(record(options.record, result))


if __name__ == "__main__":
    main()
