"""Training: it learns, it resumes bit for bit, it survives, and it writes a finished checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from ijsat_aug import load_flow
from ijsat_aug.cli import app
from ijsat_aug.flows import publish, trainer
from ijsat_aug.flows.calibration import recommended_eta
from ijsat_aug.flows.checkpoint import load_state
from ijsat_aug.flows.data import ImageData, load_images
from ijsat_aug.flows.glow import GlowConfig, build_glow
from ijsat_aug.flows.probe import probe_network
from ijsat_aug.flows.publish import evaluate
from ijsat_aug.flows.recipe import Recipe
from ijsat_aug.flows.registry import CheckpointError
from ijsat_aug.flows.trainer import train_flow

pytest.importorskip("accelerate")

CONFIG = GlowConfig(shape=(1, 8, 8), levels=2, steps=2, hidden=16, bins=17, logit=0.05)
SHORT = Recipe(epochs=2, batch_size=128, lr=4e-3, warmup=5, every=10, held_out=0.1, ema=0.9)


@pytest.fixture(scope="module", autouse=True)
def _quick_network() -> Iterator[None]:
    """The network of the calibration learns for a moment: test_calibration.py is about it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "probe_network", partial(probe_network, steps=30))
        yield


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_images("digits")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: ImageData) -> Path:
    out = tmp_path_factory.mktemp("trained") / "flow"
    test = load_images("digits", train=False)
    return train_flow(data, CONFIG, out, SHORT, test=test, name="tiny", license="CC0", quiet=True)


def test_it_learns(trained: Path, data: ImageData) -> None:
    metrics = load_flow(trained).info["metrics"]
    model = build_glow(CONFIG)
    model.load_state_dict(load_state(trained)[1])
    untrained = build_glow(CONFIG)
    untrained(data.images[:512].float() / 17 + 0.5 / 17)
    test = load_images("digits", train=False)
    assert metrics["bits_per_dim"]["test"] < evaluate(untrained, CONFIG, test) - 0.2
    assert math.isclose(
        metrics["bits_per_dim"]["test"], evaluate(model, CONFIG, test), abs_tol=2e-4
    )


def test_the_checkpoint_is_finished(trained: Path) -> None:
    info = load_flow(trained).info
    assert (info["name"], info["license"], info["data"]) == (
        "tiny", "CC0", "scikit-learn's digits",
    )  # fmt: skip
    assert info["metrics"]["images"] == {"train": 1350, "held_out": 150, "test": 297}
    assert max(info["metrics"]["round_trip"].values()) <= 1e-5
    assert info["calibration"]["recommended"]["linf"] > 0
    assert info["calibration"]["images"] == 150  # held out: a radius must not have seen the test
    assert info["training"]["steps"] == 20
    assert info["training"]["seed"] == 0
    assert "# Flow `tiny`" in (trained / "README.md").read_text()
    assert not list(trained.parent.glob(".*"))


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L")).astype(int)


def test_pictures_show_samples_walks_and_reconstructions(trained: Path) -> None:
    for folder in (trained, trained / "training"):
        for name in ("samples.png", "walk.png", "reconstructions.png"):
            picture = read(folder / name)
            assert picture.std() > 10, f"{name} is empty"
    row = read(trained / "walk.png")[2:66]
    tiles = [row[:, 2 + 66 * i : 66 + 66 * i] for i in range(16)]
    steps = [np.abs(a - b).mean() for a, b in itertools.pairwise(tiles)]
    assert 0 < max(steps) < np.abs(tiles[0] - tiles[-1]).mean() / 3  # from one end to the other
    rows = read(trained / "reconstructions.png")
    real, decoded = rows[2:66], rows[68:132]  # 64 pixels each, 2 pixels of frame
    assert np.abs(real - decoded).max() <= 1


