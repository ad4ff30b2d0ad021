"""The study of adversarial training: its files, its independence, its deadline, its record."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from benchmarks.harness import hardware
from benchmarks.networks import cifar_resnet18, like_weights, small_resnet
from benchmarks.robustness import withstand
from benchmarks.robustness.evaluate import script
from benchmarks.robustness.train import Course, Plan, place, recorded, train_all
from benchmarks.robustness.withstand import Job, attack_all, jobs, kept
from benchmarks.training import save_weights
from ijsat_aug import load_flow
from ijsat_aug.evaluation.spaces.table import SPACES
from ijsat_aug.evaluation.threats import Threat, make_threat

PAIR = ("PGD-AT", "TRADES + AWP + IJSAT")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    data = load_digits()
    images = torch.from_numpy(data.images * 15.9375).to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target)
    return Plan(
        (images[:48], labels[:48]), (images[48:68], labels[48:68]), 2, 0, tmp_path, batch=16
    )


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two folders with the networks of trainings, and few digits to test them on."""
    data = load_digits()
    images = torch.from_numpy(data.images / 16).float()[:, None]
    found = (images[:12], torch.from_numpy(data.target[:12]))
    monkeypatch.setattr(withstand, "flow_and_images", lambda count: (load_flow("digits"), found))
    monkeypatch.setattr(withstand, "make_threat", in_place_of_autoattack)
    strongest, others, gentle = (
        lambda levels, threats=threats: threats
        for threats in (("autoattack",), ("jsa=1/255@1", "fog@1"), ("fog=0.01@1",))
    )
    parts = {"last": (strongest, others), "gentle": (gentle,), "best": (strongest,)}
    monkeypatch.setattr(withstand, "EVALUATIONS", parts)
    folders = [place(tmp_path, row) for row in PAIR]
    for folder, row in zip(folders, PAIR, strict=True):
        for name in ("last", "best"):
            save_weights(small_resnet(channels=1).state_dict(), folder / f"{name}.safetensors")
        facts = {"row": row, "seed": 3, "seconds": 1.0, "hardware": "abacus"}
        (folder / "training.json").write_text(json.dumps(facts))
    return folders


def in_place_of_autoattack(name: str, *about: Any) -> Threat:
    """AutoAttack takes seconds, a step of PGD nothing."""
    if name != "autoattack":
        return make_threat(name, *about)
    return replace(make_threat("linf=1/255@1"), name=name, title="weak")


