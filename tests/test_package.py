"""The package as a whole: light import, public names, files, README, and what the wheel holds."""

from __future__ import annotations

import doctest
import hashlib
import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ijsat_aug
from ijsat_aug import attack, evaluation, flows, functional, training, transforms

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("kornia", "normflows", "torchvision", "typer", "rich", "accelerate", "matplotlib")


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_the_import_is_light() -> None:
    loaded = modules_after("import ijsat_aug; dir(ijsat_aug); ijsat_aug.__version__")
    assert not loaded & {*HEAVY, "torch", "numpy"}


def test_a_flow_loads_and_runs_without_the_training_libraries() -> None:
    loaded = modules_after(
        "import torch, ijsat_aug; f = ijsat_aug.load_flow('digits'); f.encode(f.sample(2))"
    )
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize(
    "module", [ijsat_aug, attack, evaluation, flows, functional, training, transforms]
)
def test_every_public_name_has_an_executed_example(module: object) -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for name in module.__all__:  # type: ignore[attr-defined]
        value = getattr(module, name)
        if isinstance(value, type(sys)) or name in ("CheckpointError", "CORRUPTIONS", "GROUPS"):
            continue
        assert value.__doc__, name
        assert any(t.examples for t in finder.find(value, name)), f"{name} has no example"


def test_public_names_are_listed_and_unknown_ones_fail() -> None:
    assert set(ijsat_aug.__all__) <= set(dir(ijsat_aug))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        importlib.import_module("ijsat_aug").nonsense  # noqa: B018


def test_readme_and_ci_share_the_test_command() -> None:
    command = next(
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("python3 -m venv") and line.endswith("pytest")
    )
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_registry_matches_the_shipped_files() -> None:
    from benchmarks.register import checksums

    assert json.loads((ROOT / "pretrained" / "registry.json").read_text()) == checksums()


def test_sizes_are_within_the_house_rules() -> None:
    weights = list((ROOT / "pretrained").rglob("*.safetensors"))
    assert all(w.stat().st_size < 20e6 for w in weights)
    assert sum(w.stat().st_size for w in weights) < 60e6


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling")
    from hatchling.builders.wheel import WheelBuilder

    target = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(target), versions=["standard"])
    return zipfile.ZipFile(path)


def test_small_checkpoints_travel_in_the_wheel_and_large_ones_do_not(
    wheel: zipfile.ZipFile,
) -> None:
    names = set(wheel.namelist())
    assert {"ijsat_aug/py.typed", "ijsat_aug/pretrained/registry.json"} <= names
    for weights in (ROOT / "pretrained").rglob("model.safetensors"):
        inside = f"ijsat_aug/pretrained/{weights.parent.name}/model.safetensors"
        assert (inside in names) == (weights.stat().st_size < 2e6), inside
    assert not any(n.startswith(("tests/", "benchmarks/")) for n in names)


def test_the_wheel_works_where_there_is_no_source_tree(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path)
    script = (
        "import ijsat_aug, sys\n"
        "assert ijsat_aug.__file__.startswith(sys.argv[1]), ijsat_aug.__file__\n"
        "print(ijsat_aug.load_flow('digits').info['weights']['sha256'])\n"
        "try: ijsat_aug.load_flow('cifar10')\n"
        "except ijsat_aug.CheckpointError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[1])\n{script}",
         str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True,
        env={"IJSAT_HOME": str(tmp_path / "home"), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sha256, error = done.stdout.splitlines()
    data = (ROOT / "pretrained" / "digits" / "model.safetensors").read_bytes()
    assert sha256 == hashlib.sha256(data).hexdigest()
    assert "set IJSAT_URL" in error
