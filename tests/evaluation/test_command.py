"""``ijsat-aug evaluate``, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18
from typer.testing import CliRunner, Result

from benchmarks.real_data import cifar10
from ijsat_aug.cli import app
from ijsat_aug.evaluation import Report

CODE = """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Dropout(0.1), nn.Flatten(), nn.Linear(512, 10),
    )

def pooled():
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))
"""


@pytest.fixture
def place(net, tmp_path: Path) -> Path:
    """A folder with a model's code and weights."""
    (tmp_path / "net.py").write_text(CODE)
    save_file(net.state_dict(), tmp_path / "good.safetensors")
    worse = {
        k: v + 0.3 * torch.randn_like(v) if v.ndim == 4 else v for k, v in net.state_dict().items()
    }
    torch.save(worse, tmp_path / "worse.pth")
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "140"})


def test_a_user_evaluates_two_models_and_compares_them(place) -> None:
    shared = (
        "--model", f"{place}/net.py:make", "--flow", "digits", "--limit", 60, "--quiet",
        "--threats", "linf=0.1@5,om@5,fog@3", "--corruptions", "contrast,fog",
    )  # fmt: skip
    result = run(
        "digits", "--weights", place / "worse.pth", "--json", place / "worse.json", *shared
    )
    assert result.exit_code == 0, result.output
    files = {kind: place / f"good.{kind}" for kind in ("json", "md", "html")}
    result = run(
        "digits", "--weights", place / "good.safetensors", "--out", place / "state",
        "--against", place / "worse.json", "--json", files["json"], "--markdown", files["md"],
        "--html", files["html"], *shared,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in (
        "good, 60 images, against worse",
        "PGD L∞",
        "on manifold",
        "worst case of 3",
        "mCE",
    ):
        assert words in result.output, words
    report = Report.load(files["json"])
    assert report.settings["images"] == 60
    assert report.accuracy("clean") > 0.9 > report.accuracy("linf")
    lines = files["md"].read_text().splitlines()
    assert sum(line.startswith("| fog |") for line in lines) == 1
    assert any(line.startswith("| clean |") and "+" in line for line in lines)
    assert files["html"].read_text().count("<img") > 20
    assert len(list((place / "state").glob("result-*.json"))) == 1 + 3 + 10

    again = run(
        "digits", "--weights", place / "worse.pth", "--out", place / "state", *shared,
    )  # fmt: skip
    assert again.exit_code == 1
    assert "results of another model:" in " ".join(again.output.split())


def test_the_bars_say_what_is_going_on(place) -> None:
    result = run(
        "digits", "--model", f"{place}/net.py:make", "--weights", place / "good.safetensors",
        "--limit", 20, "--threats", "linf@2", "--corruptions", "none",
    )  # fmt: skip
    assert "images/s" in result.output
    assert "right" in result.output
    assert "is an upper bound" in " ".join(result.output.split())


def test_a_folder_of_images_and_a_torchvision_model(tmp_path) -> None:
    torch.manual_seed(0)
    model = resnet18(num_classes=3)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    for kind in ("cat", "dog", "owl"):
        for i in range(4):
            path = tmp_path / "images" / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
            Image.fromarray(noise).save(path)
    (tmp_path / "images" / "cat" / "1.png").write_bytes(b"")  # the second of twelve is not read
    result = run(
        tmp_path / "images", "--model", "resnet18", "--weights", tmp_path / "checkpoint.pth",
        "--size", 36, "--limit", 6, "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225",
        "--threats", "linf=1/255@1", "--corruptions", "jpeg_compression", "--quiet",
        "--html", tmp_path / "a.html", "--json", tmp_path / "a.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = Report.load(tmp_path / "a.json")
    assert report.truth == (0, 1, 2)  # evenly spaced: all classes are there
    assert report.classes == ("cat", "dog", "owl")
    assert "owl" in (tmp_path / "a.html").read_text()


@pytest.mark.data
def test_official_files_of_corruptions(place) -> None:
    """A folder in CIFAR-10-C's layout that others wrote: five severities, one behind the other."""
    x, y = (t[:40] for t in cifar10(train=False))
    np.savez(place / "cifar.npz", images=x.numpy(), labels=y.numpy())
    official = place / "CIFAR-10-C"
    official.mkdir()
    shades = [(x.float() / s).byte().permute(0, 2, 3, 1).numpy() for s in (1, 2, 3, 4, 5)]
    np.save(official / "contrast.npy", np.concatenate(shades))
    np.save(official / "labels.npy", np.tile(y.numpy(), 5))
    shared = (
        place / "cifar.npz", "--model", f"{place}/net.py:pooled", "--threats", "none", "--quiet",
    )  # fmt: skip
    result = run(
        *shared, "--corruptions", "contrast", "--corruption-files", official, "--json",
        place / "a.json", "--weights", _pooled(place),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = Report.load(place / "a.json").results
    assert found["contrast/1"].correct == found["clean"].correct
    missing = run(
        *shared, "--corruptions", "fog", "--corruption-files", official, "--weights", _pooled(place)
    )
    assert missing.exit_code == 1
    assert "fog.npy" in missing.output


@pytest.mark.data
def test_files_of_corruptions_are_written_once(place) -> None:
    x, y = (t[:30] for t in cifar10(train=False))
    np.savez(place / "cifar.npz", images=x.numpy(), labels=y.numpy())
    arguments = (
        place / "cifar.npz", "--model", f"{place}/net.py:pooled", "--weights", _pooled(place),
        "--threats", "none", "--quiet", "--corruptions", "gaussian_noise,fog", "--json",
    )  # fmt: skip
    plain = run(*arguments, place / "plain.json")
    cached = run(*arguments, place / "first.json", "--corruption-files", place / "files")
    assert plain.exit_code == cached.exit_code == 0, cached.output
    assert np.load(place / "files" / "fog.npy").shape == (150, 32, 32, 3)
    stamp = (place / "files" / "fog.npy").stat().st_mtime_ns
    run(*arguments, place / "second.json", "--corruption-files", place / "files")
    assert (place / "files" / "fog.npy").stat().st_mtime_ns == stamp
    reports = [Report.load(place / f"{n}.json") for n in ("plain", "first", "second")]
    for name in reports[0].results:
        assert len({report.results[name].correct for report in reports}) == 1


def _pooled(place: Path) -> Path:
    torch.manual_seed(0)
    path = place / "pooled.safetensors"
    save_file({f"2.{k}": v for k, v in nn.Linear(48, 10).state_dict().items()}, path)
    return path


def test_mistakes_are_one_sentence(place) -> None:
    model = ("--model", f"{place}/net.py:make", "--weights", place / "good.safetensors", "--quiet")
    np.savez(place / "bare.npz", images=np.zeros((4, 8, 8), np.uint8))
    np.savez(place / "below.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) - 1)
    (place / "stray" / "cats").mkdir(parents=True)
    for file in ("a.png", "cats/b.png"):
        Image.new("L", (8, 8)).save(place / "stray" / file)
    (place / "no.json").write_text(json.dumps({"a": 1}))
    few = ("digits", *model, "--threats", "none", "--corruptions", "none", "--limit")
    assert run(*few, 20, "--json", place / "few.json").exit_code == 0
    for arguments, message in (
        (
            (*few, 30, "--against", place / "few.json", "--json", place / "x.json"),
            "different images",
        ),
        (("digits", *model, "--threats", "magic"), "no threat 'magic'"),
        (("digits", *model, "--threats", "none,linf"), "and the groups quick, standard"),
        (("digits", *model, "--threats", "jsa"), "give a flow"),
        (("digits", *model, "--corruptions", "rain"), "no corruption 'rain'"),
        (("digits", *model, "--against", place / "no.json"), "no report"),
        ((place / "bare.npz", *model), "has no labels"),
        ((place / "below.npz", *model), "labels below 0"),
        ((place / "stray", *model), "stray/a.png lies in none"),
        (("digits", *model, "--against", place / "absent.json"), "absent.json does not exist."),
        (("digits", *model, "--json", place / "a", "--html", place / "a"), "to one file"),
        (("digits", *model[:3], place), "is a folder; name the file of weights"),
        (("digits", "--model", f"{place}/net.py:pooled"), "does not take images of 1x8x8"),
        (("nowhere", *model), "neither a file or folder"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert message in " ".join(result.output.split()), result.output
        assert "Traceback" not in result.output
    assert not (place / "x.json").exists()


def test_a_few_of_sorted_images_are_of_every_class(place, digits, labels) -> None:
    order = labels.argsort(stable=True)
    images = (digits[order, 0] * 255).byte().numpy()
    np.savez(place / "sorted.npz", images=images, labels=labels[order].numpy())
    shared = ("--model", f"{place}/net.py:make", "--threats", "none", "--corruptions", "none")
    told = ("--limit", 20, "--quiet", "--json", place / "few.json")
    result = run(place / "sorted.npz", *shared, *told)
    assert result.exit_code == 0, result.output
    assert set(Report.load(place / "few.json").truth) == set(range(6))  # as many are shown


def test_new_files_of_corruptions_do_not_choose_the_images(place) -> None:
    """Only those that others wrote do, as their order is that of all images."""
    digits = np.arange(40) // 4
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    np.savez(place / "sorted.npz", images=images, labels=digits)
    folder = place / "corrupted"
    for _ in range(2):  # written, and read
        result = run(
            place / "sorted.npz", "--model", f"{place}/net.py:make", "--limit", 10, "--quiet",
            "--threats", "none", "--corruptions", "contrast", "--corruption-files", folder,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert np.load(folder / "labels.npy")[:10].tolist() == list(range(10))


def test_one_image_is_enough(place) -> None:
    np.savez(place / "one.npz", images=np.zeros((1, 8, 8), np.uint8), labels=np.zeros(1, int))
    result = run(
        place / "one.npz", "--model", f"{place}/net.py:make", "--quiet", "--threats", "none",
        "--corruptions", "none",
    )  # fmt: skip
    assert result.exit_code == 0, result.output


def test_folders_that_are_numbers_are_told_their_order(place) -> None:
    for number in range(1, 11):
        (place / "numbers" / str(number)).mkdir(parents=True)
        Image.new("L", (8, 8), 20 * number).save(place / "numbers" / str(number) / "a.png")
    arguments = ("--model", f"{place}/net.py:make", "--threats", "none", "--corruptions", "none")
    with pytest.warns(UserWarning, match="taken as text, 1, 10, 2, 3, ..., as"):
        assert run(place / "numbers", *arguments, "--quiet").exit_code == 0
    show = ("show", place / "numbers", "--model", f"{place}/net.py:make", "--out", place / "a.png")
    with pytest.warns(UserWarning, match="taken as text, 1, 10, 2, 3, ..., as"):
        assert CliRunner().invoke(app, [*map(str, show)]).exit_code == 0
    (place / "numbers" / "10").rename(place / "numbers" / "0")  # a warning would be an error
    assert run(place / "numbers", *arguments, "--quiet").exit_code == 0


def test_stopping_says_where_to_go_on(place, monkeypatch) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ijsat_aug.evaluation.command.run", stop)
    arguments = ("digits", "--model", f"{place}/net.py:make")
    assert "nothing was kept, as it is with --out" in run(*arguments).output
    stopped = run(*arguments, "--out", place / "kept")
    assert "the same command goes on there" in " ".join(stopped.output.split())
    assert stopped.exit_code == 130
