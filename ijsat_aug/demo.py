"""The demo: what a latent move is, on real digits that scikit-learn ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .flows.checkpoint import load_flow
from .flows.data import load_images
from .flows.frozen import FrozenGlow
from .flows.probe import probe_network

__all__ = ["run"]

_SHOWN = 10
_EPS = 1.6 / 16


def run(out: Path, source: str = "digits") -> Path:
    """Walk and climb the manifold of the digits; prints what it does and draws a picture.

    Example:
        >>> import contextlib, io, tempfile
        >>> with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        ...     print_to_nowhere = run(Path(place)).name
        >>> print_to_nowhere
        'manifold.png'
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    flow = load_flow(source)
    if flow.shape != (1, 8, 8) or not flow.info["calibration"]:
        raise ValueError(f"the demo needs a calibrated flow of 8x8 digits, and {source!r} is none.")
    train, test = load_images("digits"), load_images("digits", train=False)
    assert train.labels is not None
    assert test.labels is not None
    console.print(f"{flow!r}, bits/dim: {flow.info['metrics']['bits_per_dim']}")
    network = probe_network(_pixels(train.images), train.labels)
    x, y = _pixels(test.images), test.labels
    etas = (0.0, *(flow.info["calibration"]["recommended"]["linf"] * k for k in (0.5, 1.0, 2.0)))
    moved = {eta: _latent_move(flow, network, x, y, eta) for eta in etas}
    table = Table(title=f"A small CNN on {len(x)} digits that it has not seen")
    for column in ("latent move η", "median pixel RMS", "accuracy", "loss"):
        table.add_column(column, justify="right")
    for eta, images in moved.items():
        logits = network(images)
        rms = (images - x).flatten(1).square().mean(1).sqrt().median()
        accuracy = (logits.argmax(1) == y).float().mean()
        table.add_row(
            f"{eta:.3f}", f"{rms:.3f}", f"{accuracy:.1%}", f"{F.cross_entropy(logits, y):.3f}"
        )
    console.print(table)
    console.print(
        "One vector-Jacobian product at the exact latent of each image gave the direction; η = 0 "
        "is the image itself. The moved images stay digits: look at the picture."
    )
    path = out / "manifold.png"
    _draw(flow, network, x, y, path)
    console.print(f"Picture: [bold]{path}[/]")
    return path


def _pixels(levels: Tensor) -> Tensor:
    return levels.float() / 16


def _loss_gradient(network: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(network(leaf), y, reduction="sum"), leaf)[0]


@torch.no_grad()
def _latent_move(flow: FrozenGlow, network: Any, x: Tensor, y: Tensor, eta: float) -> Tensor:
    """One signed step up the loss in latent space; the round-trip error cancels at eta = 0."""
    z, tape = flow.encode_with_tape(x)
    step = eta * flow.vjp(tape, _loss_gradient(network, x, y)).sign()
    return (x + flow.decode(z + step) - flow.decode(z)).clamp(0, 1)


@torch.no_grad()
def _draw(flow: FrozenGlow, network: Any, x: Tensor, y: Tensor, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install "ijsat-aug[demo]".') from error
    first = [int((y == digit).nonzero()[0]) for digit in range(_SHOWN)]
    x, y = x[first], y[first]
    z = flow.encode(x)
    eta = flow.info["calibration"]["recommended"]["linf"]
    pixel = (x + _EPS * _loss_gradient(network, x, y).sign()).clamp(0, 1)
    rows = {
        "real": x,
        "decode(encode)": flow.decode(z),
        f"latent η={eta:.2f}": _latent_move(flow, network, x, y, eta),
        f"latent η={4 * eta:.2f}": _latent_move(flow, network, x, y, 4 * eta),
        f"pixel ε={_EPS:.2f}": pixel,
        "walk to next, 1/3": flow.decode(z.lerp(z.roll(-1, 0), 1 / 3)),
        "walk to next, 2/3": flow.decode(z.lerp(z.roll(-1, 0), 2 / 3)),
        "sample": flow.sample(_SHOWN, 0.7, torch.Generator().manual_seed(0)),
    }
    figure = Figure(figsize=(0.8 * _SHOWN + 2, 0.85 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), _SHOWN)
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        guesses = network(images).argmax(1)
        for axis, image, guess, label in zip(row, images, guesses, y, strict=True):
            axis.imshow(image[0].clamp(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            wrong = title.startswith(("latent", "pixel")) and guess != label
            axis.set_title(str(int(guess)), fontsize=8, pad=2, color="red" if wrong else "black")
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.suptitle("above each image: what a small CNN sees (red: fooled)", fontsize=9)
    figure.savefig(path, dpi=110)