def files(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    facts = json.loads((folder / "training.json").read_text())
    states = (load_file(folder / f"{name}.safetensors") for name in ("best", "last"))
    return facts, {f"{i}.{k}": v for i, state in enumerate(states) for k, v in state.items()}


def test_a_training_is_the_same_beside_another_one(plan: Plan, tmp_path: Path) -> None:
    flow = load_flow("digits")
    train_all(PAIR, plan, flow, at_once=2)
    alone = replace(plan, work=tmp_path / "alone")
    torch.rand(7)  # of the global generator, which nobody uses
    train_all(PAIR[1:], alone, flow, at_once=1)
    (facts, states), (again, same) = (files(place(p.work, PAIR[1])) for p in (plan, alone))
    assert facts["validation"] == again["validation"]
    assert len(facts["validation"]) == plan.epochs
    assert all(torch.equal(states[name], same[name]) for name in states)
    assert states.keys() == same.keys()
    assert facts["steps"] == 6
    assert facts["seconds"] >= 0
    # The reference of the KL and seven looks; two each at the worst weights and before.
    assert facts["passes"] == 1 + 7 + 2 + 2
    first, _ = files(place(plan.work, PAIR[0]))
    assert first["passes"] == 8
    assert first["hardware"] == facts["hardware"]


def test_a_course_begins_anew(plan: Plan) -> None:
    course = Course(PAIR[0], plan, load_flow("digits"))

    def after_a_step() -> list[torch.Tensor]:
        course.begin()
        course.rate.fill_(0.1)
        course.step(*next(course._batches()))
        return [value.clone() for value in course.network.state_dict().values()]

    once, again = after_a_step(), after_a_step()
    assert all(map(torch.equal, once, again))
    for _ in course.measure():
        assert course.step_alone is not None
    assert all(map(torch.equal, once, after_a_step()))


def test_the_rate_falls_as_a_multi_step_schedule(plan: Plan) -> None:
    for epochs in (1, 2, 7, 30):
        optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
        falls = [epochs // 2, 3 * epochs // 4]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls)
        for epoch in range(epochs):
            wanted = replace(plan, epochs=epochs).rate(epoch)
            assert schedule.get_last_lr()[0] == pytest.approx(wanted)
            optimizer.step()
            schedule.step()


def test_a_deadline_leaves_the_rest_of_the_trainings(plan: Plan) -> None:
    train_all(PAIR, plan, load_flow("digits"), at_once=1, until=time.monotonic())
    assert not list(plan.work.glob("*/training.json"))


def test_what_says_most_is_attacked_first(trained: list[Path]) -> None:
    order = [(job.training, job.name, len(job.threats)) for job in jobs(trained, 12)]
    one, two = trained
    assert order == [
        (one, "last", 1), (two, "last", 1), (one, "last", 2), (two, "last", 2),
        (one, "gentle", 1), (two, "gentle", 1), (one, "best", 1), (two, "best", 1),
    ]  # fmt: skip


def test_after_the_deadline_no_threat_begins(
    trained: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(trained[0], "last", ("linf=1/255@1", "fog@1"), 12, progress=False)
    attack_all([job], 1, until=time.monotonic())
    assert not job.folder.exists()
    over = iter([False, False, True])  # asked by the job, by the first threat and by the second
    monkeypatch.setattr(withstand, "too_late", lambda until: next(over))
    withstand.attack(job, None)
    assert kept(replace(job, threats=job.threats[:1])) is not None
    assert kept(job) is None


def test_only_what_is_complete_is_recorded(trained: list[Path], tmp_path: Path) -> None:
    todo = jobs(trained, 12, progress=False)
    *last, gentle, gentle_of_two, best, best_of_two = todo
    attack_all([*last, gentle, best_of_two], 1, None)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result-*")}
    found = recorded(PAIR, tmp_path, 12)
    assert list(found["trainings"]) == list(found["autoattack"]) == [PAIR[0]]
    assert found["hardware"] == f"Trained on abacus, attacked on {hardware()}"
    assert found["seed"] == 3
    titles = [line["threat"] for line in found["tables"]["PGD-AT"]["PGD-AT"]]
    assert titles[:4] == ["clean", "weak", "joint space (JSA)", "Fog"]
    budgets = {line["threat"]: line["budget"] for line in found["gentle"]["PGD-AT"]["PGD-AT"]}
    assert budgets["Fog"] == "0.01"
    assert list(found["autoattack"]["PGD-AT"]) == ["last"]
    attack_all([gentle_of_two, best], 1, None)
    both = recorded(PAIR, tmp_path, 12)["autoattack"]
    assert list(both["PGD-AT"]) == list(both["TRADES + AWP + IJSAT"]) == ["last", "best"]
    attack_all(todo, 1, None)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result-*")}
    assert before.items() <= after.items()
    assert kept(todo[-1]) is not None


def test_other_weights_are_not_taken_for_evaluated_ones(trained: list[Path]) -> None:
    job = Job(trained[0], "last", ("fog@1",), 12, progress=False)
    attack_all([job], 1, None)
    save_weights(small_resnet(channels=1).state_dict(), job.training / "last.safetensors")
    with pytest.raises(ValueError, match="another model"):
        kept(job)


def test_budgets_go_with_that_of_the_training() -> None:
    for levels, usual in ((4, 0.5), (8, 1.0)):
        assert withstand.strongest(levels) == (f"autoattack={levels}/255",)
        pgd, joint, *unseen = withstand.others(levels)
        assert (pgd, joint) == (f"linf={levels}/255@50", f"jsa={levels}/255")
        assert f"stadv={SPACES['stadv'].budget * usual:g}" in unseen
        half = f"stadv={SPACES['stadv'].budget * usual / 2:g}"
        assert half in withstand.gentle(levels)
        assert len(withstand.gentle(levels)) == len(unseen)


def test_a_training_says_its_budget(tmp_path: Path) -> None:
    for facts, levels in (({"levels": 8}, 8), ({}, 4)):
        (tmp_path / "training.json").write_text(json.dumps(facts))
        assert withstand.levels_of(tmp_path) == levels


@pytest.mark.parametrize("made", [small_resnet(10, 1), cifar_resnet18(width=8)])
def test_a_network_is_known_by_its_weights(made: torch.nn.Module) -> None:
    again = like_weights(made.state_dict())
    assert str(again) == str(made)
    assert not again.training


def test_the_example_is_trained_with_and_without_its_line(tmp_path: Path) -> None:
    plain, ours = script(with_line=False), script(with_line=True)
    assert "ijsat_aug" not in plain
    assert "mix = RobustMixup(net, num_classes=classes, amp_dtype=dtype, **NORMALIZE)" in ours
    for code in (plain, ours):
        flakes = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
        found = subprocess.run(flakes, input=code, text=True, capture_output=True, check=False)
        assert found.returncode == 0, found.stdout
