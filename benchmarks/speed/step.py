"""What an augmentation costs: a whole training step with it, as a multiple of a plain step.

Run:  python benchmarks/speed/step.py                (fifteen minutes on two cores)
      python benchmarks/speed/step.py --large        (ten minutes)
      python benchmarks/speed/step.py --bf16 --channels-last   (a GPU: less than a minute)
      python benchmarks/speed/step.py --bf16 --channels-last --captured   (the same)

One process, contenders interleaved, medians over rounds with quartiles: a CIFAR ResNet-18 at 32
pixels with batch 128, SGD with momentum; forward, backward and optimiser step in float32, and what
the augmentation does before. "p=0.5" is the mean of a step with and a step without the attack. Of a
batch that is shown twice ("replay"), the time is that of the second step, attack and all. The
peak memory of a step, weights and optimiser aside, is taken in a fresh process for each: resident
memory on a CPU (Linux). On a GPU CUDA tells it, in the same process, and each round times some
steps in a row; there "captured" is an ordinary step after an attack that is a CUDA graph
(``AugmentedLoader(captured=True)``), and its memory is that of the step and of the graph, which
keeps its own for as long as it is there.

``--large`` is a ResNet-50 at 224 pixels with batch 8, on a GPU 64, whose low band a flow of 32
pixels moves. With ``--bf16`` the training step runs in autocast, as GPUs are used; an attack
without "bf16" in its name stays in float32, on a GPU with TF32 convolutions, torch's default.
``--captured`` makes a CUDA graph of every whole step, the plain one too: of those that can be one,
which leaves out batches that are shown twice, and MixUp by torchvision, which draws on the host.
Their memory is that of the graphs, and not measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import (
    interleave,
    keep_memory,
    median_ms,
    ratio,
    record,
    resident,
    spread,
    start_peak,
    verdict,
    where,
)
from benchmarks.networks import cifar_resnet18
from ijsat_aug import JointSpaceAdv, RobustMixup, load_flow
from ijsat_aug.training import CapturedStep, CapturedTransform, convert_split_batchnorm
from ijsat_aug.transforms.batch import BatchTransform
from ijsat_aug.transforms.replay import replay

TARGETS = {
    "RobustMixup": 1.4, "RobustMixup, bf16": 1.4, "RobustMixup, replay": 1.4,
    "JointSpaceAdv, replay": 1.35, "JointSpaceAdv, replay, bf16": 1.35,
    "JointSpaceAdv, replay, bf16, fast flow": 1.35, "IJSAT, bf16": 1.6,
    "IJSAT, bf16, fast flow": 1.6, "IJSAT, replay, bf16": 1.6,
    "IJSAT, replay, bf16, fast flow": 1.6,
}  # fmt: skip
LARGE_TARGETS = {
    "IJSAT, bf16": 1.5, "IJSAT, bf16, fast flow": 1.5, "IJSAT, replay, bf16": 1.5,
}  # fmt: skip
MEMORY_TARGET = 1.2
REPEATED = ("RobustMixup, bf16", "JointSpaceAdv, bf16", "IJSAT, bf16", "IJSAT, bf16, fast flow")
Augment = Callable[[Tensor, Tensor], Any]
Step = Callable[[], object]


def training_step(
    network: nn.Module, x: Tensor, y: Tensor, augment: Augment | None, bf16: bool = False
) -> Step:
    """One step of an ordinary loop."""
    return loop(network, lambda: [(x, y) if augment is None else augment(x, y)], bf16)


def replayed_steps(
    network: nn.Module, x: Tensor, y: Tensor, transform: BatchTransform, bf16: bool = False
) -> Step:
    """Two steps of an ordinary loop on the same batch, first calm, then moved."""
    return loop(network, lambda: replay(transform, (x, y), 2), bf16)


def loop(
    network: nn.Module, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], bf16: bool
) -> Step:
    """An ordinary loop over some batches."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)

    def steps() -> None:
        for images, labels in batches():
            low = torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)
            learn(network, optimizer, images, labels, low)

    return steps


