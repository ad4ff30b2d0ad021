"""Loss gained per second: what each way to attack a batch buys for its time.

Run:  IJSAT_DATA=... python benchmarks/speed/strength.py     (half an hour on two cores)

A CIFAR ResNet-18 of half the width is trained plainly on real CIFAR-10 for three epochs and then
stays as it is. Every setting attacks the same test images; recorded are how much the cross-entropy
rises, in eval mode, and the time that the attack takes, medians of interleaved rounds, in
multiples of a plain training step. A setting is on the Pareto front when nothing cheaper raises the
loss as much. ``docs/strength.png`` shows it. The random starts are those of the transforms, so that
the settings are what a user gets. The linear joint step is also taken with cheaper arithmetic:
bfloat16 of the model or of the flow alone, channels-last, a compiled model, half of the images.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import RESULTS, interleave, keep_memory, median_ms, ratio, record, where
from benchmarks.networks import cifar_resnet18
from benchmarks.real_data import cifar10
from benchmarks.speed.step import training_step
from benchmarks.training import train_plainly
from ijsat_aug import JointSpaceAdv, load_flow
from ijsat_aug.attack.traces import buffers_kept
from ijsat_aug.flows.frozen import FrozenGlow

ROOT = Path(__file__).resolve().parents[2]
EPS = 1 / 255
WIDTH = 32
COLOURS = {"pixel": "tab:blue", "latent": "tab:orange", "joint": "tab:green"}
Attack = Callable[[], Tensor]


def trained(work: Path) -> nn.Module:
    """A ResNet-18 of half the width, trained plainly; kept in a file."""
    images, labels = cifar10()
    weights = work / "network.safetensors"
    return train_plainly(partial(cifar_resnet18, width=WIDTH), images, labels, 3, weights=weights)


def attacks(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Attack]:
    """Every setting, as a function that makes the attacked batch."""
    flow = load_flow("cifar10", device=x.device)
    low = load_flow("cifar10", device=x.device, compute_dtype=torch.bfloat16)
    bf16: dict[str, Any] = {"amp_dtype": torch.bfloat16}
    fast = load_flow("cifar10-fast", device=x.device)
    fast_low = load_flow("cifar10-fast", device=x.device, compute_dtype=torch.bfloat16)
    budgets = {"pixel": (EPS, 0.0), "latent": (0.0, None), "joint": (EPS, None)}
    gradient = training_gradient(network, x, y)
    found: dict[str, Attack] = {}

    def add(name: str, adv: JointSpaceAdv) -> None:
        found[name] = lambda: adv(x, y)[0]

    for kind, (eps, eta) in budgets.items():
        for steps in (1, 2, 3, 5, 10):
            for word, precision in (("", {}), (", bf16", bf16)):
                manifold = None if kind == "pixel" else (low if precision else flow)
                options = {"eps": eps, "eta": eta, "steps": steps, **precision}
                exact = JointSpaceAdv(network, manifold, method="exact", **options)
                add(f"{kind}, {steps} steps{word}", exact)
                if kind != "pixel" and steps == 1:
                    linear = partial(JointSpaceAdv, network, method="linear", **options)
                    add(f"{kind}, linear{word}", linear(flow=manifold))
                    quick = fast_low if precision else fast
                    add(f"{kind}, linear{word}, fast flow", linear(flow=quick))
        flows = {"": flow, ", bf16": low, ", bf16, fast flow": fast_low}
        for word, manifold in flows.items() if kind != "pixel" else (("", None),):
            adv = JointSpaceAdv(None, manifold, eps=eps, eta=eta)
            found[f"{kind}, replay{word}"] = partial(adv.follow, x, y, gradient)
    for word, adv in arithmetic(network, flow, low).items():
        add(f"joint, linear, {word}", adv)
    return found


def arithmetic(network: nn.Module, flow: FrozenGlow, low: FrozenGlow) -> dict[str, JointSpaceAdv]:
    """The linear joint step, computed in other ways."""
    linear = partial(JointSpaceAdv, eps=EPS, method="linear")
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    layout: dict[str, Any] = {"memory_format": torch.channels_last}
    bf16: dict[str, Any] = {"amp_dtype": torch.bfloat16}
    return {
        "bf16 model": linear(network, flow, **bf16),
        "bf16 flow": linear(network, low),
        "channels-last": linear(last, flow, **layout),
        "bf16, channels-last": linear(last, low, **layout, **bf16),
        "compiled model": linear(torch.compile(copy.deepcopy(network)), flow),
        "half of the batch": linear(network, flow, fraction=0.5),
        "half of the batch, bf16": linear(network, low, fraction=0.5, **bf16),
    }


def training_gradient(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What an ordinary training step leaves on its images: in train mode, mean reduction."""
    leaf = x.clone().requires_grad_()
    with buffers_kept(list(network.modules())):
        (gradient,) = torch.autograd.grad(F.cross_entropy(network.train()(leaf), y), leaf)
    network.eval()
    return gradient