def test_it_resumes_bit_for_bit(trained: Path, tmp_path: Path, data: ImageData) -> None:
    """Stopped after one of two epochs, the second half gives the very same weights."""

    class Stop(Exception):
        pass

    out = tmp_path / "flow"
    original = trainer._Run._milestone

    def stop_at_ten(run: trainer._Run, *args: object) -> None:
        original(run, *args)  # type: ignore[arg-type]
        if run.progress.step == 10:
            raise Stop

    trainer._Run._milestone = stop_at_ten  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(Stop):
            train_flow(data, CONFIG, out, SHORT, quiet=True)
    finally:
        trainer._Run._milestone = original  # type: ignore[method-assign]
    assert not (out / "config.json").exists()
    train_flow(data, CONFIG, out, SHORT, resume=True, quiet=True)
    (_, resumed), (_, straight) = load_state(out), load_state(trained)
    assert all(torch.equal(resumed[k], straight[k]) for k in straight)
    assert load_flow(out).info["training"]["steps"] == 20


def test_a_training_is_never_overwritten_by_accident(
    trained: Path, tmp_path: Path, data: ImageData
) -> None:
    before = (trained / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="start anew with overwrite"):
        train_flow(data, CONFIG, trained, SHORT, quiet=True)
    assert (trained / "model.safetensors").read_bytes() == before
    out = tmp_path / "flow"
    shutil.copytree(trained, out)
    recipe, random = dataclasses.replace(SHORT, epochs=0.1, seed=1), torch.get_rng_state()
    train_flow(data, CONFIG, out, recipe, overwrite=True, quiet=True)
    info = load_flow(out).info["training"]
    assert (info["seed"], info["steps"]) == (1, 1)
    assert torch.equal(torch.get_rng_state(), random)  # of others


