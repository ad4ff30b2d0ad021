"""What the ascent costs: PGD-10 against other libraries, the joint-space attack against its floor.

Run:  pip install torchattacks foolbox adversarial-robustness-toolbox adv-lib
      python benchmarks/speed/attack.py                (fifteen minutes on two cores)

One process, contenders interleaved, medians over rounds with quartiles, a CIFAR ResNet-18 with
batch 32, L-inf 8/255, step 2/255, 10 steps, random start. The minimal loop is what one would write
by hand: two bounds, a gradient for the image alone. The floor of the joint-space attack is 10 times
the passes that it cannot do without: decoder forward and backward to the latent, classifier forward
and backward to the image. Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import interleave, median_ms, ratio, record, spread, verdict, where
from benchmarks.networks import cifar_resnet18
from benchmarks.speed.flow import classifier_gradient, frozen_gradient
from ijsat_aug import FrozenGlow, JointSpaceAdv, load_flow

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10
TARGETS = {
    "ours / minimal loop": 1.03,
    "ours, bf16 / minimal loop": 0.48,
    "joint space / its floor": 1.05,
}
Run = Callable[[], object]


def minimal_loop(network: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype | None) -> Tensor:
    """L-inf PGD as one would write it by hand."""
    low, high = (x - EPS).clamp(min=0), (x + EPS).clamp(max=1)
    image = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        image.requires_grad_()
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(network(image), y, reduction="sum")
        (g,) = torch.autograd.grad(loss, image)
        with torch.no_grad():
            image = torch.clamp(torch.add(image, g.sign(), alpha=STEP), low, high)
    return image


def peers(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Run]:
    """The same attack by every library that is installed."""
    makers = {"torchattacks": _torchattacks, "foolbox": _foolbox, "ART": _art, "adv-lib": _adv_lib}
    runs = {}
    for name, make in makers.items():
        try:
            runs[name] = make(network, x, y)
        except ImportError as error:
            print(f"without {name}: {error}")
    return runs


def _torchattacks(network: nn.Module, x: Tensor, y: Tensor) -> Run:
    attack: Any = importlib.import_module("torchattacks").PGD(
        network, eps=EPS, alpha=STEP, steps=STEPS, random_start=True
    )
    return lambda: attack(x, y)


def _foolbox(network: nn.Module, x: Tensor, y: Tensor) -> Run:
    foolbox: Any = importlib.import_module("foolbox")
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=True)
    return lambda: attack(model, x, y, epsilons=EPS)


def _art(network: nn.Module, x: Tensor, y: Tensor) -> Run:
    classifiers: Any = importlib.import_module("art.estimators.classification")
    evasion: Any = importlib.import_module("art.attacks.evasion")
    classifier = classifiers.PyTorchClassifier(
        network, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1),
        device_type="gpu" if x.is_cuda else "cpu",
    )  # fmt: skip
    attack = evasion.ProjectedGradientDescentPyTorch(
        classifier, eps=EPS, eps_step=STEP, max_iter=STEPS, num_random_init=1, batch_size=len(x),
        verbose=False,
    )  # fmt: skip
    images, labels = x.cpu().numpy(), F.one_hot(y, 10).cpu().numpy()
    return lambda: attack.generate(images, labels)


def _adv_lib(network: nn.Module, x: Tensor, y: Tensor) -> Run:
    pgd: Any = importlib.import_module("adv_lib.attacks").pgd_linf
    return lambda: pgd(network, x, y, ε=EPS, steps=STEPS, random_init=True, absolute_step_size=STEP)


def ours(network: nn.Module, x: Tensor, y: Tensor, flow: Any = None, **options: Any) -> Run:
    """The same attack by this library."""
    settings = {"eps": EPS, "step_size": STEP, "steps": STEPS, **options}
    attack = JointSpaceAdv(network, flow, eta=None if flow is not None else 0, **settings)
    return lambda: attack(x, y)


def floor(network: nn.Module, flow: FrozenGlow, x: Tensor) -> Run:
    """The passes that ten steps of the joint-space attack cannot do without."""
    z = flow.encode(x)
    g = torch.randn_like(x)

    def run() -> None:
        for _ in range(STEPS):
            frozen_gradient(flow, z, g)
            classifier_gradient(network, x)

    return run


def pixel_runs(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Run]:
    """Contenders in pixel space."""
    low, last = {"amp_dtype": torch.bfloat16}, {"memory_format": torch.channels_last}
    return {
        "minimal loop": lambda: minimal_loop(network, x, y, None),
        "ours": ours(network, x, y),
        "ours, channels_last": ours(network, x, y, **last),
        "minimal loop, bf16": lambda: minimal_loop(network, x, y, torch.bfloat16),
        "ours, bf16": ours(network, x, y, **low),
        "ours, bf16, channels_last": ours(network, x, y, **low, **last),
        **peers(network, x, y),
    }


def joint_runs(network: nn.Module, flow: FrozenGlow, x: Tensor, y: Tensor) -> dict[str, Run]:
    """Contenders in the joint space."""
    return {
        "its floor": floor(network, flow, x),
        "joint space": ours(network, x, y, flow),
        "joint space, latent_steps=2": ours(network, x, y, flow, latent_steps=2),
        "joint space, linear": ours(network, x, y, flow, method="linear"),
    }


def measure(batch: int, rounds: int) -> dict[str, Any]:
    """All ratios of one setting."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = cifar_resnet18().eval().to(device)  # parameters require grad, as while training
    flow = load_flow("cifar10", device=device)
    x = torch.rand(batch, 3, 32, 32, device=device)
    y = torch.randint(10, (batch,), device=device)
    result: dict[str, Any] = {"ms": {}, "ratios": {}}
    for base, runs in (
        ("minimal loop", pixel_runs(network, x, y)),
        ("its floor", joint_runs(network, flow, x, y)),
    ):
        seconds = interleave(runs, rounds, warmup=2)
        result["ms"] |= {name: median_ms(times) for name, times in seconds.items()}
        result["ratios"] |= {
            f"{name} / {base}": ratio(times, seconds[base])
            for name, times in seconds.items()
            if name != base
        }
    return result


def report(result: dict[str, Any]) -> None:
    """Print every ratio with its target."""
    for name, value in result["ratios"].items():
        print(f"  {name:<45} {spread(value):<18} {verdict(value['median'], TARGETS.get(name))}")


def versions() -> dict[str, str]:
    """Of the libraries that were compared."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torchattacks", "foolbox", "adversarial-robustness-toolbox", "adv-lib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the other libraries
    results = {}
    for threads in [1] if torch.cuda.is_available() else options.threads:
        torch.set_num_threads(threads)
        name = "1 thread" if threads == 1 else f"{threads} threads"
        results[name] = measure(options.batch, options.rounds)
        print(f"{name}, batch {options.batch}, ms: {results[name]['ms']}")
        report(results[name])
    if not options.no_record:
        payload = {"network": "cifar_resnet18", "flow": "cifar10", "batch": options.batch}
        payload |= {"eps": EPS, "step_size": STEP, "steps": STEPS, "rounds": options.rounds}
        payload |= {"seed": 0, "peers": versions(), "targets": TARGETS, "results": results}
        print(record(f"speed-attack-{where()}", payload))


if __name__ == "__main__":
    main()
