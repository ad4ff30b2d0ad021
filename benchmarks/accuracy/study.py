"""What the accuracy studies share: one training, a file for every run, means and intervals.

A training is an ordinary loop around :class:`AugmentedLoader`: SGD, one learning-rate cycle, crop
and flip, channels-last, and autocast to bfloat16 where the processor has it. It takes so many
steps, or as many as fit into so much processor time. Labelled images that it does not see choose
the best epoch.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor, nn

from benchmarks.accuracy.augmentations import AS_LONG, PARTS, ROWS, Augmentation
from benchmarks.graphs import Training
from benchmarks.harness import RESULTS, hardware, machines, made, makings
from benchmarks.real_data import cifar10, fashion_mnist
from benchmarks.training import LOW_PRECISION, Labelled, Seen, crop_and_flip, low_precision
from ijsat_aug import load_flow
from ijsat_aug.flows.files import write_atomically
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.training import AugmentedLoader

DATA = {"cifar10": cache(cifar10), "fashion-mnist": cache(fashion_mnist)}
FLOWS = {"cifar10": "cifar10-fast", "fashion-mnist": "fashion-mnist"}
BATCH = 128
TUNING = 100  # the first seed that is tested on validation images
Batches = Iterator[tuple[Tensor, Tensor]]
Interval = tuple[float, float | None]


@dataclass(frozen=True)
class Task:
    """What is learnt, and for how long.

    Attributes:
        learnt: Images and labels to train on.
        validation: Those that choose the best epoch.
        steps: Of the optimiser.
        peak: Learning rate at the top of the cycle.
        batch: Images a step.
    """

    learnt: Labelled
    validation: Labelled
    steps: int
    peak: float = 0.1
    batch: int = BATCH


@dataclass(frozen=True)
class Trained:
    """What a training left: the network with its last weights, the best ones, and the facts."""

    network: nn.Module
    best: dict[str, Tensor]
    facts: dict[str, Any]


def train(
    task: Task, network: nn.Module, augmentation: Augmentation, seconds: float | None = None
) -> Trained:
    """One training, for ``task.steps``, or for so much processor time."""
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        network.parameters(), task.peak, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    times = augmentation.loading.get("replay", 1)
    batches = endless(*task.learnt, task.batch)
    if augmentation.before is not None:
        batches = itertools.starmap(augmentation.before, batches)
    part = Part(batches, (max(1, len(steps_of(p, task)) // times) for p in itertools.count()))
    parts = itertools.repeat(AugmentedLoader(part, augmentation.transform, **augmentation.loading))
    best: tuple[float, dict[str, Tensor]] = (-1.0, {})
    begin, paused, step, done = time.process_time(), 0.0, 0, 0.0
    next_check = 1 / PARTS
    seen = Seen(network)
    for x, y in itertools.chain.from_iterable(parts):
        optimizer.param_groups[0]["lr"] = task.peak * cycle(done)
        x = x.contiguous(memory_format=torch.channels_last)
        with low_precision(x):
            loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        used = time.process_time() - begin - paused
        done = step / task.steps if seconds is None else used / seconds
        if done >= next_check or done >= 1:
            since = time.process_time()
            trained_on = seen.images
            score = accuracy(network, task.validation)
            seen.images = trained_on
            if score > best[0]:
                best = (score, copy.deepcopy(network.state_dict()))
            next_check += 1 / PARTS
            paused += time.process_time() - since
        if done >= 1:
            break
    seen.close()
    facts = {
        "steps": step, "seconds": round(used, 1), "passes": round(seen.images / task.batch),
        "loss": round(float(loss.detach()), 4), "validation": best[0],
    }  # fmt: skip
    return Trained(network, best[1], facts)


def cycle(done: float) -> float:
    """Share of the peak: up over the first tenth, and down to nothing along a cosine."""
    if done < 0.1:
        return 0.1 + 9 * done
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - 0.1) / 0.9)))


def steps_of(part: int, task: Task) -> range:
    """The steps of one of the parts."""
    begin, end = (round(task.steps * p / PARTS) for p in (part, part + 1))
    return range(begin, end)


def endless(images: Tensor, labels: Tensor, size: int = BATCH) -> Batches:
    """Batches of crops, in a new order each epoch; what is left of an epoch opens the next."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(images))])
        index, order = order[:size], order[size:]
        yield crop_and_flip(images[index]), labels[index]


