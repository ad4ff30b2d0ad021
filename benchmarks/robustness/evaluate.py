"""What the augmentations buy, on networks that the repository's own examples train.

Run:  python benchmarks/robustness/evaluate.py digits                   (ten minutes on two cores)
      IJSAT_DATA=... python benchmarks/robustness/evaluate.py cifar10   (an hour)

``digits``: the four networks of ``ijsat-aug demo``. ``cifar10``: ``examples/train_torchvision.py``
on 5,000 images, with ``RobustMixup`` as it comes and without its one line. Everything goes through
``ijsat-aug evaluate``; each finished threat is kept under ``--work``, so that a run that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import record
from benchmarks.real_data import cifar10
from benchmarks.robustness.report_rows import answers, numbers
from ijsat_aug.demo import run as train_on_digits
from ijsat_aug.evaluation import Report, to_markdown
from ijsat_aug.evaluation.command import run as evaluate

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_torchvision.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Pixels of 8x8 digits are few and large, and moves of fractions of one mean little: the demo's
# radius, and of the unseen threats those that do not warp.
ON_DIGITS = ("linf=0.1", "l2=0.5", "autoattack=0.1", "om", "jsa=0.1", "stadv", "recolor", "gabor")
# AutoAttack at 8/255 leaves nothing of networks that never saw attacks of that size.
ON_CIFAR = ("linf=2/255", "l2=0.25", "autoattack=2/255", "om", "jsa=2/255", "unseen")
TRAINED, TESTED = 5000, 1000


def digits(work: Path) -> dict[str, Report]:
    """The networks of the demo."""
    if not (work / "IJSAT.safetensors").is_file():
        train_on_digits(work)
    reports: dict[str, Report] = {}
    for name in ("plain", "mixup", "RobustMixup", "IJSAT"):
        reports[name], _ = evaluate(
            "digits", model="ijsat_aug.demo:network", weights=str(work / f"{name}.safetensors"),
            flow="digits", threats=ON_DIGITS, folder=work / "evaluated" / name,
            html=work / f"{name}.html", progress=True,
        )  # fmt: skip
    return reports


def cifar(work: Path, count: int, epochs: int) -> dict[str, Report]:
    """The torchvision script with and without its one line."""
    folder = write_folders(work / "images")
    reports: dict[str, Report] = {}
    for name in ("plain", "RobustMixup"):
        trained = work / f"{name}-{epochs}-epochs"
        weights = trained / "ema.safetensors"
        if not weights.is_file():
            train(trained, folder, epochs, with_line=name == "RobustMixup")
        reports[name], _ = evaluate(
            str(folder / "val"), model="resnet18", weights=str(weights), name=name, flow="cifar10",
            threats=ON_CIFAR, limit=count, mean=MEAN, std=STD, folder=work / "evaluated" / name,
            html=work / f"{name}.html", progress=True,
        )  # fmt: skip
    return reports


def write_folders(folder: Path) -> Path:
    """CIFAR-10 as the script wants it: train/ and val/, a folder for each class."""
    for part, count in (("train", TRAINED), ("val", TESTED)):
        images, labels = cifar10(train=part == "train", batches=1)
        for i in range(count):
            path = folder / part / str(int(labels[i])) / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(path)
    return folder


def script(with_line: bool) -> str:
    """The example without its lines, or with those of ``RobustMixup`` as it comes."""
    code = SCRIPT.read_text()
    if with_line:
        for preset, plain in _AS_IT_COMES.items():
            assert preset in code
            code = code.replace(preset, plain)
        return code
    lines = code.splitlines(keepends=True)
    return "".join(line for line in lines if not any(word in line for word in _OURS))


_OURS = ("ijsat_aug", "RobustMixup", "AugmentedLoader", "data.set_epoch")
_AS_IT_COMES = {
    'RobustMixup.preset("accuracy", net': "RobustMixup(net",
    ", epochs=(options.epochs // 2, None)": "",
}


def train(out: Path, folder: Path, epochs: int, with_line: bool) -> None:
    """Run the example in this process, and keep the averaged weights."""
    code = script(with_line)
    arguments = ["--data-path", folder, "--epochs", epochs, "--workers", 0, "--out", out]
    before, sys.argv = sys.argv, [str(SCRIPT), *map(str, arguments)]
    try:
        exec(compile(code, str(SCRIPT), "exec"), {"__name__": "__main__"})
    finally:
        sys.argv = before
    state = torch.load(out / "checkpoint.pt", weights_only=True)["ema"]
    weights: dict[str, Tensor] = {
        name.removeprefix("module."): value
        for name, value in state.items()
        if name.startswith("module.")
    }
    save_file(weights, out / "ema.safetensors")


def spent(report: Report) -> float:
    """Seconds on all threats, whichever run they belong to."""
    return round(sum(result.seconds for result in report.results.values()), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", choices=("digits", "cifar10"))
    parser.add_argument("--work", type=Path, default=Path("runs/robustness"))
    parser.add_argument("--images", type=int, default=200, help="of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=12, help="on CIFAR-10")
    options = parser.parse_args()
    work = options.work / options.data
    if options.data == "digits":
        reports = digits(work)
    else:
        reports = cifar(work, options.images, options.epochs)
    first = reports["plain"]
    for name, report in reports.items():
        print(to_markdown(report, None if name == "plain" else first))
    result = {
        "images": first.settings["images"], "seed": first.settings["seed"],
        "seconds": {name: spent(report) for name, report in reports.items()},
        "models": {name: report.settings["model"] for name, report in reports.items()},
        "warnings": {name: list(report.warnings) for name, report in reports.items()},
        "right": {name: answers(report) for name, report in reports.items()},
        "tables": {
            name: numbers(report, None if name == "plain" else first)
            for name, report in reports.items()
        },
    }  # fmt: skip
    print(record(f"robustness-{options.data}", result))


if __name__ == "__main__":
    main()
