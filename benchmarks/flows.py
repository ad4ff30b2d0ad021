"""How good the shipped flows are: bits/dim, round trip, the effect of bf16, stability.

Run:  IJSAT_DATA=... python benchmarks/flows.py        (a minute; the real images need IJSAT_DATA)

Everything is measured on test images. The bf16 row is the price of `compute_dtype=bfloat16`, that
is of bfloat16 in the coupling networks alone, against the same flow in float32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import record
from benchmarks.real_data import cifar10, data_folder, fashion_mnist
from ijsat_aug.flows import ImageData, build_glow, load_flow, load_images, load_state, round_trip
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.flows.publish import evaluate

NAMES = ("digits", "cifar10", "cifar10-fast", "fashion-mnist")
IMAGES = 256
ETAS = (0.05, 0.1, 0.2, 0.5, 1.0)


def test_data(name: str) -> ImageData | None:
    """The test split of a flow's own data, when it is at hand."""
    if name == "digits":
        return load_images("digits", train=False)
    if name.startswith("cifar10") and data_folder() is not None:
        images, labels = cifar10(train=False)
        return ImageData(images, labels, 256, "CIFAR-10")
    if name == "fashion-mnist" and data_folder() is not None:
        return ImageData(*fashion_mnist(train=False), 256, "Fashion-MNIST")
    return None


def effect_of_bf16(flow: FrozenGlow, x: Tensor) -> dict[str, float]:
    """What changes when the coupling networks run in bfloat16."""
    low = flow.to(compute_dtype=torch.bfloat16)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    z = flow.encode(x)
    away = (low.decode(low.encode(x)) - x).abs()
    exact, rough = (f.vjp(f.encode_with_tape(x)[1], g) for f in (flow, low))
    return {
        "round_trip_max": float(away.max()),
        "round_trip_mean": float(away.mean()),
        "latent_rms": float((low.encode(x) - z).square().mean().sqrt()),
        "gradient_relative_error": float((rough - exact).norm() / exact.norm()),
        "gradient_cosine_min": float(F.cosine_similarity(exact, rough).min()),
        "gradient_sign_agreement": float((exact.sign() == rough.sign()).float().mean()),
    }


def stability(flow: FrozenGlow, x: Tensor) -> dict[str, float]:
    """Share of images that a random corner of the latent box moves beyond all reason (> 10)."""
    z = flow.encode(x)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).sign()
    shares = {}
    for eta in ETAS:
        moved = flow.decode(z + eta * noise)
        wild = ~((moved - x).abs().flatten(1).amax(1) <= 10)
        shares[str(eta)] = float(wild.float().mean())
    return shares


def measure(name: str, data: ImageData) -> dict[str, Any]:
    """All figures of one flow."""
    flow = load_flow(name)
    config, state = load_state(name)
    model = build_glow(config)
    model.load_state_dict(state)
    x = data.pixels[:IMAGES]
    return {
        "images": "x".join(map(str, config.shape)),
        "megabytes": round(flow.info["weights"]["bytes"] / 1e6, 1),
        "sha256": flow.info["weights"]["sha256"],
        "data": flow.info["data"],
        "bits_per_dim": round(evaluate(model, config, data), 4),
        "test_images": len(data.images),
        "round_trip": round_trip(flow, x),
        "bf16": effect_of_bf16(flow, x),
        "blown_up": stability(flow, x),
    }


def main() -> None:
    flows = {}
    for name in NAMES:
        data = test_data(name)
        if data is None:
            print(f"{name}: skipped, IJSAT_DATA does not name the data")
            continue
        flows[name] = measure(name, data)
        print(name, flows[name])
    if len(flows) == len(NAMES):
        print(record("flows", {"seed": 0, "flows": flows}))


if __name__ == "__main__":
    main()
