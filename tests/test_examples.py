"""The examples run as they stand, and the one line can be taken out of the training script."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train_torchvision.py"
# Three steps an epoch; where bfloat16 is emulated a ResNet-18 would take half an hour.
QUICK = ("--model", "shufflenet_v2_x0_5", "--batch-size", "512", "--workers", "0")
COUNTER = "conv1.1.num_batches_tracked"


def run_python(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd,
        env=os.environ | {"COLUMNS": "120", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def pictures(folder: Path, parts: dict[str, int]) -> None:
    """So many pictures of noise of each of three classes."""
    for part, count in parts.items():
        for i in range(count):
            for kind in ("cat", "dog", "owl"):
                path = folder / part / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = torch.randint(256, (70, 80, 3), dtype=torch.uint8).numpy()
                Image.fromarray(noise).save(path)


def checkpoint(folder: Path) -> dict[str, object]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def run_here(script: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[torch.Size]:
    """Run a script's main() in this process; the shapes of the targets that train its criterion."""
    shapes = []
    forward = nn.CrossEntropyLoss.forward

    def record(self, logits, target):
        shapes.append(target.shape)
        return forward(self, logits, target)

    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", record)
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__"})
    return shapes


@pytest.mark.slow
def test_the_one_line_and_without_it(tmp_path, monkeypatch, capsys) -> None:
    lines = SCRIPT.read_text().splitlines(keepends=True)
    ours = [line for line in lines if "RobustMixup" in line or "AugmentedLoader" in line]
    assert len(ours) == 4  # an import, the transform, the line, and where it begins
    assert ours[0] == "from ijsat_aug import AugmentedLoader, RobustMixup\n"
    without = tmp_path / "without.py"
    without.write_text("".join(line for line in lines if line not in ours))

    steps = {}
    for script, name in ((SCRIPT, "with"), (without, "without")):
        out = tmp_path / name
        shapes = run_here(script, monkeypatch, "--epochs", 1, "--out", out, *QUICK)
        steps[name] = re.findall(r"(\d+) steps", capsys.readouterr().out)
        counter = checkpoint(out)["model"][COUNTER]
        assert int(counter) == len(shapes) == 3
        assert {len(shape) for shape in shapes} == {2 if name == "with" else 1}
        monkeypatch.undo()
    assert steps == {"with": ["3"], "without": ["3"]}


@pytest.mark.slow
def test_the_script_resumes_where_it_stopped(tmp_path, monkeypatch, capsys) -> None:
    pictures(tmp_path, {"train": 8, "val": 2})
    out = tmp_path / "run"
    few = ("--data-path", tmp_path, "--size", 32, *QUICK, "--batch-size", 8, "--out", out)
    run_here(SCRIPT, monkeypatch, "--epochs", 1, "--amp", "bf16", *few)
    first = ("--resume", out / "checkpoint.pt")
    capsys.readouterr()
    run_here(SCRIPT, monkeypatch, "--epochs", 2, *first, *few)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ·")[0] for line in lines] == ["epoch 2/2"]
    state = checkpoint(out)
    assert int(state["model"][COUNTER]) == 6
    assert int(state["ema"]["n_averaged"]) == 6
    assert not list(out.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.distributed
def test_the_script_under_torchrun(tmp_path) -> None:
    done = run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, SCRIPT,
        "--device", "cpu", "--epochs", 1, "--out", tmp_path / "run", *QUICK, cwd=tmp_path,
    )  # fmt: skip
    assert "epoch 1/1 · 2 steps" in done.stdout
    assert int(checkpoint(tmp_path / "run")["model"][COUNTER]) == 2


@pytest.mark.slow
def test_the_script_on_folders_of_larger_images(tmp_path) -> None:
    """At 64 pixels no flow fits, and its manifold moves the low band; the last batch is odd."""
    pictures(tmp_path, {"train": 13, "val": 5})
    done = run_python(
        SCRIPT, "--data-path", tmp_path, "--size", 64, "--epochs", 1, "--batch-size", 12,
        "--workers", 1, "--out", tmp_path / "run", cwd=tmp_path,
    )  # fmt: skip
    assert "epoch 1/1 · 4 steps" in done.stdout  # 39 images: 12, 12, 12, 3
    assert checkpoint(tmp_path / "run")["model"]["fc.bias"].shape == (3,)


@pytest.mark.slow
def test_a_network_is_fine_tuned_on_digits(tmp_path, monkeypatch, capsys) -> None:
    run_here(ROOT / "examples" / "finetune.py", monkeypatch, "--repeats", 1)
    scores, gain = capsys.readouterr().out.splitlines()
    plain, ours = map(float, re.findall(r"([\d.]+) %", scores))
    assert min(plain, ours) > 70
    assert gain == f"{ours - plain:+.1f} points on average"


@pytest.mark.slow
def test_a_network_of_torchvision_is_fine_tuned(tmp_path, monkeypatch, capsys) -> None:
    """Its weights lie where torch keeps what it has fetched: the code that fetches is theirs."""
    kept = tmp_path / "hub" / "checkpoints" / Path(ResNet18_Weights.DEFAULT.url).name
    kept.parent.mkdir(parents=True)
    torch.save(resnet18().state_dict(), kept)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    pictures(tmp_path / "data", {"train": 6, "val": 3})
    run_here(
        ROOT / "examples" / "finetune.py", monkeypatch, "--data-path", tmp_path / "data",
        "--size", 32, "--epochs", 1,
    )  # fmt: skip
    assert len(re.findall(r"[\d.]+ %", capsys.readouterr().out)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "kornia", "albumentations"])
def test_the_compose_examples_draw(library, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip(library, reason='needs pip install "ijsat-aug[albumentations]"')
    out = tmp_path / "a" / "grid.png"
    monkeypatch.syspath_prepend(ROOT / "examples")
    run_here(ROOT / "examples" / f"compose_{library}.py", monkeypatch, "--out", out)
    printed = capsys.readouterr().out
    assert f"Look at {out}." in printed
    assert ("replayed exactly: True" in printed) == (library == "kornia")
    with Image.open(out) as picture:
        assert picture.size[0] > 500


@pytest.mark.slow
def test_the_example_trains_a_flow(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("accelerate")
    script, out = ROOT / "examples" / "train_a_flow.py", tmp_path / "flow"
    run_here(script, monkeypatch, "--minutes", "0.05", "--out", out)
    assert "FrozenGlow(1x8x8" in capsys.readouterr().out
    assert (tmp_path / "flow" / "samples.png").is_file()