def of(data: Labelled, index: Tensor) -> Labelled:
    """Some of the images, with their labels."""
    images, labels = data
    return images[index], labels[index]


def of_each(order: Tensor, labels: Tensor, classes: Iterable[int], count: int) -> Tensor:
    """The first so many of each class, in a given order of the images."""
    return torch.cat([order[labels[order] == c][:count] for c in classes])


class Part:
    """So many of the batches as it is its turn, and the next ones when it is asked again."""

    def __init__(self, batches: Batches, counts: Iterator[int]) -> None:
        self.batches, self.counts = batches, counts

    def __iter__(self) -> Batches:
        return itertools.islice(self.batches, next(self.counts))


def accuracy(network: nn.Module, data: Labelled) -> float:
    """Percent right."""
    return 100 * int(right(network, data)) / len(data[1])


@torch.no_grad()
def right(network: nn.Module, data: Labelled) -> Tensor:
    """How many are right, on the device of the network."""
    device = next(network.parameters()).device
    was = network.training
    network.eval()
    found = torch.zeros((), dtype=torch.long, device=device)
    images, labels = (part.to(device).split(500) for part in data)
    with low_precision(found):
        for x, y in zip(images, labels, strict=True):
            x = (x.float() / 255).contiguous(memory_format=torch.channels_last)
            found += (network(x).argmax(1) == y).sum()
    network.train(was)
    return found


def both(trained: Trained, tested: Labelled) -> dict[str, Any]:
    """The facts, with the accuracy of the last and of the best epoch; the last weights stay."""
    network = trained.network
    last, scores = copy.deepcopy(network.state_dict()), {}
    for name, weights in (("best", trained.best), ("last", last)):
        network.load_state_dict(weights)
        scores[name] = accuracy(network, tested)
    return {**trained.facts, **scores}


@dataclass(frozen=True)
class Run:
    """A training of a study.

    Attributes:
        title: Its row in the tables.
        row: What is trained with.
        setting: Such as a number of labels.
        seed: Of all that is random.
        seconds: Processor time, for rows that train for as long as another.
    """

    title: str
    row: str
    setting: str | int
    seed: int
    seconds: float | None = None


