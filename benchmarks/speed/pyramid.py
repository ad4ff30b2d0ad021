"""What a flow of 32-pixel images costs at 224 pixels, as a share of a ResNet-50's passes.

Run:  python benchmarks/speed/pyramid.py              (five minutes on two cores)

One process, contenders interleaved, medians over rounds with quartiles, batch 8. "Gradient" is a
decode and its vector-Jacobian product; "a linear step" all that the manifold does in one:
encode with a tape, the product, what the low band leaves out, one decode.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet50

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import interleave, keep_memory, median_ms, ratio, record, verdict, where
from ijsat_aug import load_flow
from ijsat_aug.flows import Manifold, Pyramid, Tiles

SIZE = 224
TARGETS = {"Pyramid, gradient": 0.10, "Pyramid, a linear step": 0.10}


def training_passes(network: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward to the weights."""

    def run() -> None:
        network.zero_grad()
        network(x).sum().backward()

    return run


def gradient(manifold: Manifold, z: Tensor, g: Tensor) -> Callable[[], object]:
    """A decode and the gradient at its latent."""

    def run() -> None:
        leaf = z.clone().requires_grad_()
        torch.autograd.grad(manifold.decode(leaf), leaf, g)

    return run


def linear_step(pyramid: Pyramid, x: Tensor, g: Tensor) -> Callable[[], object]:
    """What the manifold does in a linear step."""

    def run() -> None:
        z, tape = pyramid.encode_with_tape(x)
        pyramid.vjp(tape, g)
        pyramid.rest(x)
        pyramid.decode(z)

    return run


def measure(batch: int, rounds: int, tiles: bool) -> dict[str, Any]:
    """Times as shares of the network's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = resnet50().train().to(device)
    flow = load_flow("cifar10", device=device)
    pyramid, tiled = Pyramid(flow, (SIZE, SIZE)), Tiles(flow, (SIZE, SIZE))
    x = torch.rand(batch, 3, SIZE, SIZE, device=device)
    g = torch.randn_like(x)
    runs = {
        "ResNet-50": training_passes(network, x),
        "Pyramid, gradient": gradient(pyramid, pyramid.encode(x), g),
        "Pyramid, a linear step": linear_step(pyramid, x, g),
    }
    if tiles:
        runs[f"{len(tiled)} Tiles, gradient"] = gradient(tiled, tiled.encode(x), g)
    seconds = interleave(runs, rounds, warmup=1)
    return {
        "ms": {name: median_ms(times) for name, times in seconds.items()},
        "ratios": {name: ratio(times, seconds["ResNet-50"]) for name, times in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-tiles", action="store_true")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    keep_memory()
    result = measure(options.batch, options.rounds, not options.no_tiles)
    for name, value in result["ratios"].items():
        judged = verdict(value["median"], TARGETS.get(name))
        print(f"  {name:<26} {value['median']:6.3f} [{value['q1']}-{value['q3']}] {judged}")
    if not options.no_record:
        payload = {"size": SIZE, "flow": "cifar10", "batch": options.batch}
        payload |= {"rounds": options.rounds, "seed": 0, "targets": TARGETS, **result}
        payload["threads"] = torch.get_num_threads()
        print(record(f"speed-pyramid-{where()}", payload))


if __name__ == "__main__":
    main()