def learn(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor,
    low: torch.autocast,
) -> None:  # fmt: skip
    """One step of the optimiser."""
    with low:
        loss = F.cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def captured_step(
    network: nn.Module, x: Tensor, y: Tensor, transform: Augment | None, bf16: bool = False
) -> Step:
    """One step as a CUDA graph: what is random comes in."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)
    ours = transform if isinstance(transform, BatchTransform) else None

    @CapturedStep
    def step(images: Tensor, labels: Tensor, params: Any) -> None:
        if ours is not None:
            images, labels, _ = ours.augment(images, labels, params)
        # A graph must not meet cached casts.
        low = torch.autocast(images.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
        learn(network, optimizer, images, labels, low)

    return lambda: step(x, y, None if ours is None else ours.draw(x, y))


def both(one: Step, two: Step) -> Step:
    """Two steps, one after the other."""

    def run() -> None:
        one()
        two()

    return run


@dataclass(frozen=True)
class Setting:
    """What is trained, on which batches, and what is measured of it."""

    name: str
    make: Callable[[], nn.Module]
    pixels: int
    batch: int
    rows: tuple[str, ...] | None
    targets: dict[str, float]
    bf16: bool = False
    channels_last: bool = False
    captured: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def network(self, device: torch.device) -> nn.Module:
        """In train mode."""
        network = self.make().train().to(device)
        return network.to(memory_format=self.memory_format)

    def batches(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        torch.manual_seed(0)
        x = torch.rand(self.batch, 3, self.pixels, self.pixels, device=device)
        x = x.contiguous(memory_format=self.memory_format)
        return x, torch.randint(10, (self.batch,), device=device)


SMALL = Setting("cifar_resnet18", cifar_resnet18, 32, 128, None, TARGETS)
LARGE_ROWS = (
    "plain", "mixup", "RobustMixup", "RobustMixup, bf16", "IJSAT",
    "IJSAT, bf16", "IJSAT, bf16, fast flow", "IJSAT, replay, bf16",
)  # fmt: skip
LARGE = Setting("resnet50", partial(resnet50, num_classes=10), 224, 8, LARGE_ROWS, LARGE_TARGETS)
LARGE_BATCH_ON_GPU = 64


def steps(
    setting: Setting, device: torch.device
) -> tuple[dict[str, Step], dict[str, CapturedTransform]]:
    """The step with every augmentation, and those augmentations that are CUDA graphs."""
    x, y = setting.batches(device)
    network = setting.network(x.device)
    split = convert_split_batchnorm(setting.network(x.device))
    flow = load_flow("cifar10", device=x.device)
    low = load_flow("cifar10", device=x.device, compute_dtype=torch.bfloat16)
    fast = load_flow("cifar10-fast", device=x.device, compute_dtype=torch.bfloat16)
    bf16: dict[str, Any] = {"amp_dtype": torch.bfloat16}

    def mixup(
        attack: JointSpaceAdv | None = None, model: nn.Module = network, **options: Any
    ) -> Any:
        return RobustMixup(model, num_classes=10, attack=attack, **options)

    augmentations: dict[str, Augment | None] = {
        "plain": None,
        "torchvision's MixUp": v2.MixUp(num_classes=10),
        "mixup": mixup(eps=0),
        "RobustMixup": mixup(),
        "RobustMixup, bf16": mixup(**bf16),
        "JointSpaceAdv": JointSpaceAdv(network, flow),
        "JointSpaceAdv, bf16": JointSpaceAdv(network, low, **bf16),
        "JointSpaceAdv, exact": JointSpaceAdv(network, flow, method="exact"),
        "IJSAT": mixup(JointSpaceAdv(network, flow)),
        "IJSAT, bf16": mixup(JointSpaceAdv(network, low, **bf16)),
        "IJSAT, bf16, fast flow": mixup(JointSpaceAdv(network, fast, **bf16)),
        "IJSAT, exact": mixup(JointSpaceAdv(network, flow, method="exact")),
        "IJSAT, 3 steps": mixup(JointSpaceAdv(network, flow, steps=3)),
    }
    low_step = setting.bf16
    one_step = captured_step if setting.captured else training_step
    if setting.captured:
        del augmentations["torchvision's MixUp"]
    graphs = {}
    if device.type == "cuda" and not setting.captured:
        for name in REPEATED:
            graphs[f"{name}, captured"] = CapturedTransform(augmentations[name])  # type: ignore[arg-type]
    augmentations |= graphs
    runs = {name: one_step(network, x, y, a, low_step) for name, a in augmentations.items()}
    appended = mixup(JointSpaceAdv(split, flow), split, mode="append")
    runs["IJSAT, appended, split BatchNorm"] = one_step(split, x, y, appended, low_step)
    replays = {
        "RobustMixup, replay": mixup(),
        "JointSpaceAdv, replay": JointSpaceAdv(None, flow),
        "JointSpaceAdv, replay, bf16": JointSpaceAdv(None, low),
        "JointSpaceAdv, replay, bf16, fast flow": JointSpaceAdv(None, fast),
        "IJSAT, replay, bf16": mixup(JointSpaceAdv(None, low)),
        "IJSAT, replay, bf16, fast flow": mixup(JointSpaceAdv(None, fast)),
    }
    for name, transform in replays.items() if not setting.captured else ():
        runs[name] = replayed_steps(network, x, y, transform, low_step)
    half = mixup(), mixup(p=0)
    runs["RobustMixup, p=0.5"] = both(*(one_step(network, x, y, a, low_step) for a in half))
    return {name: run for name, run in runs.items() if name in (setting.rows or runs)}, graphs


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes at the fullest moment of a step, on top of what was there before."""
    for _ in range(2):
        step()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    before = start_peak()
    step()
    return resident("VmHWM") - before


