"""What adversarially trained networks withstand, in several processes and until a deadline.

What says most comes first: AutoAttack on the last networks, then the other threats on them, then
the unseen ones at half of these budgets, then AutoAttack on the best networks. Every finished
threat is a file of its own, so that nothing is lost with a process, and what is missing can be done
later, also on other hardware.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.harness import keep_memory
from benchmarks.networks import like_weights
from benchmarks.real_data import cifar10
from ijsat_aug import load_flow
from ijsat_aug.evaluation import Report, evaluate
from ijsat_aug.evaluation.draws import Draws
from ijsat_aug.evaluation.report import Entry
from ijsat_aug.evaluation.spaces.table import SPACES
from ijsat_aug.evaluation.store import Store, fingerprint
from ijsat_aug.evaluation.threats import UNSEEN, Threat, make_threat
from ijsat_aug.evaluation.victim import Found, Victim
from ijsat_aug.flows.frozen import FrozenGlow

CLEAN = Entry("clean", "clean", "clean", "", 0, "")


def strongest(levels: float) -> tuple[str, ...]:
    """AutoAttack, at so many 255ths."""
    return (f"autoattack={levels:g}/255",)


def others(levels: float) -> tuple[str, ...]:
    """PGD, the joint space, and the unseen threats, whose usual budgets go with 8/255."""
    return (f"linf={levels:g}/255@50", f"jsa={levels:g}/255", *unseen(levels / 8))


def gentle(levels: float) -> tuple[str, ...]:
    """The unseen threats at half of these budgets, as the whole ones leave next to nothing."""
    return unseen(levels / 16)


def unseen(share: float) -> tuple[str, ...]:
    """The unseen threats at a share of their usual budgets."""
    return tuple(f"{name}={SPACES[name].budget * share:g}" for name in UNSEEN)


def levels_of(training: Path) -> float:
    """The budget of a training, in 255ths."""
    facts = json.loads((training / "training.json").read_text())
    return float(facts.get("levels", 4))


# What is measured on the last network of a training, and on its best; in the order of the work.
EVALUATIONS = {"last": (strongest, others), "gentle": (gentle,), "best": (strongest,)}


@dataclass(frozen=True)
class Job:
    """Some threats to one network.

    Attributes:
        training: Folder of the training.
        name: ``"last"`` or ``"best"``, the network; ``"gentle"`` is the last one.
        threats: As :func:`ijsat_aug.evaluation.evaluate` takes them.
        count: Of the test images.
        progress: Whether to show bars.
    """

    training: Path
    name: str
    threats: tuple[str, ...]
    count: int
    progress: bool = True

    @property
    def folder(self) -> Path:
        """Where the results are kept."""
        return self.training / f"{self.name}-{self.count}"

    def network(self) -> nn.Module:
        """The network, on the CPU."""
        name = "best" if self.name == "best" else "last"
        return like_weights(load_file(self.training / f"{name}.safetensors"))


def jobs(trainings: Sequence[Path], count: int, progress: bool = True) -> list[Job]:
    """All that there is to do, what says most first."""
    return [
        Job(training, name, threats(levels_of(training)), count, progress)
        for name, parts in EVALUATIONS.items()
        for threats in parts
        for training in trainings
    ]


def attack_all(todo: Sequence[Job], processes: int, until: float | None) -> None:
    """Do the jobs; one that fails lets the others finish.

    Args:
        todo: In this order.
        processes: How many are done at once.
        until: The ``time.monotonic()`` from which on no threat begins.
    """
    if processes == 1:
        for job in todo:
            attack(job, until)
        return
    work = partial(attack, until=until)
    with ProcessPoolExecutor(processes, get_context("spawn"), one_thread) as pool:
        running = [pool.submit(work, job) for job in todo]
        errors = [error for one in running if (error := one.exception()) is not None]
    for error in errors:
        print(f"failed: {error!r}", flush=True)
    if errors:
        raise errors[0]


def one_thread() -> None:
    """What every process of the study begins with."""
    torch.set_num_threads(1)
    keep_memory()


def attack(job: Job, until: float | None) -> None:
    """Measure what the network withstands, and keep it."""
    flow, (images, labels) = flow_and_images(job.count)
    if too_late(until) or kept(job) is not None:
        return
    gpu = torch.cuda.is_available()
    network = job.network().to("cuda" if gpu else "cpu")
    network.to(memory_format=torch.channels_last)
    threats = [timed(make_threat(name, flow, images.shape[1:]), until) for name in job.threats]
    title, began = f"{job.training.name}, {job.name}", time.monotonic()
    try:
        evaluate(
            network, images, labels, threats=threats, flow=flow, corruptions=(),
            batch_size=1000 if gpu else 250, folder=job.folder, progress=job.progress, name=title,
        )  # fmt: skip
    except OutOfTimeError:
        title += ", out of time"
    print(f"{title}: {job.threats[0]} ... {time.monotonic() - began:.1f} s", flush=True)


@cache
def flow_and_images(count: int) -> tuple[FrozenGlow, tuple[Tensor, Tensor]]:
    """The flow of the attacks, and the first test images."""
    images, labels = cifar10(train=False)
    return load_flow("cifar10-fast"), (images[:count], labels[:count])


class OutOfTimeError(Exception):
    """The deadline is over."""


def too_late(until: float | None) -> bool:
    """Whether the deadline is over."""
    return until is not None and time.monotonic() >= until


def timed(threat: Threat, until: float | None) -> Threat:
    """The threat, which does not begin after the deadline."""

    def attack(victim: Victim, x: Tensor, y: Tensor, draws: Draws) -> Found:
        if too_late(until):
            raise OutOfTimeError
        return threat.attack(victim, x, y, draws)

    return replace(threat, attack=attack)


def kept(job: Job) -> Report | None:
    """What is known of its threats; None while one is missing."""
    place = job.folder / "settings.json"
    if not place.is_file():
        return None
    flow, (images, _) = flow_and_images(job.count)
    settings = json.loads(place.read_text()) | {"model": fingerprint(job.network())}
    store = Store(job.folder, settings)
    threats = [make_threat(name, flow, images.shape[1:]) for name in job.threats]
    results = {entry.name: store.get(entry) for entry in (CLEAN, *threats)}
    found = {name: result for name, result in results.items() if result is not None}
    return Report(settings, found) if len(found) == len(results) else None


def reports(training: Path, count: int) -> dict[str, Report]:
    """What the networks of a training withstand, in each evaluation of which all is known."""
    levels, found = levels_of(training), {}
    for name, parts in EVALUATIONS.items():
        threats = tuple(one for part in parts for one in part(levels))
        report = kept(Job(training, name, threats, count))
        if report is not None:
            found[name] = report
    return found
