"""The trainings of the accuracy studies on a GPU: many at once, their steps CUDA graphs.

What is learnt, and how, is what :func:`benchmarks.accuracy.study.train` does. Each training draws
its order, crops and augmentations from generators of its own, so that it does not depend on those
beside it. Its seconds are those of its steps when nothing else runs, which is measured before; they
say how many steps a row "for as long as ..." has. Beside them stand those of plain training,
measured in the same minutes: a GPU has another clock on another day.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.augmentations import AS_LONG, PARTS, ROWS
from benchmarks.accuracy.study import (
    Run,
    Study,
    Task,
    Trained,
    accuracy,
    cycle,
    steps_of,
)
from benchmarks.graphs import Training, alone, finish, finished, side_by_side
from benchmarks.training import Crops, Labelled, Seen, low_precision
from ijsat_aug import RobustMixup
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.training import CapturedStep
from ijsat_aug.transforms.batch import BatchTransform, transforms_in
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
        self.learnt: Labelled | None = None
        self.loss = torch.zeros((), device=device)
        # Of a step, with and without the attack.
        self.seconds = {False: 0.0, True: 0.0}
        self.passes = {False: 0.0, True: 0.0}

    def begin(self, fresh: nn.Module, learnt: Labelled, seed: int) -> None:
        """The weights of a network, which is changed, images, and random numbers of this seed."""
        if self.learnt is None or self.learnt[0].shape != learnt[0].shape:
            self.learnt = move(learnt, self.device)
            self.steps = {kind: CapturedStep(partial(self._step, kind)) for kind in (False, True)}
        for ours, new in zip(self.learnt, learnt, strict=True):
            ours.copy_(new)  # in place: the captured steps read them there
        ROWS[self.row](fresh, self.flow)  # splits its BatchNorm where the row does
        self.network.load_state_dict(fresh.state_dict())
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        self.draws = torch.Generator(self.device).manual_seed(seed)
        self.host = torch.Generator().manual_seed(seed).get_state()
        transform = self.augmentation.transform
        if isinstance(transform, BatchTransform):
            shared = Randomness(seed)
            for part in transforms_in(transform):
                part.random = shared
                part._seen.add(self.rate.device)  # a captured step cannot look at values

    def train(self, task: Task) -> Training:
        """One training, which returns what it left; it yields now and then."""
        self.network.train()
        validation = move(task.validation, self.device)
        batches = self._batches(task.batch)
        best: tuple[float, dict[str, Tensor]] = (-1.0, {})
        for part in range(PARTS):
            for i in steps_of(part, task):
                self.rate.fill_(task.peak * cycle(i / task.steps))
                self.step(next(batches), self.attacks(part))
                if i % TURN == 0:
                    yield
            done = finished(self.device)
            while not done():  # the host has better to do than to wait
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
        if not isinstance(self.augmentation.transform, BatchTransform):
            return False
        first, last = self.augmentation.loading.get("epochs", (0, None))
        return bool(first <= part < (PARTS if last is None else last))

    def cost(self, task: Task, of_step: dict[bool, float]) -> float:
        """What the steps of a training cost, given what a step of each kind does."""
        parts = range(PARTS)
        return sum(len(steps_of(part, task)) * of_step[self.attacks(part)] for part in parts)

    def time(self, task: Task) -> Training:
        """Measure what a step of each kind takes when nothing else runs."""
        self.begin(copy.deepcopy(self.network), task.learnt, 0)
        self.network.train()
        batches = self._batches(task.batch)
        # A core may be shared with other work, a GPU is this one's alone.
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        for attacks in {self.attacks(part) for part in range(PARTS)}:
            for _ in range(6):
                self.step(next(batches), attacks)
            finish(self.device)
            began = clock()
            for _ in range(TIMED):
                self.step(next(batches), attacks)
            finish(self.device)
            self.seconds[attacks] = (clock() - began) / TIMED
        yield

    def step(self, batch: Tensor, attacks: bool) -> None:
        """One step of the optimiser on the images of these numbers."""
        transform = self.augmentation.transform
        crops = Crops.draw(len(batch), self.device, self.draws)
        seen = Seen(self.network)
        with self._host_draws():
            before = self.augmentation.before
            inputs: tuple[Tensor, ...] = (batch, *crops)
            if before is not None:
                inputs = before(*self._cropped(*inputs))
            params = None
            if isinstance(transform, BatchTransform):
                params = transform.draw(*self._blank(len(batch)))
            self.steps[attacks](inputs, params)
        seen.close()
        if seen.images:  # a replay calls nothing
            self.passes[attacks] = seen.images / len(batch)

    def _step(self, attacks: bool, inputs: tuple[Tensor, ...], params: Any) -> None:
        """What is captured: all that is random comes in."""
        transform: Any = self.augmentation.transform
        x, y = inputs if self.augmentation.before is not None else self._cropped(*inputs)
        if attacks:
            x, y, _ = transform.augment(x, y, params)
        elif isinstance(transform, RobustMixup):  # blends without their attack
            x, y = transform.replay(x, transform.as_labels(x, y), {**params, "attack": None})
        with low_precision(x):
            logits = self.network(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss.copy_(loss.detach())

    def _cropped(self, batch: Tensor, *crops: Tensor) -> tuple[Tensor, Tensor]:
        assert self.learnt is not None
        images, labels = self.learnt
        return Crops(*crops).of(images[batch]), labels[batch]

    def _blank(self, size: int) -> tuple[Tensor, Tensor]:
        """Something of the shape of a batch."""
        assert self.learnt is not None
        images, labels = self.learnt
        return torch.empty((size, *images.shape[1:]), device=self.device), labels[:size]

    def _batches(self, size: int) -> Iterator[Tensor]:
        """Numbers of images, in a new order each epoch; what is left of one opens the next."""
        assert self.learnt is not None
        count = len(self.learnt[1])
        order = torch.empty(0, dtype=torch.long, device=self.device)
        while True:
            while len(order) < size:
                new = torch.randperm(count, generator=self.draws, device=self.device)
                order = torch.cat([order, new])
            batch, order = order[:size], order[size:]
            yield batch

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


class Courses:
    """Courses that wait for a training, and what a step of every row takes.

    There are as many of a row as train at once: those after the first begin with its times.
    """

    def __init__(self) -> None:
        self.timed: dict[str, Course] = {}
        self.idle: list[Course] = []

    def add(self, course: Course) -> None:
        """The first of its row, whose steps have been timed."""
        self.timed[course.row] = course
        self.idle.append(course)

    def take(self, row: str, network: nn.Module, flow: FrozenGlow) -> Course:
        """One of a row with this flow: an idle one, or a new one around the network."""
        for course in self.idle:
            if course.row == row and course.source is flow:
                self.idle.remove(course)
                return course
        timed = self.timed[row]
        other = Course(row, network, flow, timed.device)
        other.seconds, other.passes = timed.seconds, timed.passes
        return other

    def seconds(self, row: str, task: Task) -> float:
        """What the steps of a training take when nothing else runs."""
        timed = self.timed[row]
        return timed.cost(task, timed.seconds)


def run_all(study: Study, rows: Sequence[str], options: argparse.Namespace) -> None:
    """Every row that is asked for, in every setting, with every seed."""
    study.claim()
    rows = options.only or rows
    wanted = {str(setting): setting for setting in study.settings}
    settings = [wanted[name] for name in options.settings or wanted]
    if torch.cuda.is_available() or options.together:
        until = time.monotonic() + 60 * options.minutes
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run_together(study, rows, settings, options.seeds, device, options.at_once, until)
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
    at_once: int,
    until: float | None = None,
) -> None:
    """All runs of a study, some side by side: setting after setting, seed after seed.

    Args:
        study: Says what a run is, and keeps its file.
        rows: Of the tables of augmentations; "for as long as" rows too.
        settings: Of the study, in their order.
        seeds: In their order.
        device: Where to train.
        at_once: How many runs train side by side.
        until: The ``time.monotonic()`` at which the rest is left undone.
    """
    courses = courses_of(study, rows, settings[0], seeds[0], device)
    trainings = [
        partial(train_row, study, row, [setting], [seed], courses)
        for setting in settings
        for seed in seeds
        for row in rows
    ]
    side_by_side(trainings, at_once, until=until)
    finish(device)


def courses_of(
    study: Study, rows: Sequence[str], setting: str | int, seed: int, device: torch.device
) -> Courses:
    """A course for every row and for those that it is measured by, with the times of its steps.

    The batches that are timed are those of a setting and a seed: batches of all have one size.
    """
    run = study.planned("plain", setting, seed)
    courses = Courses()
    for who in ("plain", *(who for row in rows for who in AS_LONG.get(row, (row,)))):
        if who not in courses.timed:
            course = Course(who, study.start(run), study.flow, device)
            alone(course.time(study.task(run)))
            print(who, course.seconds, course.passes, flush=True)
            courses.add(course)
    return courses


def train_row(
    study: Study,
    row: str,
    settings: Sequence[str | int],
    seeds: Sequence[int],
    courses: Courses,
) -> Training:
    """The runs of a row that are not there yet."""
    for setting in settings:
        for seed in seeds:
            run: Run = study.planned(row, setting, seed)
            if study.file(run).is_file():
                continue
            task, who = study.task(run), row
            plain = {"plain_seconds": round(courses.seconds("plain", task), 3)}
            if row in AS_LONG:
                who, whom = AS_LONG[row]
                share = courses.seconds(whom, task) / courses.seconds(who, task)
                steps = study.steps(row, setting) or round(task.steps * share)
                task = replace(task, steps=steps)
            course = courses.take(who, study.start(run), study.flow_of(run))
            course.begin(study.start(run), task.learnt, seed)
            trained = yield from course.train(task)
            facts = study.told(run, trained)
            more = yield from study.also(run, trained)
            study.keep(run, facts | plain | more)
            courses.idle.append(course)


def move(data: Labelled, device: torch.device) -> Labelled:
    """Images and labels on the device."""
    return data[0].to(device), data[1].to(device)
