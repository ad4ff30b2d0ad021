"""The engine of the accuracy studies: what it counts, pairs and repeats."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.accuracy import finetune, lowdata
from benchmarks.accuracy.augmentations import AS_LONG, ROWS, Augmentation
from benchmarks.accuracy.finetune import SETTINGS, FineTuning, Parts
from benchmarks.accuracy.lowdata import LowData
from benchmarks.accuracy.study import (
    BATCH,
    TUNING,
    Run,
    Study,
    Task,
    accuracy,
    both,
    endless,
    interval,
    summary,
    train,
    where,
)
from benchmarks.harness import made
from benchmarks.networks import cifar_resnet18, small_resnet
from benchmarks.robustness.train import ROWS as TRAININGS
from benchmarks.robustness.train import Method, table, told
from benchmarks.training import save_weights
from ijsat_aug import JointSpaceAdv, load_flow
from ijsat_aug.evaluation import Report
from ijsat_aug.evaluation.report import Result

LONG = "mixup, for as long as OM"


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    found = load_digits()
    images = torch.from_numpy(found.images * 15.9375).to(torch.uint8)[:, None]
    return images.repeat_interleave(2, 2).repeat_interleave(2, 3), torch.from_numpy(found.target)


@pytest.fixture
def task(digits: tuple[torch.Tensor, torch.Tensor]) -> Task:
    images, labels = digits
    return Task((images[:512], labels[:512]), (images[512:768], labels[512:768]), steps=40)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return small_resnet(channels=1)


def test_every_image_is_shown_once_an_epoch() -> None:
    images = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    labels = torch.arange(200)
    shown = torch.cat([y for _, y in itertools.islice(endless(images, labels), 25)])
    assert len(shown) == 25 * BATCH == 16 * 200
    assert all(part.sort().values.equal(labels) for part in shown.split(200))
    assert not shown[:200].equal(shown[200:400])


def test_a_training_takes_batches_of_the_size_that_it_is_told(task: Task) -> None:
    seen: list[int] = []

    def look(batch: Any) -> Any:
        seen.append(len(batch[0]))
        return batch

    small = dataclasses.replace(task, steps=25, batch=32)
    assert train(small, network(), Augmentation(look, {})).facts["passes"] == 25
    assert seen == [32] * 25


def test_an_interval_is_students() -> None:
    assert interval([3.0]) == (3.0, None)
    assert interval([1.0, 2.0, 3.0]) == (2.0, 2.4841)  # t = 4.303, s = 1, n = 3


def one(row: str, seed: int, last: float, **more: float | str) -> dict[str, Any]:
    facts = {"best": last, "steps": 10, "seconds": 2.0, "passes": 10}
    return {"row": row, "seed": seed, "last": last, **facts, **more}


def test_differences_are_paired_by_seed() -> None:
    runs = [one("mixup", s, v) for s, v in enumerate((50.0, 60.0, 70.0))]
    runs += [one("OM", s, v) for s, v in ((2, 72.0), (0, 51.0), (7, 0.0))]
    runs += [one(LONG, s, v, corruptions=40 + s) for s, v in enumerate((52.0, 62.0, 70.0))]
    table = summary(runs, ("mixup",))
    assert table["OM"]["over mixup"] == interval([1.0, 2.0])
    assert table["OM"][f"over {LONG}"] == interval([-1.0, 2.0])
    assert table["mixup"]["seeds"] == [0, 1, 2]
    assert "over mixup" not in table["mixup"]
    assert table[LONG]["corruptions"][0] == 41
    assert "corruptions over mixup" not in table[LONG]


def test_times_are_those_of_the_machine_of_plain_training() -> None:
    """Of another, which made most runs of a row, they would say nothing beside those of plain."""
    runs = [one("plain", s, 50.0, hardware="slow") for s in range(2)]
    runs += [one("plain", 2, 50.0, hardware="fast", seconds=0.1)]
    runs += [one("OM", s, 50.0, hardware="fast", seconds=0.2) for s in range(2)]
    runs += [one("OM", 2, 50.0, hardware="slow", seconds=6.0)]
    runs += [one("mixup", 0, 50.0, hardware="fast", seconds=0.1)]
    found = {row: entry["time"] for row, entry in summary(runs, ()).items()}
    assert found == {"plain": 1.0, "OM": 3.0, "mixup": None}


def test_a_time_is_against_plain_training_of_the_same_minutes() -> None:
    """A GPU has another clock on another day."""
    runs = [one("plain", 0, 50.0, hardware="a GPU", seconds=1.649)]
    runs += [one("OM", 0, 50.0, hardware="a GPU", seconds=3.2, plain_seconds=1.6)]
    runs += [one("OM", 1, 50.0, hardware="another", seconds=5.0, plain_seconds=2.0)]
    assert summary(runs, ())["OM"]["time"] == 2.25


def test_a_run_is_kept_and_a_long_one_takes_the_others_time(tmp_path: Path) -> None:
    trained: list[Run] = []

    class Counting(Study):
        def train(self, run: Run) -> dict[str, Any]:
            trained.append(run)
            return {"last": 1.0, "best": 2.0, "steps": 3, "seconds": 12.5, "passes": 6}

    study = Counting(tmp_path, "none", [500], load_flow("digits"))
    first = study.run(LONG, 500, 4)
    assert [(run.row, run.seconds) for run in trained] == [("OM", None), ("mixup", 12.5)]
    assert study.run(LONG, 500, 4) == first == json.loads(study.file(trained[1]).read_text())
    assert len(trained) == 2
    result = study.result([4], ("mixup",))
    assert result["table"]["500"][LONG]["seeds"] == [4]
    assert not study.result([0], ())["table"]


def test_a_study_goes_on_from_its_record_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.accuracy.study.RESULTS", tmp_path)
    runs = [one("OM", s, 50.0 + s) | {"setting": 500} for s in range(3)]
    facts = {"hardware": "elsewhere", "commit": "abc", "date": "2001-01-01", "network": "none"}
    record = facts | {"runs": runs}
    (tmp_path / "kept.json").write_text(json.dumps(record))
    study = Study(tmp_path / "work", "none", [500], load_flow("digits"))
    study.keep(Run("OM", "OM", 500, 2), one("OM", 2, 60.0, seconds=9.0))
    study.unpack("kept")
    found = study.result(range(5), ())
    assert set(found["hardware"].split(" and ")) == {where(), "elsewhere"}
    own = made()
    assert set(found["commit"].split(" and ")) == {own["commit"], "abc"}
    assert found["date"] == f"2001-01-01 to {own['date']}"
    assert found["torch"] == own["torch"]
    assert found["table"]["500"]["OM"]["accuracy"] == interval([50.0, 51.0, 60.0])
    assert found["table"]["500"]["OM"]["time"] is None  # without plain training there is none
    with pytest.raises(SystemExit, match="the seconds of 'OM' are of elsewhere"):
        study.run(LONG, 500, 0)
    with pytest.raises(SystemExit, match="kept is of the network none, not small"):
        Study(tmp_path / "other", "small", [500], load_flow("digits")).unpack("kept")


def test_all_seeds_of_a_row_have_as_many_steps(tmp_path: Path) -> None:
    study = Study(tmp_path, "none", [500], load_flow("digits"))
    assert study.steps(LONG, 500) is None
    study.keep(Run(LONG, LONG, 500, 3), one(LONG, 3, 50.0) | {"steps": 1234})
    assert study.steps(LONG, 500) == 1234
    assert study.steps("OM", 500) is None


def test_runs_with_another_flow_or_network_are_kept_apart(tmp_path: Path) -> None:
    first = FineTuning(tmp_path, load_flow("digits"))
    first.claim()
    FineTuning(tmp_path, load_flow("digits")).claim()
    for other in (
        FineTuning(tmp_path, load_flow("fashion-mnist")),
        FineTuning(tmp_path, load_flow("digits"), width=64),
        FineTuning(tmp_path, load_flow("digits"), batch=256),
    ):
        with pytest.raises(SystemExit, match="give another --work"):
            other.claim()


def test_training_learns_and_both_ends_are_tested(
    task: Task, digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    tested = (digits[0][768:], digits[1][768:])
    trained = train(task, network(), ROWS["plain"](network(), None))  # type: ignore[arg-type]
    facts = both(trained, tested)
    assert facts["steps"] == 40
    assert facts["last"] == accuracy(trained.network, tested)
    trained.network.load_state_dict(trained.best)
    assert facts["validation"] == accuracy(trained.network, task.validation)
    assert facts["last"] > 30  # chance is 10


@pytest.mark.parametrize("steps", [20, 30])  # of 20 parts, which are not equal with 30 steps
def test_an_attack_of_the_second_half_rests_in_the_first(task: Task, steps: int) -> None:
    net = network()
    attack = JointSpaceAdv(net, eta=0)
    seen: list[bool] = []

    class Watched(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                seen.append(bool(attack.last))
            out: torch.Tensor = super().forward(x)
            return out

    attack.bind(net)
    train(
        dataclasses.replace(task, steps=steps),
        Watched(net),
        Augmentation(attack, {"epochs": (10, None)}),
    )
    assert seen == [False] * (steps // 2) + [True] * (steps // 2)


@pytest.mark.parametrize(
    ("row", "times"), [("plain", 1), ("pixel step", 2), ("RobustMixup, split BatchNorm", 3)]
)
def test_passes_count_what_the_attack_asks_too(task: Task, row: str, times: int) -> None:
    net = network()
    trained = train(dataclasses.replace(task, steps=20), net, ROWS[row](net, None))  # type: ignore[arg-type]
    assert trained.facts["passes"] == times * trained.facts["steps"]
    assert not net._forward_pre_hooks


def test_a_training_by_the_clock_stops(task: Task) -> None:
    trained = train(task, network(), ROWS["mixup"](network(), None), 0.2)  # type: ignore[arg-type]
    assert 0.2 <= trained.facts["seconds"] < 2


def test_every_row_can_be_trained_for_as_long_as_each_of_ours() -> None:
    ours = set(ROWS) - {"plain", "mixup", "mixup, a weight an image", "CutMix"}
    assert {whom for _, whom in AS_LONG.values()} == ours


def test_the_seeds_of_a_fine_tuning_draw_differently(digits, tmp_path) -> None:
    transfer = SETTINGS["transfer"]
    weights = tmp_path / f"base-{transfer.base}.safetensors"
    save_weights(cifar_resnet18(width=16).state_dict(), weights)
    study = FineTuning(tmp_path, load_flow("digits"))
    parts = Parts(digits, digits, digits, digits)
    drawn = [(study.base(transfer, parts, seed)[-1].weight, torch.rand(5)) for seed in (0, 0, 1)]
    for first, again, other in zip(*drawn, strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_what_a_study_trains_is_there() -> None:
    for rows in (lowdata.TABLE, finetune.TABLE, finetune.FEW):
        assert set(rows) <= {*ROWS, *AS_LONG}
        assert len(set(rows)) == len(rows)


def test_every_row_names_a_file() -> None:
    study = Study(Path(), "", [], load_flow("digits"))
    files = {study.file(Run(row, row, "10000", 0)) for row in (*ROWS, *AS_LONG)}
    assert len(files) == len(ROWS) + len(AS_LONG)
    assert all(file.parent == Path() for file in files)


@pytest.mark.data
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_chosen_away_from_the_test_split(setting: str, tmp_path: Path) -> None:
    study, asked = FineTuning(tmp_path, load_flow("digits")), SETTINGS[setting]
    chosen, final = (study.parts_of(Run("plain", "plain", setting, s)) for s in (TUNING, 0))
    assert len(final.learnt[1]) == (asked.images or 5 * asked.each)
    assert len(final.tested[1]) == (5_000 if asked.transfers else 10_000)
    of_test = {bytes(image.numpy()) for image in study.data(train=False)[0]}
    for parts in (chosen, final):
        shown = {bytes(image.numpy()) for image in parts.learnt[0]}
        assert not shown & {bytes(image.numpy()) for image in parts.validation[0]}
        tested = {bytes(image.numpy()) for image in parts.tested[0]}
        assert not shown & tested
        assert of_test.isdisjoint(tested) if parts is chosen else of_test >= tested


@pytest.mark.data
def test_settings_of_few_labels_are_chosen_away_from_the_test_split(tmp_path: Path) -> None:
    study = LowData("cifar10", tmp_path, load_flow("cifar10-fast"), own_flow=False)
    chosen, final = (Run("plain", "plain", 500, seed) for seed in (TUNING, 0))
    validation = study.task(chosen).validation
    assert all(map(torch.equal, study.tested(chosen), validation))
    assert len(study.tested(final)[1]) == 10_000


@pytest.mark.parametrize("row", TRAININGS)
def test_an_adversarial_training_takes_a_step(row: str) -> None:
    data = load_digits()
    x = torch.from_numpy(data.images[:32] / 16).float()[:, None]
    net, flow = network(), load_flow("digits")
    before = [p.detach().clone() for p in net.parameters()]
    method = Method.of(row, net, flow)
    y = torch.from_numpy(data.target[:32])
    method.step(net, x, y, method.draw(x, y))
    assert all(torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))
    assert sum(p.grad.abs().sum() for p in net.parameters()) > 0
    first, *more = (attack.threat for attack in method.attacks)
    assert first.moves_latent == ("JSA" in row or "IJSAT" in row)
    radius, quarter, _ = row.partition("L2 of ")[2].partition(", quarter of each batch")
    assert [(one.norm, one.eps) for one in more] == ([("l2", float(radius))] if radius else [])
    parts = [part for _, part in method.shared_out(x, y)]
    for whole, each in zip((x, y), zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(each), whole)
    assert [len(labels) for _, labels in parts[1:]] == ([8 if quarter else 16] if radius else [])


def test_the_worst_case_is_told_without_the_threat_that_decides_it_too() -> None:
    right = {"clean": "1111", "fog": "1110", "jpeg_l1": "1000", "snow": "1101"}

    def report(right: dict[str, str]) -> Report:
        kinds = {name: "clean" if name == "clean" else "unseen" for name in right}
        results = {name: Result(name, name, kinds[name], "", 0, "", r) for name, r in right.items()}
        return Report({"images": 4}, results)

    rows = {
        row["threat"]: (row["accuracy"], row["change"].partition(" ")[0])
        for row in table(report(right), report(right | {"fog": "0100"}))
    }
    assert rows["worst case of the unseen"] == (25, "+25.0")
    assert rows["worst case of the unseen but JPEG L1"] == (50, "+25.0")
    assert list(rows)[-2:] == ["worst case of the unseen but JPEG L1", "worst case of 3 attacks"]


def test_a_training_is_held_against_the_one_it_stands_on() -> None:
    def report(right: str) -> Report:
        results = [
            Result("clean", "clean", "clean", "", 0, "", "1111"),
            Result("autoattack", "AutoAttack L∞", "lp", "4/255", 100, "", right),
        ]
        return Report({"images": 4}, {one.name: one for one in results})

    rows = {
        "PGD-AT": "1000", "PGD-AT + JSA": "1100", "PGD-AT + L2 of 1": "1110",
        "PGD-AT + JSA + L2 of 1": "1111", "TRADES + JSA": "1110", "TRADES + JSA + L2 of 1": "1111",
    }  # fmt: skip
    reports = {
        row: {"best": report("1111"), "last": report(r), "gentle": report("1110")}
        for row, r in rows.items()
    }
    found = told(reports)
    assert found["right"]["PGD-AT"]["last"] == {"clean": "1111", "autoattack": "1000"}
    assert found["autoattack"]["PGD-AT + JSA"] == {"best": 100, "last": 50}
    (_, attacked, _), (_, alone, _) = (
        found["tables"][base][base + " + JSA"] for base in ("PGD-AT", "TRADES")
    )
    assert attacked["change"].startswith("+25.0")
    assert alone["change"] == ""
    assert list(found["tables"]) == ["PGD-AT", "PGD-AT + L2 of 1", "TRADES"]
    in_pixels, with_latents = found["tables"]["PGD-AT + L2 of 1"].values()
    assert in_pixels[1]["change"] == ""
    assert with_latents[1]["change"].startswith("+25.0")
    assert found["tables"]["PGD-AT"]["PGD-AT + JSA + L2 of 1"][1]["change"].startswith("+75.0")
    assert found["gentle"]["PGD-AT"]["PGD-AT + JSA"][1]["accuracy"] == 75
