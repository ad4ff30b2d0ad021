"""The trainings of the accuracy studies on a GPU: many at once, their steps CUDA graphs.

What is learnt, and how, is what :func:`benchmarks.accuracy.study.train` does. Each training draws
its order, crops and augmentations from generators of its own, so that it does not depend on those
beside it. Its seconds are those of its steps when nothing else runs, which is measured before; they
say how many steps a row "for as long as ..." has.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.augmentations import AS_LONG, PARTS, ROWS
from benchmarks.accuracy.study import (
    Labelled,
    Run,
    Study,
    Task,
    Trained,
    accuracy,
    cycle,
    low_precision,
)
from benchmarks.graphs import Graphed, Training, alone, side_by_side
from benchmarks.training import crop_and_flip
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.transforms.batch import BatchTransform
from ijsat_aug.transforms.randomness import Randomness

TURN = 8  # steps, after which the next training has its turn
TIMED = 40  # steps


class Course:
    """Trainings of one row, one after the other, which share their captured steps.

    Args:
        row: Of the table of augmentations.
        network: One like those that are trained; it becomes the course's own.
        flow: Of the augmentations.
        device: Where to train.
    """

    def __init__(
        self, row: str, network: nn.Module, flow: FrozenGlow, device: torch.device
    ) -> None:
        self.row, self.device = row, device
        self.source, self.flow = flow, flow.to(device)
        self.network = network
        self.augmentation = ROWS[row](network, self.flow)
        self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), self.rate, momentum=0.9, nesterov=True, weight_decay=5e-4,
            fused=True,
        )  # fmt: skip
        self.plain, self.attacked = Graphed(self._plain), Graphed(self._attacked)
        self.loss = torch.zeros((), device=device)
        self.taken = 0
        # Of a step, with and without the attack.
        self.seconds = {False: 0.0, True: 0.0}
        self.passes = {False: 0.0, True: 0.0}

    def begin(self, fresh: nn.Module, seed: int) -> None:
        """The weights of a network, which is changed, and the random numbers of this seed."""
        ROWS[self.row](fresh, self.flow)  # splits its BatchNorm where the row does
        self.network.load_state_dict(fresh.state_dict())
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        self.draws = torch.Generator(self.device).manual_seed(seed)
        self.host = torch.Generator().manual_seed(seed).get_state()
        transform = self.augmentation.transform
        if isinstance(transform, BatchTransform):
            shared = Randomness(seed)
            for part in transform.modules():
                if isinstance(part, BatchTransform):
                    part.random = shared

    def with_flow(self, flow: FrozenGlow, network: nn.Module) -> Course:
        """A course with another flow of the same shape, whose steps take as long; or this one."""
        if flow is self.source:
            return self
        other = Course(self.row, network, flow, self.device)
        other.seconds, other.passes = self.seconds, self.passes
        return other

    def train(self, task: Task) -> Training:
        """One training, which returns what it left; it yields now and then."""
        self.network.train()
        learnt, validation = (move(part, self.device) for part in (task.learnt, task.validation))
        batches = self._batches(learnt, task.batch)
        best: tuple[float, dict[str, Tensor]] = (-1.0, {})
        for part in range(PARTS):
            for i in steps_of(part, task):
                self.rate.fill_(task.peak * cycle(i / task.steps))
                self.step(*next(batches), self.attacks(part))
                if i % TURN == 0:
                    yield
            score = accuracy(self.network, validation)
            if score > best[0]:
                best = (score, copy.deepcopy(self.network.state_dict()))
        facts = {
            "steps": task.steps, "seconds": round(self.cost(task, self.seconds), 3),
            "passes": round(self.cost(task, self.passes)),
            "loss": round(float(self.loss), 4), "validation": best[0],
        }  # fmt: skip
        return Trained(self.network, best[1], facts)

    def attacks(self, part: int) -> bool:
        """Whether the attack runs in this part of a training."""
        first, last = self.augmentation.loading.get("epochs", (0, None))
        return bool(first <= part < (PARTS if last is None else last))

    def cost(self, task: Task, of_step: dict[bool, float]) -> float:
        """What the steps of a training cost, given what a step of each kind does."""
        parts = range(PARTS)
        return sum(len(steps_of(part, task)) * of_step[self.attacks(part)] for part in parts)

    def time(self, task: Task) -> Training:
        """Measure what a step of each kind takes when nothing else runs."""
        self.begin(copy.deepcopy(self.network), 0)
        self.network.train()
        batches = self._batches(move(task.learnt, self.device), task.batch)
        for attacks in (False, True):
            for _ in range(6):
                self.step(*next(batches), attacks)
            finish(self.device)
            began = time.perf_counter()
            for _ in range(TIMED):
                self.step(*next(batches), attacks)
            finish(self.device)
            self.seconds[attacks] = (time.perf_counter() - began) / TIMED
        yield

    def step(self, x: Tensor, y: Tensor, attacks: bool) -> None:
        """One step of the optimiser on a batch of crops."""
        transform = self.augmentation.transform
        seen = 0

        def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            nonlocal seen
            seen += len(inputs[0])

        hook = self.network.register_forward_hook(count)
        with self._host_draws():
            x, y = self.augmentation.before(x, y)
            if not isinstance(transform, BatchTransform):
                self.plain(x, y)
            elif attacks:
                y = transform.as_labels(x, y)
                self.attacked(x, y, transform.draw(x, y))
            else:
                self.plain(*transform.calm(x, y))
        hook.remove()
        self.taken += 1
        if seen:  # a replay calls nothing
            self.passes[attacks] = seen / len(x)

    def _plain(self, x: Tensor, y: Tensor) -> None:
        with low_precision(x):
            logits = self.network(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss.copy_(loss.detach())

    def _attacked(self, x: Tensor, y: Tensor, params: dict[str, Any]) -> None:
        transform: Any = self.augmentation.transform
        x, y, _ = transform.augment(x, y, params)
        self._plain(x, y)

    def _batches(self, learnt: Labelled, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of crops, in a new order each epoch; what is left of one opens the next."""
        images, labels = learnt
        order = torch.empty(0, dtype=torch.long, device=self.device)
        while True:
            while len(order) < size:
                new = torch.randperm(len(images), generator=self.draws, device=self.device)
                order = torch.cat([order, new])
            index, order = order[:size], order[size:]
            yield crop_and_flip(images[index], self.draws), labels[index]

    @contextmanager
    def _host_draws(self) -> Iterator[None]:
        """The global state of the host is that of this training: torchvision draws from it."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.host)
        try:
            yield
        finally:
            self.host = torch.get_rng_state()
            torch.set_rng_state(before)


def run_all(study: Study, rows: Sequence[str], options: argparse.Namespace) -> None:
    """Every row that is asked for, in every setting, with every seed."""
    rows = options.only or rows
    wanted = {str(setting): setting for setting in study.settings}
    settings = [wanted[name] for name in options.settings or wanted]
    if torch.cuda.is_available():
        until = time.monotonic() + 60 * options.minutes
        run_together(study, rows, settings, options.seeds, torch.device("cuda"), until)
        return
    for seed in options.seeds:
        for setting in settings:
            for row in rows:
                study.run(row, setting, seed)


def run_together(
    study: Study,
    rows: Sequence[str],
    settings: Sequence[str | int],
    seeds: Sequence[int],
    device: torch.device,
    until: float | None = None,
) -> None:
    """All runs of a study, the rows side by side; each has setting after setting, seed after seed.

    Args:
        study: Says what a run is, and keeps its file.
        rows: Of the tables of augmentations; "for as long as" rows too.
        settings: Of the study, in their order.
        seeds: In their order.
        device: Where to train.
        until: The ``time.monotonic()`` at which the rest is left undone.
    """
    first = study.planned("plain", settings[0], seeds[0])
    task = study.task(first)
    courses: dict[str, Course] = {}
    kept = study.work / "seconds-of-a-step.txt"
    with one_at_a_time():
        for row in (*rows, *(AS_LONG[row][1] for row in rows if row in AS_LONG)):
            if row not in courses:
                who = AS_LONG.get(row, (row, ""))[0]
                courses[row] = Course(who, study.start(first), study.flow, device)
        measure(courses, task, kept)
    trainings = [partial(_train, study, row, settings, seeds, courses) for row in rows]
    began, before = time.perf_counter(), sum(course.taken for course in courses.values())
    side_by_side(trainings, len(trainings), until=until)
    finish(device)
    steps, seconds = sum(c.taken for c in courses.values()) - before, time.perf_counter() - began
    print(f"{steps} steps in {seconds:.1f} s", flush=True)


def measure(courses: Mapping[str, Course], task: Task, kept: Path) -> None:
    """Tell courses what their steps take, alone on the device; what a file keeps is not new."""
    found: dict[str, dict[str, list[float]]] = {}
    if kept.is_file():
        found = json.loads(kept.read_text())
    for row, course in courses.items():
        if row not in found:
            alone(course.time(task))
            found[row] = {
                "seconds": [*course.seconds.values()],
                "passes": [*course.passes.values()],
            }
            print(row, found[row], flush=True)
        course.seconds = dict(zip((False, True), found[row]["seconds"], strict=True))
        course.passes = dict(zip((False, True), found[row]["passes"], strict=True))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Where several studies are begun at once, each measures alone."""
    with Path(tempfile.gettempdir(), "ijsat-measures.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _train(
    study: Study,
    row: str,
    settings: Sequence[str | int],
    seeds: Sequence[int],
    courses: dict[str, Course],
) -> Training:
    course = courses[row]
    for setting in settings:
        for seed in seeds:
            run: Run = study.planned(row, setting, seed)
            if study.file(run).is_file():
                continue
            task = study.task(run)
            if row in AS_LONG:
                longer = courses[AS_LONG[row][1]]
                share = longer.cost(task, longer.seconds) / course.cost(task, course.seconds)
                task = replace(task, steps=round(task.steps * share))
            own = course.with_flow(study.flow_of(run), study.start(run))
            own.begin(study.start(run), seed)
            trained = yield from own.train(task)
            study.keep(run, study.told(run, trained))


def steps_of(part: int, task: Task) -> range:
    """The steps of one of the parts."""
    begin, end = (round(task.steps * p / PARTS) for p in (part, part + 1))
    return range(begin, end)


def move(data: Labelled, device: torch.device) -> Labelled:
    """Images and labels on the device."""
    return data[0].to(device), data[1].to(device)


def finish(device: torch.device) -> None:
    """Wait for what was begun."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