def graph_memory(transform: CapturedTransform, batch: tuple[Tensor, Tensor]) -> int:
    """Bytes that the graph of a transform keeps."""
    fresh = CapturedTransform(transform.transform)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(6):
        fresh(*batch)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() - before


def peak_memory_apart(name: str, setting: Setting) -> int:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--batch", str(setting.batch)]
    command += ["--large"] if setting.name == LARGE.name else []
    command += ["--bf16"] if setting.bf16 else []
    command += ["--channels-last"] if setting.channels_last else []
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(setting: Setting, rounds: int, device: torch.device) -> dict[str, Any]:
    """Times and memory of every step, as multiples of the plain one."""
    keep_memory()
    runs, graphs = steps(setting, device)
    on_gpu = device.type == "cuda"
    # A step becomes a graph at its fourth call.
    seconds = interleave(runs, rounds, *((5, 3) if on_gpu else (1, 1)))
    for name in seconds:
        if "p=0.5" in name:
            seconds[name] = [s / 2 for s in seconds[name]]
        if "replay" in name:
            pairs = zip(seconds[name], seconds["plain"], strict=True)
            seconds[name] = [pair - plain for pair, plain in pairs]
    bytes_ = {
        name: peak_memory(run, device) if on_gpu else peak_memory_apart(name, setting)
        for name, run in runs.items()
        if not setting.captured
    }
    for name, transform in graphs.items():
        if name in runs:
            bytes_[name] += graph_memory(transform, setting.batches(device))
    return {
        "ms": {name: median_ms(times) for name, times in seconds.items()},
        "ratios": {name: ratio(times, seconds["plain"]) for name, times in seconds.items()},
        "peak_megabytes": {name: round(value / 1e6) for name, value in bytes_.items()},
        "memory_ratios": {n: round(value / bytes_["plain"], 3) for n, value in bytes_.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--large", action="store_true", help="a ResNet-50 at 224 pixels")
    parser.add_argument("--batch", type=int, help="by default 128, large 8, or 64 on a GPU")
    parser.add_argument("--bf16", action="store_true", help="the training step in autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--captured", action="store_true", help="every step a CUDA graph")
    parser.add_argument("--rounds", type=int, help="by default 7, on a GPU 15")
    parser.add_argument("--memory-of", help="print the peak memory of one step, in bytes")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = LARGE if options.large else SMALL
    on_gpu = device.type == "cuda"
    usual = LARGE_BATCH_ON_GPU if options.large and on_gpu else setting.batch
    setting = replace(
        setting, batch=options.batch or usual, bf16=options.bf16,
        channels_last=options.channels_last, captured=options.captured,
    )  # fmt: skip
    rounds = options.rounds or (15 if on_gpu else 7)
    if options.memory_of is not None:
        setting = replace(setting, rows=(options.memory_of,))
        print(peak_memory(steps(setting, device)[0][options.memory_of], device))
        return
    result = measure(setting, rounds, device)
    for name, value in result["ratios"].items():
        judged = verdict(value["median"], setting.targets.get(name))
        known = result["memory_ratios"].get(name)
        memory = "" if known is None else f"memory {known:.2f} "
        print(f"  {name:<40} {spread(value):<18} {memory}{judged}")
    if not options.no_record:
        payload = {"network": setting.name, "flow": "cifar10", "batch": setting.batch}
        payload |= {"rounds": rounds, "seed": 0, "targets": setting.targets, **result}
        payload["memory_target"] = MEMORY_TARGET
        payload["threads"] = torch.get_num_threads()
        payload |= {"bf16": setting.bf16, "channels_last": setting.channels_last}
        kind = "-224" * options.large + "-bf16" * setting.bf16 + "-captured" * setting.captured
        print(record(f"speed-step{kind}-{where()}", payload))


if __name__ == "__main__":
    main()
