"""The studies on a GPU, as far as a CPU can tell: what runs side by side is what runs alone."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks import graphs
from benchmarks.accuracy import together
from benchmarks.accuracy.finetune import TUNING, FineTuning
from benchmarks.accuracy.study import Labelled, Run, Study, Task
from benchmarks.accuracy.together import Course, run_together
from benchmarks.all_on_a_gpu import CANDIDATES, best_of
from benchmarks.graphs import Training, alone, side_by_side
from benchmarks.networks import small_resnet
from ijsat_aug import load_flow
from ijsat_aug.flows.frozen import FrozenGlow

LONG = "mixup, for as long as mixup + latent step, second half"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Labelled:
    found = load_digits()
    images = torch.from_numpy(found.images * 15.9375).to(torch.uint8)[:, None]
    return images, torch.from_numpy(found.target)


class Digits(Study):
    """Some steps on digits."""

    def __init__(self, work: Path, data: Labelled, flow: FrozenGlow) -> None:
        super().__init__(work, "small", ["few"], flow)
        self.data = data

    def start(self, run: Run) -> nn.Module:
        torch.manual_seed(run.seed)
        return small_resnet(channels=1)

    def task(self, run: Run) -> Task:
        part = [tuple(t[a:b] for t in self.data) for a, b in ((0, 256), (256, 384))]
        return Task(*part, steps=20, batch=32)  # type: ignore[arg-type]

    def tested(self, run: Run) -> Labelled:
        return self.data[0][384:640], self.data[1][384:640]


@pytest.fixture
def study(digits: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Digits:
    monkeypatch.setattr(together, "TIMED", 1)
    return Digits(tmp_path, digits, load_flow("digits"))


def facts(study: Digits, row: str, seed: int) -> dict[str, object]:
    kept = study.run(row, "few", seed)  # from its file
    return {name: value for name, value in kept.items() if "seconds" not in name}


@pytest.mark.parametrize("row", ["CutMix", "mixup + latent step, second half"])
def test_a_training_does_not_depend_on_those_beside_it(study: Digits, row: str) -> None:
    run_together(study, [row], ["few"], [1], CPU, 2)
    single = facts(study, row, 1)
    for beside in ([row], ["mixup", row, "RobustMixup"]):
        study.work = study.work / "again"
        run_together(study, beside, ["few"], [0, 1], CPU, 2)
        assert facts(study, row, 1) == single
        assert facts(study, row, 0)["loss"] != single["loss"]


def test_a_row_for_as_long_has_the_steps_of_that_time(study: Digits) -> None:
    whom = LONG.partition("as long as ")[2]
    run_together(study, [whom, LONG], ["few"], [0], CPU, 2)
    ours, theirs = (study.run(row, "few", 0) for row in (whom, LONG))
    assert theirs["steps"] > ours["steps"]
    assert theirs["seconds"] == pytest.approx(ours["seconds"], rel=0.05)
    assert (ours["steps"], ours["passes"]) == (20, 30)  # attacked in the second half
    assert ours["plain_seconds"] == theirs["plain_seconds"] > 0


def test_passes_count_what_the_network_sees(study: Digits) -> None:
    rows = {"plain": 1, "JointSpaceAdv": 2, "IJSAT, split BatchNorm": 3}
    run_together(study, list(rows), ["few"], [0], CPU, 2)
    assert {row: study.run(row, "few", 0)["passes"] / 20 for row in rows} == rows


def test_nothing_is_begun_after_the_deadline(study: Digits) -> None:
    run_together(study, ["plain", "mixup"], ["few"], [0], CPU, 2, until=time.monotonic())
    assert not list(study.work.glob("*.json"))


@pytest.mark.parametrize("row", ["plain", "IJSAT, split BatchNorm"])
def test_a_course_begins_anew(study: Digits, row: str) -> None:
    run = study.planned(row, "few", 0)
    course = Course(row, study.start(run), study.flow, CPU)
    states = []
    for seed in (0, 1, 0):
        course.begin(study.start(run), study.task(run).learnt, seed)
        states.append(copy.deepcopy(alone(course.train(study.task(run))).network.state_dict()))
    first, other, again = (torch.cat([v.flatten() for v in s.values()]) for s in states)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_generators_take_turns() -> None:
    seen: list[str] = []

    def training(name: str, turns: int) -> Training:
        for _ in range(turns):
            seen.append(name)
            yield

    made = [lambda n=n, t=t: training(n, t) for n, t in (("a", 3), ("b", 1), ("c", 2))]
    side_by_side(made, at_once=2)
    assert seen == ["a", "b", "a", "a", "c", "c"]


def test_a_training_that_fails_lets_the_others_go_on() -> None:
    seen: list[str] = []

    def failing() -> Training:
        yield
        raise ValueError("of its own")

    def fine() -> Training:
        for _ in range(3):
            yield
        seen.append("done")

    with pytest.raises(RuntimeError, match="1 of the trainings failed"):
        side_by_side([failing, fine], at_once=2)
    assert seen == ["done"]


def test_a_training_does_not_run_ahead_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU that finishes a turn of each at a time, who has long turns has fewer of them."""
    clock, seen = 0, {"short": 0, "long": 0}

    def training(name: str, length: int) -> Training:
        for _ in range(100):
            seen[name] += 1
            ends[name] = max(ends[name], clock) + length
            current.append(name)
            yield

    def finished(device: torch.device) -> Callable[[], bool]:
        end = ends[current[-1]]
        return lambda: clock >= end

    def tick(seconds: float) -> None:
        nonlocal clock
        clock += 1
        if clock > 50:
            raise TimeoutError

    ends, current = {"short": 0, "long": 0}, [""]
    monkeypatch.setattr(graphs, "new_stream", object)
    monkeypatch.setattr(graphs, "on", lambda stream: nullcontext())
    monkeypatch.setattr(graphs, "finished", finished)
    monkeypatch.setattr("time.sleep", tick)
    with pytest.raises(TimeoutError):
        side_by_side([lambda: training("short", 1), lambda: training("long", 10)], at_once=2)
    assert seen == {"short": 50 + 2, "long": 5 + 2}


def test_the_best_fine_tuning_is_chosen_on_validation_images(tmp_path: Path) -> None:
    study = FineTuning(tmp_path, load_flow("digits"))

    def keep(found: dict[str, tuple[float, float]]) -> None:
        for row, (clean, corrupted) in found.items():
            run = study.planned(row, "48000", TUNING)
            study.keep(run, {"last": clean, "corruptions": corrupted})

    dear, good, safe = CANDIDATES
    keep({"plain": (94.0, 70.0), dear: (93.5, 79.0), good: (93.8, 76.0), safe: (95.0, 75.0)})
    assert best_of(study, "48000") == good
    keep({"plain": (96.0, 70.0)})  # all lose too much: the one that loses least
    assert best_of(study, "48000") == safe


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("row", ["mixup", "mixup + latent step, second half", "IJSAT"])
def test_captured_trainings_learn_as_called_ones(
    study: Digits, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = study.planned(row, "few", 0)
    found = []
    for called in (False, True):
        course = Course(row, study.start(run), study.flow, torch.device("cuda"))
        if called:
            monkeypatch.setattr("ijsat_aug.training.captured._WARM_UP", 100)
        course.begin(study.start(run), study.task(run).learnt, 0)
        trained = alone(course.train(study.task(run)))
        found.append(trained.facts["loss"])
    assert found[0] == pytest.approx(found[1], rel=0.1)
