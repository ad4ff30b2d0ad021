"""Which shape of a flow buys most for its time: the same training time for each, then side by side.

Run:  IJSAT_DATA=... python benchmarks/speed/shapes.py        (an hour on two cores)

Each shape is trained on CIFAR-10's training split for the same minutes on one core (start
``--train NAME`` twice, side by side, to use two). Recorded are its bits/dim on test images, the
time of one latent step at batch 128 (encode, gradient, decode) beside that of the shipped flow,
and what the step gains: the rise of the loss of a fixed network on test images, at the radius that
the flow's own calibration recommends, where a step moves pixels by an RMS of 8/255.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import interleave, keep_memory, median_ms, ratio, record
from benchmarks.real_data import cifar10
from benchmarks.speed.strength import loss, trained
from ijsat_aug import JointSpaceAdv, load_flow
from ijsat_aug.flows import GlowConfig, ImageData, Recipe, train_flow
from ijsat_aug.flows.frozen import FrozenGlow

SHAPES: dict[str, dict[str, int]] = {
    "3 levels of 8, width 32": {"levels": 3, "steps": 8, "hidden": 32},
    "2 levels of 8, width 64, patches of 4": {"levels": 2, "steps": 8, "hidden": 64, "patch": 4},
    "3 levels of 4, width 64": {"levels": 3, "steps": 4, "hidden": 64},
    "3 levels of 4, width 32": {"levels": 3, "steps": 4, "hidden": 32},
}
BATCH = 128


def train(name: str, minutes: float, work: Path) -> None:
    """One shape, by the recipe of the shipped flow."""
    images, labels = cifar10()
    recipe = Recipe(minutes=minutes, lr=3e-3, warmup=300, flip=True, precision="bf16")
    config = GlowConfig(shape=(3, 32, 32), **SHAPES[name])
    tested, answers = cifar10(train=False)
    test = ImageData(tested[:2000], answers[:2000], 256, "CIFAR-10, test split")
    train_flow(
        ImageData(images, labels, 256, "CIFAR-10, training split"), config, work / _slug(name),
        recipe, test=test, overwrite=True, license="Apache-2.0", quiet=True,
    )  # fmt: skip


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def latent_step(flow: FrozenGlow, x: Tensor, g: Tensor) -> Callable[[], object]:
    """What a linear attack costs besides the model's own passes."""

    def step() -> Tensor:
        z, tape = flow.encode_with_tape(x)
        return flow.decode(z + 0.01 * flow.vjp(tape, g).sign())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", choices=tuple(SHAPES), help="train one shape and stop")
    parser.add_argument("--minutes", type=float, default=10, help="of training, for each shape")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"))
    options = parser.parse_args()
    if options.train:
        torch.set_num_threads(1)
        train(options.train, options.minutes, options.work)
        return
    for name in SHAPES:
        if not (options.work / _slug(name) / "model.safetensors").is_file():
            train(name, options.minutes, options.work)
    names = {"cifar10": "cifar10"} | {name: str(options.work / _slug(name)) for name in SHAPES}
    flows = {name: load_flow(path) for name, path in names.items()}
    network = trained(Path("runs/strength"))
    images, labels = cifar10(train=False)
    x, y = images[:512].float() / 255, labels[:512]
    clean = loss(network, x, y)
    keep_memory()
    g = torch.randn_like(x[:BATCH])
    seconds = interleave(
        {n: latent_step(f, x[:BATCH], g) for n, f in flows.items()}, options.rounds
    )
    table: dict[str, Any] = {}
    for name, flow in flows.items():
        adv = JointSpaceAdv(network, flow, eps=0, method="linear")
        shape = flow.config
        table[name] = {
            "levels": shape.levels, "steps": shape.steps, "hidden": shape.hidden,
            "patch": shape.patch, "bits_per_dim": flow.info["metrics"]["bits_per_dim"]["test"],
            "minutes": flow.info["training"]["minutes_taken"], "eta": adv.threat.eta,
            "ms": median_ms(seconds[name]), "ratio": ratio(seconds[name], seconds["cifar10"]),
            "gain": round(loss(network, adv(x, y)[0], y) - clean, 4),
        }  # fmt: skip
        print(name, table[name])
    print(
        record("flow-shapes", {"seed": 0, "batch": BATCH, "rounds": options.rounds, "flows": table})
    )


if __name__ == "__main__":
    main()
