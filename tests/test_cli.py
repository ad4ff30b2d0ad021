"""The command line, as a user runs it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import ijsat_aug
from ijsat_aug.cli import _is_plain, app
from ijsat_aug.flows.checkpoint import load_state, save_flow
from ijsat_aug.flows.glow import GlowConfig, build_glow

runner = CliRunner()


def run(*arguments: object) -> Result:
    return runner.invoke(app, [str(a) for a in arguments])


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "show", "inspect", "train-flow", "convert"):
        assert command in result.output


def test_version() -> None:
    assert run("--version").output.strip() == ijsat_aug.__version__


@pytest.mark.slow
def test_the_demo_trains_compares_and_draws(tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path, "--epochs", 4)
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1:-1] for line in result.output.splitlines() if line.count("%") == 5]
    numbers = {row[0].strip(): [float(cell.strip(" %")) for cell in row[1:]] for row in rows}
    assert list(numbers) == ["plain", "mixup", "RobustMixup", "IJSAT"]
    assert all(standard > 90 for standard, *_ in numbers.values())
    for name in ("RobustMixup", "IJSAT"):
        assert numbers[name][1] > numbers["plain"][1] + 10  # PGD
        assert numbers[name][3] > numbers["plain"][3] + 10  # joint
    assert "AutoAttack may find more" in " ".join(result.output.split())
    assert str(tmp_path / "gallery.png") in result.output.replace("\n", "")
    with Image.open(tmp_path / "gallery.png") as picture:
        assert min(picture.size) > 400


def test_stopping_the_demo_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    threads, seen = torch.get_num_threads(), []

    def interrupted(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr("ijsat_aug.demo._train", lambda *_: None)
    monkeypatch.setattr("ijsat_aug.demo._table", interrupted)
    torch.set_num_threads(threads + 1)
    result = run("demo", "--out", tmp_path / "demo", "--epochs", 1)
    left = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert (seen, left) == ([1], threads + 1)  # more threads are slow on a busy machine
    assert result.exit_code == 130
    assert result.output.endswith("Stopped.\n")
    assert not (tmp_path / "demo").exists()


def test_show_draws_the_users_images_model_and_flow(tmp_path: Path) -> None:
    for kind in ("black", "white"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for i in range(8):
            level = torch.randint(0, 90, (12, 10)) + (160 if kind == "white" else 0)
            Image.fromarray(level.byte().numpy()).save(tmp_path / "images" / kind / f"{i}.png")
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))\n"
    )
    out = tmp_path / "a" / "gallery.png"
    result = run(
        "show", tmp_path / "images", "--flow", "digits", "--model", f"{tmp_path / 'net.py'}:make",
        "--eps", "16/255", "--mean", "0.5", "--std", "0.25", "--rows", 3, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"Wrote {out}." in result.output.replace("\n", "")
    with Image.open(out) as picture:
        assert picture.size[0] > picture.size[1]  # five columns, three rows
    arguments = ("show", tmp_path / "images", "--model", f"{tmp_path / 'net.py'}:make")
    result = run(*arguments, "--size", 12, "--out", out)
    assert result.exit_code == 1
    assert "the model does not take images of 1x12x12" in " ".join(result.output.split())
    whole = tmp_path / "images" / "black" / "0.png"
    bytes_of_it = whole.read_bytes()
    whole.write_bytes(b"")  # not among the two that are drawn and read
    result = run(*arguments, "--size", 8, "--rows", 2, "--out", out)
    assert result.exit_code == 0, result.output
    whole.write_bytes(bytes_of_it)
    for source in (tmp_path / "images", tmp_path / "images" / "black"):  # two classes, none
        result = run("show", source, "--size", 16, "--rows", 2, "--out", out)
        assert result.exit_code == 0, result.output
    (tmp_path / "images" / "white").rename(tmp_path / "white")  # one class
    result = run("show", tmp_path / "images", "--size", 16, "--rows", 2, "--out", out)
    assert result.exit_code == 0, result.output


def test_inspect_prints_the_card_and_the_config() -> None:
    result = run("inspect", "digits")
    assert result.exit_code == 0
    assert "bits/dim on the test split" in result.output
    config = json.loads(run("inspect", "digits", "--json").output)
    assert config["architecture"]["shape"] == [1, 8, 8]


def test_a_card_that_lost_parts(tmp_path: Path) -> None:
    config, state = load_state("digits")
    card = save_flow(tmp_path, config, state) / "config.json"
    lost = {"calibration": {"images": 3, "linf": [{}], "l2": [], "recommended": {}}}
    card.write_text(json.dumps(json.loads(card.read_text()) | lost))
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert "has lost parts" in " ".join(result.output.split())
    assert run("inspect", tmp_path, "--json").exit_code == 0


def test_show_takes_a_flow_that_is_not_square(tmp_path: Path) -> None:
    config = GlowConfig(shape=(1, 8, 4), levels=1, steps=1, hidden=4)
    model = build_glow(config)
    model(torch.rand(8, 1, 8, 4))
    flow = save_flow(tmp_path / "flow", config, model.state_dict())
    np.save(tmp_path / "images.npy", np.arange(3 * 32, dtype=np.uint8).reshape(3, 8, 4))
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(32, 2))\n"
    )
    result = run(
        "show", tmp_path / "images.npy", "--flow", flow, "--eta", 0.1, "--out", tmp_path / "a.png",
        "--model", f"{tmp_path / 'net.py'}:make",
    )  # fmt: skip
    assert result.exit_code == 0, result.output


# Of a model that does not exist: what is refused before it is refused before any work.
EVALUATE = ("evaluate", "digits", "--model", "absent:model")


def test_mistakes_are_one_sentence_and_no_traceback(tmp_path: Path) -> None:
    for arguments, message in (
        (("inspect", "digitz"), "Did you mean 'digits'?"),
        (("train-flow", "digits", tmp_path / "a"), "say how long to train"),
        (("train-flow", "nothing", tmp_path / "a", "--epochs", 1), "neither a file or folder"),
        (
            ("train-flow", "digits", tmp_path / "a", "--epochs", 1, "--levels", 4),
            "levels=4 and patch=2 make one place of 16x16 pixels",
        ),
        (("show", "digits", "--eps", "8/x"), "'8/x' is no number"),
        (("show", "digits", "--weights", "a.pt"), "weights belong to a model"),
        (("show", "digits", "--eta", 0.1), "say which, with --flow"),
        (("show", "digits", "--flow", "cifar10-fast"), "takes images of 3 channels"),
        (("show", "digits", "--flow", "digits", "--eta", -1), "eta must be"),
        (
            ("train-flow", "digits", tmp_path / "a", "--epochs", 1, "--lr", "inf"),
            "lr must be a fin",
        ),
        (("show", "digits", "--out", tmp_path), "is a folder; name a file in it"),
        (("show", "digits", "--out", tmp_path / "a.jpg"), "call it a.png"),
        ((*EVALUATE, "--against", tmp_path), "is a folder: give the file that"),
        (("demo", "--out", __file__), "is a file, and cannot hold gallery.png"),
        (("convert", "a.pt", __file__, tmp_path / "b"), "is no JSON file"),
        (("show", "digits", "--flow", "digits", "--model", "resnet18"), "without weights"),
        (("demo", "--flow", "cifar10"), "needs a calibrated flow of 8x8 digits"),
        (("convert", "a.pt", tmp_path / "none.json", tmp_path / "b"), "none.json"),
        ((*EVALUATE, "--device", "gpu"), "there is no device 'gpu' here"),
        ((*EVALUATE, "--html", Path(__file__) / "a.html"), "is a file, and cannot hold a.html"),
        ((*EVALUATE, "--json", tmp_path), "is a folder; name a file in it"),
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
    out.mkdir()
    (out / "notes.txt").write_text("of the user")
    result = run(
        "train-flow", tmp_path / "images", out, "--size", 8, "--epochs", 2, "--levels", 2,
        "--steps", 2, "--hidden", 8, "--batch-size", 8, "--class-conditional", "--flip",
        "--license", "CC0", "--test", tmp_path / "images", "--quiet", "--resume",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "flow: a new training." in " ".join(result.output.split())  # nothing to go on with
    flow = ijsat_aug.load_flow(out)
    assert flow.shape == (3, 8, 8)
    assert flow.config.num_classes == 2
    assert flow.info["license"] == "CC0"
    assert flow.info["metrics"]["bits_per_dim"]["test"] > 0
    assert "load_flow" in result.output
    assert f'load_flow("path/to/{out.name}")  # this folder' in (out / "README.md").read_text()


def test_a_flow_of_the_name_of_ours_is_loaded_by_its_path(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    result = run(
        "train-flow", "digits", "digits", "--epochs", 1, "--levels", 1, "--steps", 1, "--hidden", 4,
        "--batch-size", 512, "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "load_flow('./digits')" in "".join(result.output.split("\n"))
    assert ijsat_aug.load_flow("./digits").config.steps == 1
    with pytest.raises(ijsat_aug.flows.registry.CheckpointError, match=r"'fashion-mnist', a str"):
        ijsat_aug.load_flow(Path("fashion-mnist"))


def test_convert(tmp_path: Path) -> None:
    config, state = load_state("digits")
    torch.save(state, tmp_path / "old.pt")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    out = tmp_path / "new"
    result = run("convert", tmp_path / "old.pt", tmp_path / "config.json", out, "--data", "UCI")
    assert result.exit_code == 0, result.output
    assert ijsat_aug.load_flow(out).info["data"] == "UCI"
    result = run("convert", tmp_path / "old.pt", out / "config.json", tmp_path / "again")
    assert result.exit_code == 0, result.output


def test_a_terminal_of_few_letters_is_no_reason_to_stop(monkeypatch) -> None:
    """As where the output of Windows goes into a file."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    app(["inspect", "digits"], standalone_mode=False)
    sys.stdout.flush()
    assert b"digits" in written.getvalue()
    assert b"?" in written.getvalue()  # for what ASCII has no letter