def test_autocast_that_the_launcher_asks_for_is_refused(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --mixed_precision bf16` must not round the state of the flow."""
    from accelerate.state import AcceleratorState

    inside: list[bool] = []
    step = trainer._Run._step

    def watch(run: trainer._Run, *args: object) -> torch.Tensor:
        if not inside:
            actnorm = next(m for m in run.model.modules() if type(m).__name__ == "ActNorm")
            inverse = actnorm.inverse
            actnorm.inverse = lambda z: (
                inside.append(torch.is_autocast_enabled("cpu")), inverse(z)
            )[1]  # fmt: skip
        return step(run, *args)  # type: ignore[arg-type]

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(trainer._Run, "_step", watch)
    recipe = dataclasses.replace(SHORT, epochs=0.2)
    train_flow(data, CONFIG, tmp_path / "flow", recipe, quiet=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert inside
    assert not any(inside)


def test_resuming_another_network_is_refused(trained: Path, data: ImageData) -> None:
    other = dataclasses.replace(CONFIG, hidden=8)
    with pytest.raises(
        ValueError, match=r"its network was \{'hidden': \d+\}, now it is \{'hidden': 8\}"
    ):
        train_flow(data, other, trained, SHORT, resume=True, quiet=True)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"held_out": 0.2}, {"batch_size": 64}, {"optimizer": "adamw"}]
)
def test_resuming_with_other_held_out_images_is_refused(
    trained: Path, data: ImageData, change: dict
) -> None:
    """Else images that chose the best weights would have been trained on."""
    recipe = dataclasses.replace(SHORT, **change)
    with pytest.raises(ValueError, match=f"another training: its {next(iter(change))}"):
        train_flow(data, CONFIG, trained, recipe, resume=True, quiet=True)


def test_resuming_on_other_images_or_a_damaged_state_is_refused(
    trained: Path, tmp_path: Path, data: ImageData
) -> None:
    other = dataclasses.replace(data, images=data.images.flip(3))
    with pytest.raises(ValueError, match="another training: its images"):
        train_flow(other, CONFIG, trained, SHORT, resume=True, quiet=True)
    state = tmp_path / "training" / "state.safetensors"
    state.parent.mkdir()
    state.write_bytes((trained / "training" / "state.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        train_flow(data, CONFIG, tmp_path, SHORT, resume=True, quiet=True)


def test_resume_without_a_state_does_not_retrain_over_a_finished_flow(
    trained: Path, tmp_path: Path, data: ImageData
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(FileNotFoundError, match="nothing to go on with"):
        train_flow(data, CONFIG, tmp_path, SHORT, resume=True, quiet=True)
    with pytest.raises(ValueError, match="choose one of them"):
        train_flow(data, CONFIG, trained, SHORT, resume=True, overwrite=True, quiet=True)


def test_labels_that_the_network_of_the_calibration_never_saw_do_no_harm(
    tmp_path: Path, data: ImageData
) -> None:
    assert data.labels is not None
    each = dataclasses.replace(data, labels=torch.arange(len(data.labels)), classes=None)
    recipe = dataclasses.replace(SHORT, epochs=0.3)
    out = train_flow(each, CONFIG, tmp_path / "a", recipe, quiet=True)
    assert load_flow(out).info["calibration"]["linf"]
    unlabelled = dataclasses.replace(data, labels=torch.full_like(data.labels, -1))
    out = train_flow(unlabelled, CONFIG, tmp_path / "b", recipe, quiet=True)
    assert load_flow(out).info["calibration"]["linf"]


def test_a_validation_that_is_not_a_number_never_wins(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([3.0, math.nan])
    monkeypatch.setattr(trainer, "evaluate", lambda *args: next(values))
    out = train_flow(data, CONFIG, tmp_path / "flow", SHORT, quiet=True)
    assert load_flow(out).info["training"]["best_step"] == 10


def test_a_killed_training_leaves_a_state_that_resumes(tmp_path: Path) -> None:
    """SIGKILL in the middle, from the command line, as a user's machine would do it."""
    out = tmp_path / "flow"
    command = [
        "train-flow", "digits", str(out), "--levels", "2", "--steps", "2", "--hidden", "16",
        "--every", "5", "--quiet",
    ]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "ijsat_aug", *command, "--minutes", "5"])
    state = out / "training" / "state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert state.exists()
    assert not (out / "config.json").exists()
    done = CliRunner().invoke(app, [*command, "--minutes", "0.02", "--resume"])
    assert done.exit_code == 0, done.output
    assert load_flow(out).info["training"]["steps"] >= 5


def test_a_time_budget_ends_the_training(tmp_path: Path, data: ImageData) -> None:
    recipe = dataclasses.replace(SHORT, epochs=None, minutes=0.03, every=1000)
    begin = time.monotonic()
    out = train_flow(data, CONFIG, tmp_path / "flow", recipe, quiet=True)
    info = load_flow(out).info["training"]
    assert info["steps"] >= 1
    assert info["minutes_taken"] < 0.2
    assert time.monotonic() - begin < 60


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    data = load_images("digits")
    original = trainer.dequantize
    calls = iter(range(10**6))

    def poisoned(levels: torch.Tensor, *args: object) -> torch.Tensor:
        u = original(levels, *args)  # type: ignore[arg-type]
        return u * torch.nan if next(calls) == 4 else u

    trainer.dequantize = poisoned  # type: ignore[assignment]
    try:
        out = train_flow(data, CONFIG, tmp_path / "flow", SHORT, quiet=True)
    finally:
        trainer.dequantize = original
    info = load_flow(out).info
    assert info["training"]["skipped_steps"] == 1
    assert math.isfinite(info["metrics"]["bits_per_dim"]["held_out"])


def test_a_class_conditional_flow_trains_on_labels(tmp_path: Path, data: ImageData) -> None:
    config = dataclasses.replace(CONFIG, num_classes=10)
    bytes_of_it = dataclasses.replace(data, labels=data.labels.to(torch.uint8)).take(slice(20))
    out = train_flow(data, config, tmp_path / "flow", SHORT, test=bytes_of_it, quiet=True)
    flow = load_flow(out)
    x = data.images[:4].float() / 16
    assert (flow.decode(flow.encode(x)) - x).abs().max() < 1e-5
    other = dataclasses.replace(data, labels=9 - data.labels)
    with pytest.raises(ValueError, match="another training: its labels"):
        train_flow(other, config, out, SHORT, resume=True, quiet=True)


def test_every_option_of_the_recipe_runs(tmp_path: Path, data: ImageData) -> None:
    pytest.importorskip("tensorboard")
    recipe = Recipe(
        epochs=0.5, minutes=5, batch_size=64, optimizer="adamw", weight_decay=0.1, flip=True,
        precision="bf16", every=3, tensorboard=True, init_images=32,
    )  # fmt: skip
    out = train_flow(data, CONFIG, tmp_path / "flow", recipe)
    assert list((out / "training").rglob("events.out.tfevents*"))
    assert load_flow(out).info["training"]["precision"] == "bf16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": None}, "say how long to train"),
        ({"epochs": "2"}, "epochs must be greater than 0, got '2'"),
        ({"epochs": -1}, "epochs must be greater than 0"),
        ({"minutes": 0}, "minutes must be greater than 0"),
        ({"lr": float("nan")}, "lr must be greater than 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"batch_size": 2.5}, "batch_size must be an integer >= 1"),
        ({"every": True}, "every must be an integer >= 1"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"weight_decay": -1}, "weight_decay must be at least 0"),
        ({"optimizer": "sgd"}, "optimizer must be"),
        ({"precision": "fp16"}, "precision must be"),
        ({"held_out": 0.0}, "held_out must lie in"),
        ({"ema": 1.0}, "ema must lie in"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **change)


def test_numbers_of_numpy_are_numbers(tmp_path: Path, data: ImageData) -> None:
    recipe = dataclasses.replace(SHORT, epochs=0.1, seed=np.int64(1), lr=np.float32(4e-3))
    out = train_flow(data, CONFIG, tmp_path / "flow", recipe, quiet=True)
    assert load_flow(out).info["training"]["seed"] == 1


def test_data_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, data: ImageData
) -> None:
    out = tmp_path / "flow"
    wrong = {
        "built for": dataclasses.replace(CONFIG, shape=(3, 8, 8)),
        "flow bins=16": dataclasses.replace(CONFIG, bins=16),
        "flow bins=256; build it with bins=images.bins": dataclasses.replace(CONFIG, bins=256),
        "labels 0 to 9, but num_classes=5": dataclasses.replace(CONFIG, num_classes=5),
    }
    for message, config in wrong.items():
        with pytest.raises(ValueError, match=message):
            train_flow(data, config, out, SHORT)
    unlabelled = dataclasses.replace(data, labels=None)
    conditional = dataclasses.replace(CONFIG, num_classes=10)
    with pytest.raises(ValueError, match="has no labels"):
        train_flow(unlabelled, conditional, out, SHORT)
    named = dataclasses.replace(data, classes=tuple("abcdefghij"))
    other = dataclasses.replace(data, classes=tuple("bcdefghija"))
    for config, test in ((CONFIG, other), (conditional, data)):
        with pytest.raises(ValueError, match=r"class folders .* differ"):
            train_flow(named, config, out, SHORT, test=test)
    assert not out.exists()


@pytest.mark.parametrize("classes", [None, tuple("a")])
def test_one_class_calibrates_as_none_does(
    classes: tuple[str, ...] | None, tmp_path: Path, data: ImageData
) -> None:
    """As of a folder whose images all lie in one folder in it; the test images lie in it itself."""
    few = data.take(torch.arange(100))
    labels = None if classes is None else torch.zeros(100, dtype=torch.long)
    train = dataclasses.replace(few, labels=labels, classes=classes)
    test = dataclasses.replace(few, labels=None)
    recipe = dataclasses.replace(SHORT, held_out=0.1)
    flow = load_flow(train_flow(train, CONFIG, tmp_path / "flow", recipe, test=test, quiet=True))
    assert 0.005 < recommended_eta(flow, "linf") < 0.5
    picture = read(tmp_path / "flow" / "training" / "reconstructions.png")
    assert picture.shape[0] == 2 * 66 + 2  # few images too stand above what they decode to


@pytest.mark.distributed
def test_two_processes_train_one_flow(tmp_path: Path) -> None:
    """`torchrun` with two gloo processes: same weights everywhere, one checkpoint."""
    script = tmp_path / "train.py"
    script.write_text(
        "import hashlib, pathlib, sys, torch\n"
        "from ijsat_aug.flows import GlowConfig, Recipe, load_images, train_flow\n"
        "from ijsat_aug.flows import trainer\n"
        "torch.set_num_threads(1)\n"
        "config = GlowConfig(shape=(1, 8, 8), levels=2, steps=2, hidden=8, bins=17)\n"
        "recipe = Recipe(epochs=2, minutes=5, batch_size=128, every=10, held_out=0.1)\n"
        "runs = []\n"
        "init = trainer._Run.__init__\n"
        "def spy(self, *a):\n"
        "    init(self, *a)\n"
        "    runs.append((self.accelerator.process_index, self.accelerator.num_processes, self))\n"
        "trainer._Run.__init__ = spy\n"
        "train_flow(load_images('digits'), config, sys.argv[1], recipe, quiet=True)\n"
        "rank, world, run = runs[0]\n"
        "state = run.model.module.state_dict()\n"
        "digest = hashlib.sha256(b''.join(v.numpy().tobytes() for v in state.values()))\n"
        "assert pathlib.Path(sys.argv[1], 'config.json').exists()\n"
        "short = Recipe(epochs=0.1, batch_size=128)\n"
        "train_flow(load_images('digits'), config, sys.argv[1] + '2', short, quiet=True)\n"
        "assert runs[1][1] == 2\n"
        "try:\n"
        "    few = Recipe(epochs=1, batch_size=1)\n"
        "    train_flow(load_images('digits'), config, sys.argv[1] + '3', few)\n"
        "except ValueError as error:\n"
        "    assert '2 processes share a step of 1 images' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
        "line = f'{rank} {world} {run.progress.step} {digest.hexdigest()}'\n"
        "pathlib.Path(sys.argv[2], f'rank{rank}').write_text(line)\n"
    )
    cuda = torch.cuda.is_available()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(script), str(tmp_path / "flow"), str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", **({"ACCELERATE_USE_CPU": "1"} if cuda else {})},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [(tmp_path / f"rank{rank}").read_text().split() for rank in (0, 1)]
    assert [r[:3] for r in ranks] == [["0", "2", "20"], ["1", "2", "20"]]
    assert ranks[0][3] == ranks[1][3]
    config = json.loads((tmp_path / "flow" / "config.json").read_text())
    assert config["training"]["hardware"].startswith("2 x CPU")


def test_what_cannot_be_trained_on_or_written_is_told_before_the_work(tmp_path: Path) -> None:
    data = load_images("digits")
    config = GlowConfig(shape=(1, 8, 8), levels=2, steps=2, hidden=8, bins=17)
    floats = ImageData(data.pixels, None, 17, "pixels")
    with pytest.raises(TypeError, match="a flow is trained on grey levels"):
        train_flow(floats, config, tmp_path / "a", Recipe(epochs=1), quiet=True)
    with pytest.raises(ValueError, match="holds 0 images; a flow needs at least 2"):
        train_flow(data.take(torch.arange(0)), config, tmp_path / "a", Recipe(epochs=1), quiet=True)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError, match="is a file, and cannot hold"):
        train_flow(data, config, tmp_path / "file", Recipe(epochs=1), quiet=True)
    with pytest.raises(ValueError, match="weight_decay must be at least 0"):
        Recipe(epochs=1, weight_decay=-1)


def test_a_training_that_diverged_says_so(data: ImageData, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHORT, lr=1e6, warmup=0, every=5, ema=0.0)
    with pytest.raises(ValueError, match=r"the training diverged.*smaller lr"):
        train_flow(data, CONFIG, tmp_path / "flow", recipe, quiet=True)


def test_of_few_images_a_fifth_is_held_out(data: ImageData, tmp_path: Path) -> None:
    """A fiftieth would be one, on which the best weights and the radius would rest."""
    few = data.take(torch.arange(60))
    recipe = dataclasses.replace(SHORT, held_out=0.02, epochs=1, batch_size=16)
    out = train_flow(few, CONFIG, tmp_path / "flow", recipe, quiet=True)
    assert load_flow(out).info["metrics"]["images"] == {"train": 48, "held_out": 12}


def test_what_cannot_be_measured_is_trained_all_the_same(tmp_path, data, monkeypatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(publish, "calibrate", fails)
    with pytest.raises(torch.OutOfMemoryError):
        train_flow(data, CONFIG, tmp_path / "flow", SHORT, quiet=True)
    assert load_flow(tmp_path / "flow").info["training"]["steps"] > 0
    monkeypatch.undo()
    train_flow(data, CONFIG, tmp_path / "flow", SHORT, resume=True, quiet=True)
    assert recommended_eta(load_flow(tmp_path / "flow"), "linf") > 0


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_stopped_goes_on_as_if_it_had_not_been(
    kind, trained: Path, tmp_path, data, monkeypatch
) -> None:
    """Ctrl-C before the first validation."""
    step, calls = trainer._Run._step, itertools.count(1)

    def stopped(*arguments: Any) -> Tensor:
        if next(calls) == 3:
            signal.raise_signal(kind)
        return step(*arguments)

    out = tmp_path / "flow"
    monkeypatch.setattr(trainer._Run, "_step", stopped)
    before = signal.getsignal(kind)
    with pytest.raises(KeyboardInterrupt, match=r"Stopped after 3 steps; .*--resume"):
        train_flow(data, CONFIG, out, SHORT, quiet=True)
    assert signal.getsignal(kind) is before
    with pytest.raises(CheckpointError, match=r"has not ended: go on .* --resume"):
        load_flow(out)
    train_flow(data, CONFIG, out, SHORT, resume=True, quiet=True)
    weights = [(place / "model.safetensors").read_bytes() for place in (trained, out)]
    assert weights[0] == weights[1]


def test_who_stops_at_once_loses_nothing(trained: Path, tmp_path, data, monkeypatch) -> None:
    """What is overwritten is there until there is something new."""
    out = tmp_path / "flow"
    shutil.copytree(trained, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_flow(data, CONFIG, out, SHORT, overwrite=True, quiet=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_training_does_not_go_on_with_another_learning_rate(trained: Path, data) -> None:
    for change in ({"lr": 1e-4}, {"flip": True}):
        recipe = dataclasses.replace(SHORT, **change)
        with pytest.raises(ValueError, match=rf"its {next(iter(change))} was"):
            train_flow(data, CONFIG, trained, recipe, resume=True, quiet=True)


def test_mirrored_images_are_a_matter_of_the_seed(data: ImageData, tmp_path: Path) -> None:
    recipe, states = dataclasses.replace(SHORT, flip=True, epochs=0.2), []
    for seed in (0, 1):
        torch.manual_seed(seed)  # not the training's
        out = train_flow(data, CONFIG, tmp_path / str(seed), recipe, quiet=True)
        states.append(load_state(out)[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_time_of_a_training_is_that_of_all_its_parts(
    data: ImageData, tmp_path: Path, monkeypatch
) -> None:
    milestone = trainer._Run._milestone

    def stop(run: trainer._Run, *arguments: Any) -> None:
        run.progress.seconds = 3600
        milestone(run, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "_milestone", stop)
        with pytest.raises(KeyboardInterrupt):
            train_flow(data, CONFIG, tmp_path / "flow", SHORT, quiet=True)
    train_flow(data, CONFIG, tmp_path / "flow", SHORT, resume=True, quiet=True)
    assert load_flow(tmp_path / "flow").info["training"]["minutes_taken"] >= 60


def test_what_the_recipe_says_is_done(data: ImageData, tmp_path: Path, monkeypatch) -> None:
    seen, milestone = [], trainer._Run._milestone

    def look(run: trainer._Run, *arguments: Any) -> None:
        (group,) = run.optimizer.param_groups
        norms = [p.grad.norm() for p in run.model.parameters() if p.grad is not None]
        seen.append((group["lr"], group["weight_decay"], float(torch.stack(norms).norm())))
        milestone(run, *arguments)

    monkeypatch.setattr(trainer._Run, "_milestone", look)
    recipe = dataclasses.replace(SHORT, warmup=1000, clip=1e-3, weight_decay=0.25)
    train_flow(data, CONFIG, tmp_path / "flow", recipe, quiet=True)
    lr, decay, norm = seen[0]  # after 10 of 20 steps
    assert lr > 0.4 * recipe.lr  # a short training is warm after a tenth of it
    assert decay == 0.25
    assert norm <= 1.01e-3


def test_the_average_of_weights_forgets_their_start() -> None:
    average, now = torch.zeros(1), torch.ones(1)
    trainer._Warming(0.999)([average], [now], 0)
    assert average.item() == pytest.approx(0.9)


def test_who_is_killed_before_a_milestone_does_not_go_on_with_what_was_there(
    trained: Path, tmp_path, data, monkeypatch
) -> None:
    out, step = tmp_path / "flow", trainer._Run._step
    shutil.copytree(trained, out)
    before = load_state(out)[1]

    def killed(run: trainer._Run, *arguments: Any) -> Tensor:
        if run.progress.step == 3:
            raise MemoryError
        return step(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "_step", killed)
        with pytest.raises(MemoryError):
            train_flow(data, CONFIG, out, SHORT, overwrite=True, quiet=True)
    steps: list[int] = []

    def counted(run: trainer._Run, *arguments: Any) -> Tensor:
        steps.append(run.progress.step)
        return step(run, *arguments)

    monkeypatch.setattr(trainer._Run, "_step", counted)
    train_flow(data, CONFIG, out, SHORT, resume=True, quiet=True)
    assert steps[0] == 1
    after = load_state(out)[1]
    assert all(torch.equal(before[key], after[key]) for key in before)  # the same seed


def test_a_user_of_accelerate_may_train_a_flow(data: ImageData, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests of this process
    recipe = dataclasses.replace(SHORT, epochs=0.1)
    with torch.no_grad():  # which a training leaves aside
        train_flow(data, CONFIG, tmp_path / "a", recipe, quiet=True)
    try:
        Accelerator(mixed_precision="bf16")  # the flow left no other precision behind
        with pytest.raises(ValueError, match="mixed_precision='bf16' in this process"):
            train_flow(data, CONFIG, tmp_path / "b", recipe, quiet=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator()
        train_flow(data, CONFIG, tmp_path / "b", recipe, quiet=True)
        assert accelerator.device.type  # it has its state still
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_labels_may_be_ids_and_nothing_else_than_whole_numbers(data, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHORT, epochs=0.1)
    assert data.labels is not None
    ids = dataclasses.replace(data, labels=10_000_000_000 + data.labels)
    out = train_flow(ids, CONFIG, tmp_path / "a", recipe, quiet=True)
    assert load_flow(out).info["calibration"]["linf"]
    for labels in (data.labels.float(), data.labels[:-1], data.labels[:, None]):
        wrong = dataclasses.replace(data, labels=labels)
        with pytest.raises(TypeError, match="one for each of the 1500 images"):
            train_flow(wrong, CONFIG, tmp_path / "b", recipe, quiet=True)


def test_images_of_many_channels_have_pictures_too(tmp_path: Path) -> None:
    images = torch.randint(256, (40, 5, 4, 4), dtype=torch.uint8)
    config = GlowConfig(shape=(5, 4, 4), levels=1, steps=1, hidden=4)
    data = ImageData(images, None, 256, "bands")
    out = train_flow(data, config, tmp_path, Recipe(epochs=1), quiet=True)
    with Image.open(out / "samples.png") as picture:
        assert picture.mode == "RGB"


def test_too_few_images_are_not_a_training_that_diverged(tmp_path: Path) -> None:
    config = GlowConfig(shape=(1, 4, 4), levels=2, steps=1, hidden=4)
    data = ImageData(torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8), None, 256, "two")
    with pytest.raises(ValueError, match="1 image to begin with is too few"):
        train_flow(data, config, tmp_path, Recipe(epochs=1), quiet=True)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with trainer._patient(alone=True) as asked_to_stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not asked_to_stop()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_training_is_endless_by_its_epochs() -> None:
    with pytest.raises(ValueError, match="epochs must be a finite number"):
        Recipe(epochs=math.inf)


def test_every_epoch_has_an_order_of_its_own(tmp_path, monkeypatch) -> None:
    """And its images are all those that are not held out, each once."""
    data, seen = load_images("digits"), []

    def look(run: trainer._Run, u: torch.Tensor, *arguments: object) -> torch.Tensor:
        seen.append((u * 17).floor())
        return step(run, u, *arguments)

    step = trainer._Run._step
    monkeypatch.setattr(trainer._Run, "_step", look)
    monkeypatch.setattr(trainer, "publish", lambda *_, **__: None)
    recipe = dataclasses.replace(SHORT, batch_size=400)
    train_flow(data, CONFIG, tmp_path / "flow", recipe, quiet=True)
    half = len(seen) // 2
    one, two = (torch.cat(part) for part in (seen[:half], seen[half:]))
    assert one.shape == two.shape
    assert not torch.equal(one, two)


def test_images_are_mirrored_left_and_right(tmp_path, monkeypatch) -> None:
    """Of images that are bright on the left some are then bright on the right, none above."""
    data = load_images("digits")
    images = torch.zeros_like(data.images[:200])
    images[:, :, :4, :4] = 16
    batches = []

    def look(run: trainer._Run, u: torch.Tensor, *arguments: object) -> torch.Tensor:
        batches.append(u)
        return torch.zeros(())

    monkeypatch.setattr(trainer._Run, "_step", look)
    monkeypatch.setattr(trainer._Run, "_milestone", lambda *_: None)
    monkeypatch.setattr(trainer, "publish", lambda *_, **__: None)
    recipe = dataclasses.replace(SHORT, flip=True)
    images = dataclasses.replace(data, images=images, labels=None)
    train_flow(images, CONFIG, tmp_path / "flow", recipe, quiet=True)
    u = torch.cat(batches)[:, 0]
    assert (u[:, :4].mean((1, 2)) > 0.4).all()
    right = (u[:, :, 4:].mean((1, 2)) > u[:, :, :4].mean((1, 2))).float().mean()
    assert 0.3 < right < 0.7


def test_the_rate_of_learning_warms_up_and_falls(tmp_path, monkeypatch) -> None:
    rates = []

    def look(run: trainer._Run, *arguments: object) -> torch.Tensor:
        loss = step(run, *arguments)
        rates.append(run.optimizer.param_groups[0]["lr"] / run.recipe.lr)
        return loss

    step = trainer._Run._step
    monkeypatch.setattr(trainer._Run, "_step", look)
    monkeypatch.setattr(trainer, "publish", lambda *_, **__: None)
    recipe = dataclasses.replace(SHORT, epochs=20, warmup=5, every=1000)
    train_flow(load_images("digits"), CONFIG, tmp_path / "flow", recipe, quiet=True)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=0.01)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[len(rates) // 2] == pytest.approx(0.5, abs=0.01)
    assert rates[-1] < 0.01
