"""The demo: what each augmentation does to a small network that learns real digits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .flows.checkpoint import load_flow
from .flows.data import ImageData, load_images
from .flows.files import check_target, write_atomically
from .flows.frozen import FrozenGlow
from .gallery import draw, gallery
from .training.loader import AugmentedLoader
from .transforms.batch import BatchTransform
from .transforms.joint_space import JointSpaceAdv
from .transforms.robust_mixup import RobustMixup

__all__ = ["network", "run"]

_EPS = 1.6 / 16  # the digits have 17 levels of grey
_NOISE = 0.25
_SHOWN = 5


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small networks gain little from more threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run(out: Path, source: str = "digits", epochs: int = 12, seed: int = 0) -> Path:
    """Train four networks, compare them in a table, and draw what the attacks do to the first.

    Example:
        >>> run(Path("demo_out"), source="cifar10-fast")
        Traceback (most recent call last):
        ...
        ValueError: the demo needs a calibrated flow of 8x8 digits, and 'cifar10-fast' is none.
    """
    from rich.console import Console

    console = Console()
    check_target(out / "gallery.png")
    flow = load_flow(source)
    if flow.shape != (1, 8, 8) or not flow.info["calibration"]:
        raise ValueError(f"the demo needs a calibrated flow of 8x8 digits, and {source!r} is none.")
    train, test = _tensors(load_images("digits")), _tensors(load_images("digits", train=False))
    console.print(
        f"{len(train.tensors[0])} real digits of 8x8 pixels to learn from, "
        f"{len(test.tensors[0])} to test on; {flow!r}"
    )
    networks = _train_all(_augmentations(flow), train, epochs, seed, console)
    console.print(_table(networks, flow, test.tensors[0], test.tensors[1]))
    console.print(
        "Accuracy on digits that the networks have not seen. PGD, latent and joint attack: 20 "
        f"steps, ε = {_EPS:.2f} of the pixel range, η = {_eta(flow):.3f}; they bound the robust "
        f"accuracy from above, AutoAttack may find more. Noise: Gaussian, σ = {_NOISE}."
    )
    for name, trained in networks.items():
        _save(trained, out / f"{name}.safetensors")
    path = out / "gallery.png"
    shown = [int((test.tensors[1] == digit).nonzero()[0]) for digit in range(_SHOWN)]
    x, y = (t[shown] for t in test.tensors)
    draw(gallery(networks["plain"], x, y, flow, eps=_EPS, eta=_eta(flow)), path, ink=True)
    console.print(f"What the attacks do to the plain network: [bold]{path}[/]")
    console.print(
        f"The networks: {out}/*.safetensors. To evaluate one: [bold]ijsat-aug evaluate digits "
        f"--model ijsat_aug.demo:network --weights {out / 'IJSAT.safetensors'} --flow {source} "
        "--threats quick --html report.html[/]",
        soft_wrap=True,
    )
    return path


def _augmentations(flow: FrozenGlow) -> dict[str, Callable[[nn.Module], BatchTransform] | None]:
    def robust(network: nn.Module, **attack: Any) -> BatchTransform:
        return RobustMixup(network, num_classes=10, mode="append", **attack)

    def joint(network: nn.Module) -> BatchTransform:
        return JointSpaceAdv(network, flow, eps=_EPS, eta=_eta(flow), steps=3)

    return {
        "plain": None,
        "mixup": lambda network: RobustMixup(num_classes=10, eps=0),
        "RobustMixup": lambda network: robust(network, eps=_EPS, steps=3),
        "IJSAT": lambda network: robust(network, attack=joint(network)),
    }


def _train_all(
    augmentations: dict[str, Callable[[nn.Module], BatchTransform] | None],
    train: TensorDataset, epochs: int, seed: int, console: Any,
) -> dict[str, nn.Module]:  # fmt: skip
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<12}"), BarColumn(),
        TextColumn("{task.fields[rate]} images/s"), TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    networks = {}
    with Progress(*columns, console=console) as progress:
        tasks = {
            n: progress.add_task(n, total=epochs, start=False, rate="–") for n in augmentations
        }
        for name, make in augmentations.items():
            progress.start_task(tasks[name])

            def advance(rate: float, task: Any = tasks[name]) -> None:
                progress.update(task, advance=1, rate=f"{rate:.0f}")

            torch.manual_seed(seed)
            networks[name] = network()
            augment = None if make is None else make(networks[name])
            _train(networks[name], train, augment, epochs, advance)
    return networks


def _train(
    network: nn.Module, train: TensorDataset, augment: BatchTransform | None, epochs: int,
    advance: Callable[[float], None],
) -> None:  # fmt: skip
    loader: Any = DataLoader(train, batch_size=100, shuffle=True)
    if augment is not None:
        loader = AugmentedLoader(loader, augment)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, epochs * len(loader))
    for _ in range(epochs):
        begin = time.perf_counter()
        for x, y in loader:
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        advance(len(train) / (time.perf_counter() - begin))
    network.eval()


def network() -> nn.Module:
    """The small network of the demo, untrained.

    Example:
        >>> network()(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


def _save(network: nn.Module, path: Path) -> None:
    from safetensors.torch import save

    write_atomically(path, save(network.state_dict()))


def _table(networks: dict[str, nn.Module], flow: FrozenGlow, x: Tensor, y: Tensor) -> Any:
    from rich.table import Table

    table = Table()
    for column in ("trained with", "standard", "PGD", "latent", "joint", "noise"):
        table.add_column(column, justify="left" if column == "trained with" else "right")
    noise = _NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for name, network in networks.items():
        attack = partial(JointSpaceAdv, network, steps=20, best=True, generator=0)
        attacks = (
            attack(eps=_EPS, eta=0),
            attack(flow, eps=0, eta=_eta(flow)),
            attack(flow, eps=_EPS, eta=_eta(flow)),
        )
        seen = (x, *(a(x, y)[0] for a in attacks), (x + noise).clamp(0, 1))
        table.add_row(name, *(f"{_accuracy(network, images, y):.1%}" for images in seen))
    return table


@torch.no_grad()
def _accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((network(x).argmax(1) == y).float().mean())


def _tensors(data: ImageData) -> TensorDataset:
    assert data.labels is not None
    return TensorDataset(data.pixels, data.labels)


def _eta(flow: FrozenGlow) -> float:
    """Twice what moves a picture by 8/255: these digits have few and large pixels."""
    return 2 * float(flow.info["calibration"]["recommended"]["linf"])
