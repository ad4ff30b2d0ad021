"""The command line, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import ijsat_aug
from ijsat_aug.cli import app
from ijsat_aug.flows.checkpoint import load_state

runner = CliRunner()


def run(*arguments: object) -> Result:
    return runner.invoke(app, [str(a) for a in arguments])


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "inspect", "train-flow", "convert"):
        assert command in result.output


def test_version() -> None:
    assert run("--version").output.strip() == ijsat_aug.__version__


def test_the_demo_moves_real_digits_and_draws_them(tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if "%" in line]
    accuracies = [float(row.split("│")[3].strip(" %")) for row in rows]
    assert len(accuracies) == 4
    assert accuracies[0] > 90
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < accuracies[0]
    with Image.open(tmp_path / "manifold.png") as picture:
        assert min(picture.size) > 400


def test_inspect_prints_the_card_and_the_config() -> None:
    result = run("inspect", "digits")
    assert result.exit_code == 0
    assert "bits/dim on the test split" in result.output
    config = json.loads(run("inspect", "digits", "--json").output)
    assert config["architecture"]["shape"] == [1, 8, 8]


def test_mistakes_are_one_sentence_and_no_traceback(tmp_path: Path) -> None:
    for arguments, message in (
        (("inspect", "digitz"), "Did you mean 'digits'?"),
        (("train-flow", "digits", tmp_path / "a"), "say how long to train"),
        (("train-flow", "nothing", tmp_path / "a", "--epochs", 1), "neither a file or folder"),
        (
            ("train-flow", "digits", tmp_path / "a", "--epochs", 1, "--levels", 4),
            "levels=4 halves the image",
        ),
        (("demo", "--flow", "cifar10"), "needs a calibrated flow of 8x8 digits"),
        (("convert", "a.pt", tmp_path / "none.json", tmp_path / "b"), "none.json"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert message in " ".join(result.output.split())
        assert result.output.startswith("Error: ")
        assert len(result.output.strip().splitlines()) <= 2
    assert not (tmp_path / "a").exists()


def test_train_flow_on_a_folder_of_images(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for i in range(24):
        colour = torch.randint(0, 256, (12, 10, 3), dtype=torch.uint8).numpy()
        name = tmp_path / "images" / ("a" if i % 2 else "b") / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colour).save(name)
    out = tmp_path / "flow"
    result = run(
        "train-flow", tmp_path / "images", out, "--size", 8, "--epochs", 2, "--levels", 2,
        "--steps", 2, "--hidden", 8, "--batch-size", 8, "--class-conditional", "--flip",
        "--license", "CC0", "--test", tmp_path / "images", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    flow = ijsat_aug.load_flow(out)
    assert flow.shape == (3, 8, 8)
    assert flow.config.num_classes == 2
    assert flow.info["license"] == "CC0"
    assert flow.info["metrics"]["bits_per_dim"]["test"] > 0
    assert "load_flow" in result.output


def test_convert(tmp_path: Path) -> None:
    config, state = load_state("digits")
    torch.save(state, tmp_path / "old.pt")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    out = tmp_path / "new"
    result = run("convert", tmp_path / "old.pt", tmp_path / "config.json", out, "--data", "UCI")
    assert result.exit_code == 0, result.output
    assert ijsat_aug.load_flow(out).info["data"] == "UCI"
