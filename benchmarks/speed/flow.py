"""What the frozen decoder saves: time and memory against normflows' own decode + autograd.

Run:  python benchmarks/speed/flow.py            (three minutes on two cores)

One process, contenders interleaved, medians over rounds with quartiles, one thread and two, first
with glibc's usual allocator and then with one that keeps freed memory (see harness.keep_memory);
on a GPU with CUDA events, eager and under CUDA graphs. Every ratio is a share of normflows' time or
memory for the same gradient, or of a CIFAR ResNet-18's forward + backward to the image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import interleave, keep_memory, median_ms, ratio, record, verdict, where
from benchmarks.networks import cifar_resnet18
from ijsat_aug.flows.fold import freeze
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.flows.glow import GlowConfig, build_glow, from_unit

CONFIG = GlowConfig(shape=(3, 32, 32), levels=3, steps=8, hidden=128)
TARGETS = {
    "decode+vjp, float32 / normflows": 0.70,
    "decode+vjp, bf16 nets / normflows": 0.47,
    "encode+vjp, float32 / normflows": 0.70,
    "decode+vjp, float32 / resnet18": 0.30,
    "decode+vjp, bf16 nets / resnet18": 0.20,
    "memory, float32 / normflows": 0.16,
}


def trained_like(config: GlowConfig, seed: int = 0) -> Any:
    """A Glow with every weight away from its initial value; time does not depend on the values."""
    torch.manual_seed(seed)
    model = build_glow(config)
    with torch.no_grad():
        model(torch.rand(64, *config.shape))
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter)).requires_grad_(False)
    return model


def normflows_gradient(model: Any, config: GlowConfig, z: Tensor, g: Tensor) -> Tensor:
    """The gradient to z through normflows' own decoder."""
    leaf = z.detach().requires_grad_()
    sizes = [c * h * w for c, h, w in config.latent_shapes]
    parts = [
        p.unflatten(1, s) for p, s in zip(leaf.split(sizes, 1), config.latent_shapes, strict=True)
    ]
    x = from_unit(model.forward_and_log_det(parts)[0], config.bins)
    return torch.autograd.grad(x, leaf, g)[0]


def frozen_gradient(flow: FrozenGlow, z: Tensor, g: Tensor) -> Tensor:
    """The same gradient through the frozen decoder, as an autograd user asks for it."""
    leaf = z.detach().requires_grad_()
    return torch.autograd.grad(flow.decode(leaf), leaf, g)[0]


def linearised_gradient(flow: FrozenGlow, x: Tensor, g: Tensor) -> Tensor:
    """The gradient at z = encode(x) from the tape of encode: no decode at all."""
    _, tape = flow.encode_with_tape(x)
    return flow.vjp(tape, g)


def classifier_gradient(network: torch.nn.Module, x: Tensor) -> Tensor:
    """Forward and backward of the classifier to the image."""
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(network(leaf).sum(), leaf)[0]


def normflows_memory(model: Any, config: GlowConfig, z: Tensor) -> int:
    """Bytes that autograd keeps for the backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        leaf = z.detach().requires_grad_()
        sizes = [c * h * w for c, h, w in config.latent_shapes]
        parts = [
            p.unflatten(1, s)
            for p, s in zip(leaf.split(sizes, 1), config.latent_shapes, strict=True)
        ]
        x = model.forward_and_log_det(parts)[0]
        total = sum(seen.values())
        del x
    return total


def graphed(run: Callable[[], Tensor]) -> Callable[[], object]:
    """The same work as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def contenders(batch: int, device: str) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Any]]:
    """The runs to time, and the memory that they keep."""
    model = trained_like(CONFIG)
    flow = freeze(CONFIG, model.state_dict(), device=device)
    model.to(device)
    low = flow.to(compute_dtype=torch.bfloat16)
    network = cifar_resnet18().eval().requires_grad_(False).to(device)
    x = torch.rand(batch, *CONFIG.shape, device=device)
    g = torch.randn_like(x)
    z = flow.encode(x)
    runs: dict[str, Callable[[], Tensor]] = {
        "normflows": lambda: normflows_gradient(model, CONFIG, z, g),
        "decode+vjp, float32": lambda: frozen_gradient(flow, z, g),
        "decode+vjp, bf16 nets": lambda: frozen_gradient(low, z, g),
        "decode+vjp, low memory": lambda: frozen_gradient(flow.to(memory="low"), z, g),
        "encode+vjp, float32": lambda: linearised_gradient(flow, x, g),
        "encode+vjp, bf16 nets": lambda: linearised_gradient(low, x, g),
        "resnet18": lambda: classifier_gradient(network, x),
    }
    kept = {"normflows": normflows_memory(model, CONFIG, z)}
    kept["float32"] = flow.decode_with_tape(z)[1].nbytes()
    kept["bf16 nets"] = low.decode_with_tape(z)[1].nbytes()
    kept["low memory"] = x.nbytes
    return runs, kept


def measure(batch: int, rounds: int) -> dict[str, Any]:
    """All ratios of one setting."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs, kept = contenders(batch, device)
    timed: dict[str, Callable[[], object]] = dict(runs)
    if device == "cuda":
        timed |= {f"{k}, CUDA graph": graphed(run) for k, run in runs.items() if k != "normflows"}
    seconds = interleave(timed, rounds)
    result: dict[str, Any] = {"ms": {k: median_ms(v) for k, v in seconds.items()}}
    ratios = {}
    for name, times in seconds.items():
        bases = ("normflows", "resnet18", "resnet18, CUDA graph")
        for base in (b for b in bases if b in seconds and name not in bases):
            ratios[f"{name} / {base}"] = ratio(times, seconds[base])
    result["ratios"] = ratios
    result["kept_mib"] = {k: round(v / 2**20, 2) for k, v in kept.items()}
    result["memory_ratios"] = {
        f"memory, {k} / normflows": round(v / kept["normflows"], 3)
        for k, v in kept.items()
        if k != "normflows"
    }
    return result


def settings(threads: list[int]) -> dict[str, Callable[[], object]]:
    """How to get into every setting, in order: an allocator that keeps memory cannot go back."""
    if torch.cuda.is_available():
        return {"gpu": lambda: None}
    names = {n: "1 thread" if n == 1 else f"{n} threads" for n in threads}
    usual = {f"{names[n]}": partial(torch.set_num_threads, n) for n in threads}
    kept = {f"{names[n]}, memory kept": partial(_keep, n) for n in threads}
    return {**usual, **kept}


def _keep(threads: int) -> None:
    keep_memory()
    torch.set_num_threads(threads)


def report(result: dict[str, Any]) -> None:
    """Print every ratio with its target."""
    flat = {k: (v["median"], f"[{v['q1']:.2f}-{v['q3']:.2f}]") for k, v in result["ratios"].items()}
    flat |= {k: (v, "") for k, v in result["memory_ratios"].items()}
    for name, (value, spread) in flat.items():
        print(f"  {name:<42} {value:5.3f} {spread:<14} {verdict(value, TARGETS.get(name))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    results = {}
    for name, prepare in settings(options.threads).items():
        prepare()
        results[name] = measure(options.batch, options.rounds)
        print(f"{name}, batch {options.batch}, ms: {results[name]['ms']}")
        report(results[name])
    if not options.no_record:
        payload = {"config": CONFIG.to_dict(), "batch": options.batch, "rounds": options.rounds}
        payload |= {"seed": 0, "targets": TARGETS, "results": results}
        print(record(f"speed-flow-{where()}", payload))


if __name__ == "__main__":
    main()