class Study:
    """Runs of rows, settings and seeds, each kept in a file of its own.

    A study says where a run begins, what it learns and what it is tested on.

    Args:
        work: The folder of the files.
        network: Its name, for the record.
        settings: What there is to run.
        flow: Of the augmentations.
        suffix: Of the titles of rows.
    """

    def __init__(
        self,
        work: Path,
        network: str,
        settings: Sequence[str | int],
        flow: FrozenGlow,
        suffix: str = "",
    ) -> None:
        self.work, self.network, self.settings = work, network, settings
        self.flow, self.suffix = flow, suffix

    @property
    def facts(self) -> dict[str, Any]:
        """What its record says of all runs."""
        return {}

    @property
    def _identity(self) -> dict[str, Any]:
        """What all of its runs have in common."""
        return {"network": self.network, **self.facts}

    def claim(self) -> None:
        """Refuse a folder whose runs had another network, flow or size of batches."""
        path = self.work / "study.txt"
        ours = json.dumps(self._identity)
        theirs = path.read_text() if path.is_file() else ours
        if theirs != ours:
            raise SystemExit(f"{self.work} holds runs of {theirs}: give another --work.")
        write_atomically(path, ours.encode())

    def start(self, run: Run) -> nn.Module:
        """The network that a run begins with; the random state after it is that of its seed."""
        raise NotImplementedError

    def task(self, run: Run) -> Task:
        """What a run learns."""
        raise NotImplementedError

    def tested(self, run: Run) -> Labelled:
        """The images that a run is tested on."""
        raise NotImplementedError

    def flow_of(self, run: Run) -> FrozenGlow:
        """The flow of the augmentations of a run."""
        return self.flow

    def told(self, run: Run, trained: Trained) -> dict[str, Any]:
        """What a finished run says."""
        return both(trained, self.tested(run))

    def also(self, run: Run, trained: Trained) -> Training:
        """What a GPU tells of a finished run beside that, while others train."""
        return {}
        yield

    def train(self, run: Run) -> dict[str, Any]:
        """One training and its test."""
        task, flow = self.task(run), self.flow_of(run)
        network = self.start(run)
        trained = train(task, network, ROWS[run.row](network, flow), run.seconds)
        return self.told(run, trained)

    def planned(self, row: str, setting: str | int, seed: int) -> Run:
        """A run by its names."""
        return Run(row + self.suffix, row, setting, seed)

    def run(self, row: str, setting: str | int, seed: int) -> dict[str, Any]:
        """A run, or what its file says."""
        run = self.planned(row, setting, seed)
        path = self.file(run)
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        if row in AS_LONG:
            who, whom = AS_LONG[row]
            other = self.run(whom, setting, seed)
            if other["hardware"] != where():
                raise SystemExit(f"{row!r}: the seconds of {whom!r} are of {other['hardware']}.")
            run = replace(run, row=who, seconds=other["seconds"])
        return self.keep(run, self.train(run))

    def keep(self, run: Run, facts: dict[str, Any]) -> dict[str, Any]:
        """Write the file of a run."""
        names = {"row": run.title, "setting": run.setting, "seed": run.seed}
        result = {**names, **facts, **made(), "hardware": where()}
        keep(self.file(run), result)
        return result

    def file(self, run: Run, ending: str = ".json") -> Path:
        """Where something of a run lies."""
        name = f"{run.setting}-{run.title}-{run.seed}"
        return self.work / (name.replace(" ", "-").replace(",", "").replace("+", "and") + ending)

    def unpack(self, name: str) -> None:
        """Write the files of the runs of a record that are not there."""
        found = json.loads((RESULTS / f"{name}.json").read_text())
        ours = self._identity
        for key in ("network", "flow", "batch"):
            if found.get(key) != ours.get(key):
                raise SystemExit(f"{name} is of the {key} {found.get(key)}, not {ours.get(key)}.")
        self.claim()
        usual = {key: found[key] for key in (*made(), "hardware") if key in found}
        for one in found["runs"]:
            path = self.file(Run(one["row"], one["row"], one["setting"], one["seed"]))
            if not path.is_file():
                keep(path, one | {key: usual[key] for key in usual.keys() - one.keys()})

    def steps(self, row: str, setting: str | int) -> int | None:
        """Those of a run with another seed, where there is one: all have as many."""
        name = self.file(self.planned(row, setting, 0)).name.removesuffix("0.json")
        runs = (json.loads(path.read_text()) for path in sorted(self.work.glob(f"{name}*.json")))
        return next((int(one["steps"]) for one in runs if "steps" in one), None)

    def result(self, seeds: Sequence[int], rivals: Sequence[str]) -> dict[str, Any]:
        """All runs that are there, and what they say."""
        self.claim()
        runs = [json.loads(path.read_text()) for path in sorted(self.work.glob("*.json"))]
        runs = [one for one in runs if one["seed"] in seeds]
        by_setting = {
            str(setting): summary([one for one in runs if one["setting"] == setting], rivals)
            for setting in self.settings
        }
        return {
            **makings(runs),
            "hardware": machines(runs),
            "network": self.network,
            "seed": sorted({one["seed"] for one in runs}),
            "table": {setting: table for setting, table in by_setting.items() if table},
            "runs": runs,
        }  # fmt: skip


def where() -> str:
    """The machine, and the precision if it is not the usual one."""
    return hardware() + ("" if LOW_PRECISION else ", float32")


def keep(path: Path, result: dict[str, Any]) -> None:
    """Write the file of a run, and show what it says."""
    write_atomically(path, json.dumps(result).encode())
    print(json.dumps(result), flush=True)