@torch.no_grad()
def loss(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy."""
    return float(F.cross_entropy(network(x), y))


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Who gains more than everybody cheaper."""
    best, found = -float("inf"), []
    for name, (_, gain) in sorted(points.items(), key=lambda item: item[1]):
        if gain > best:
            best = gain
            found.append(name)
    return found


def draw(points: dict[str, tuple[float, float]], on_front: list[str], path: Path) -> None:
    """Time against gain, one colour a space."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    for name, (cost, gain) in points.items():
        kind = name.split(",")[0]
        marker = "*" if "replay" in name else "D" if "linear" in name else "o"
        low = "bf16" in name
        face = "none" if low else COLOURS[kind]
        axis.scatter(
            cost, gain, s=60, edgecolors=COLOURS[kind], marker=marker, facecolors=face, zorder=3
        )
    line = [points[name] for name in on_front]
    axis.step(*zip(*line, strict=True), where="post", color="grey", lw=1, zorder=1)
    told = 0.0
    for name in on_front:
        cost, gain = points[name]
        if gain > told + 0.02:  # the same in another precision needs no words
            axis.annotate(name, (cost, gain), (5, -11), textcoords="offset points", fontsize=7)
            told = gain
    axis.set(xscale="log", xlabel="time, in plain training steps", ylabel="cross-entropy gained")
    axis.set_xlim(right=3 * max(cost for cost, _ in points.values()))
    for kind, colour in COLOURS.items():
        axis.scatter([], [], s=60, c=colour, label=kind)
    for marker, label in (("*", "replay"), ("D", "linear"), ("o", "steps")):
        axis.scatter([], [], s=60, c="black", marker=marker, label=label)
    axis.scatter([], [], s=60, edgecolors="black", facecolors="none", label="bf16")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/strength"))
    parser.add_argument("--redraw", action="store_true", help="draw what is recorded, and stop")
    options = parser.parse_args()
    picture = ROOT / "docs" / "strength.png"
    if options.redraw:
        known = json.loads((RESULTS / "strength-cpu.json").read_text())
        times = known["ratios"]
        points = {name: (times[name]["median"], gain) for name, gain in known["gains"].items()}
        draw(points, known["front"], picture)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = trained(options.work)
    images, labels = cifar10(train=False)
    x = images[: options.batch].to(device).float() / 255
    y = labels[: options.batch].to(device)
    keep_memory()
    runs = attacks(network, x, y)
    clean = loss(network, x, y)
    torch.manual_seed(0)
    gains = {name: loss(network, attack(), y) - clean for name, attack in runs.items()}
    other = cifar_resnet18(width=WIDTH).to(device).train()  # so that the attacked one stays
    timed = {**runs, "plain step": training_step(other, x, y, None)}
    seconds = interleave(timed, options.rounds, warmup=1)
    ratios = {name: ratio(times, seconds["plain step"]) for name, times in seconds.items()}
    points = {name: (ratios[name]["median"], gain) for name, gain in gains.items()}
    on_front = front(points)
    for name, (cost, gain) in sorted(points.items(), key=lambda item: item[1]):
        print(f"  {name:<26} {cost:7.3f} steps  +{gain:.3f} {'front' * (name in on_front)}")
    draw(points, on_front, picture)
    result = {
        "network": f"cifar_resnet18(width={WIDTH})", "flow": "cifar10", "batch": options.batch,
        "rounds": options.rounds, "seed": 0, "eps": EPS, "clean_loss": round(clean, 4),
        "gains": {name: round(gain, 4) for name, gain in gains.items()}, "ratios": ratios,
        "ms": {name: median_ms(times) for name, times in seconds.items()}, "front": on_front,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(record(f"strength-{where()}", result))


if __name__ == "__main__":
    main()