def test_what_is_no_checkpoint_is_not_converted(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("education")
    (tmp_path / "config.json").write_text(json.dumps(load_state("digits")[0].to_dict()))
    result = run("convert", tmp_path / "notes.txt", tmp_path / "config.json", tmp_path / "out")
    assert result.exit_code == 1
    assert "holds more than tensors, or is damaged" in result.output


def test_an_error_of_a_script_is_no_sentence_of_ours() -> None:
    """Code that is run as a script belongs to no package."""
    with pytest.raises(ValueError, match="oops") as caught:
        exec("raise ValueError('oops')", {"__package__": None})
    assert not _is_plain(caught.value)


@pytest.mark.parametrize(
    ("words", "place"),
    [("evaluate digits --model m:f", "evaluation.command"), ("show digits", "show")],
)
def test_what_was_asked_for_reaches_the_work(words, place, monkeypatch) -> None:
    asked = {}

    def work(*_: object, **options: object) -> None:
        asked.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(f"ijsat_aug.{place}.run", work)
    run(*words.split(), "--mean", "0.1,0.2", "--std", "0.3,0.4", "--seed", 3)
    assert (asked["mean"], asked["std"], asked["seed"]) == ((0.1, 0.2), (0.3, 0.4), 3)


def test_options_of_train_flow_reach_it(tmp_path: Path, monkeypatch) -> None:
    asked = {}

    def train(images, config, out, recipe, **options) -> None:
        asked.update(recipe=recipe, **options)

    monkeypatch.setattr("ijsat_aug.flows.trainer.train_flow", train)
    words = "--epochs 1 --flip --clip 3 --ema 0.5 --warmup 7 --held-out 0.3 --weight-decay 0.1"
    result = run("train-flow", "digits", tmp_path / "f", *words.split(), "--test", "digits")
    assert result.exit_code == 0, result.output
    recipe = asked["recipe"]
    assert (recipe.flip, recipe.clip, recipe.ema, recipe.warmup) == (True, 3, 0.5, 7)
    assert (recipe.held_out, recipe.weight_decay) == (0.3, 0.1)
    assert len(asked["test"].images) == 297