def arguments(work: str) -> argparse.ArgumentParser:
    """The options of every study."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", choices=tuple(DATA), default="cifar10")
    parser.add_argument("--flow", help="name or folder; by default the fast one of the data")
    parser.add_argument("--settings", nargs="+", help="these alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument(
        "--only", nargs="+", choices=(*ROWS, *AS_LONG), metavar="ROW", help="these rows alone"
    )
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--unpack", help="begin with the runs of the JSON of this name")
    parser.add_argument("--record", help="write the JSON of this name of what is there")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="on a GPU: leave the rest undone"
    )
    parser.add_argument("--at-once", type=int, default=12, help="on a GPU: runs side by side")
    parser.add_argument("--together", action="store_true", help="on a CPU too as on a GPU")
    return parser


def flow_asked_for(options: argparse.Namespace) -> FrozenGlow:
    """The flow of the augmentations, of these options."""
    return load_flow(options.flow or FLOWS[options.data], compute_dtype=LOW_PRECISION)


def prepare() -> None:
    """One thread; on a GPU the fastest kernels."""
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = torch.cuda.is_available()


def interval(values: Iterable[float]) -> Interval:
    """Mean, and half the width of its 95 % interval (Student's t), which one value has not."""
    found = list(values)
    if len(found) < 2:
        return round(found[0], 4), None
    error = statistics.stdev(found) / math.sqrt(len(found))
    return round(statistics.mean(found), 4), round(student.ppf(0.975, len(found) - 1) * error, 4)


def summary(runs: Sequence[dict[str, Any]], rivals: Sequence[str]) -> dict[str, Any]:
    """For every row: what it reached and cost, and the difference to each rival, paired by seed."""
    by_row: dict[str, dict[int, dict[str, Any]]] = {}
    for one in runs:
        by_row.setdefault(one["row"], {})[one["seed"]] = one
    plain = _times_of_plain(list(by_row.get("plain", {}).values()))
    return {row: _entry(row, by_row, rivals, plain) for row in by_row}


def _times_of_plain(runs: Sequence[dict[str, Any]]) -> dict[str | None, float]:
    """What plain training took on the machine that made most runs of it.

    Times of two machines do not compare: only what was trained there has one.
    """
    if not runs:
        return {}
    machine = statistics.mode(one.get("hardware") for one in runs)
    took = [one["seconds"] for one in runs if one.get("hardware") == machine]
    return {machine: statistics.mean(took)}


def _entry(
    row: str,
    by_row: dict[str, dict[int, dict[str, Any]]],
    rivals: Sequence[str],
    plain: Mapping[str | None, float],
) -> dict[str, Any]:
    seeds = by_row[row]
    beside = [
        (one["seconds"], one.get("plain_seconds", plain.get(one.get("hardware"))))
        for one in seeds.values()
    ]
    times = [ours / theirs for ours, theirs in beside if theirs]
    entry: dict[str, Any] = {
        "seeds": sorted(seeds),
        "accuracy": interval(one["last"] for one in seeds.values()),
        "best_epoch": interval(one["best"] for one in seeds.values()),
        "steps": round(statistics.mean(one["steps"] for one in seeds.values())),
        "time": round(statistics.mean(times), 3) if times else None,  # against plain training
        "passes": round(statistics.mean(one["passes"] for one in seeds.values())),
    }
    as_long = [name for name, (_, whom) in AS_LONG.items() if whom == row]
    for rival in (*rivals, *as_long):
        others = by_row.get(rival, {}) if rival != row else {}
        for key, prefix in (("last", ""), ("corruptions", "corruptions ")):
            gains = [
                seeds[s][key] - others[s][key]
                for s in sorted(seeds.keys() & others.keys())
                if key in seeds[s] and key in others[s]
            ]
            if gains:
                entry[f"{prefix}over {rival}"] = interval(gains)
    damaged = [one["corruptions"] for one in seeds.values() if "corruptions" in one]
    return entry | ({"corruptions": interval(damaged)} if damaged else {})
