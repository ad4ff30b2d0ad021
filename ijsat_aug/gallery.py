"""A picture of what the attacks do to images: along the manifold, off it, both, and on blends."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .attack.model import Model, ModelHandle
from .flows.files import write_atomically
from .flows.manifold import Manifold
from .transforms.functional import robust_mixup
from .transforms.joint_space import JointSpaceAdv
from .transforms.scale import Scale

__all__ = ["Column", "draw", "gallery"]

_LAM = 0.6
_WIDTH, _LETTERS = 26, 12  # of a line below a picture, and of a name in it


@dataclass(frozen=True, eq=False)
class Column:
    """One kind of image: pictures to draw, and what the model says of the images behind them.

    Attributes:
        title: Of the column.
        pictures: ``(B, C, H, W)`` in [0, 1].
        truth: ``(B, classes)`` probabilities of the labels.
        predictions: ``(B,)`` classes.
        losses: ``(B,)`` cross-entropies.
    """

    title: str
    pictures: Tensor
    truth: Tensor
    predictions: Tensor
    losses: Tensor

    @property
    def fooled(self) -> Tensor:
        """``(B,)``, where the prediction is none of the labels."""
        return self.truth.gather(1, self.predictions[:, None])[:, 0] == 0


def gallery(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    flow: Manifold | None = None,
    *,
    eps: float = 8 / 255,
    eta: float | None = None,
    steps: int = 5,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
) -> list[Column]:
    """Clean images, their latent, pixel and joint moves, and attacked blends with the neighbour.

    Args:
        model: Classifier, in the mode in which it predicts.
        images: ``(B, C, H, W)`` in [0, 1], whatever the model's normalisation.
        labels: Classes ``(B,)``; by default the model's own predictions.
        flow: Without one there are pixel moves alone.
        eps: Radius of the pixel move.
        eta: Radius of the latent move; by default what the flow's calibration recommends.
        steps: Of every attack.
        mean: Of the normalisation that the model expects.
        std: Of the normalisation that the model expects.

    Example:
        >>> import ijsat_aug
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> columns = gallery(model, torch.rand(3, 1, 8, 8), flow=ijsat_aug.load_flow("digits"))
        >>> [column.title for column in columns]
        ['clean', 'latent move', 'pixel move ×10', 'joint', 'attacked blend']
    """
    handle, scale = ModelHandle(model), Scale.of(mean, std)
    batch = scale.to_model(images)
    logits = _logits(handle, batch)
    labels = logits.argmax(1) if labels is None else labels.long()
    classes = logits.shape[1]
    truth = F.one_hot(labels, classes).float()
    attack = partial(
        JointSpaceAdv, model, steps=steps, random_start=False, mean=mean, std=std,
    )  # fmt: skip
    pixel = attack(eps=eps, eta=0)
    latent = None if flow is None else attack(flow, eps=0, eta=eta)
    joint = pixel if flow is None else attack(flow, eps=eps, eta=eta)
    found: list[tuple[str, Tensor, Tensor]] = [("clean", batch, truth)]
    if latent is not None:
        found.append(("latent move", latent(batch, labels)[0], truth))
    found.append(("pixel move ×10", pixel(batch, labels)[0], truth))
    if latent is not None:
        found.append(("joint", joint(batch, labels)[0], truth))
    blends = robust_mixup(
        batch, labels, lam=_LAM, num_classes=classes, attack=joint, mean=mean, std=std
    )
    found.append(("attacked blend", *blends))
    columns = [_column(handle, scale, *item) for item in found]
    return [_enlarged(c, images) if c.title == "pixel move ×10" else c for c in columns]


def draw(
    columns: Sequence[Column],
    path: Path,
    classes: Sequence[str] | None = None,
    *,
    ink: bool = False,
    truth: str = "label",
) -> None:
    """Draw columns side by side into a PNG file, which is whole or absent.

    Args:
        columns: As :func:`gallery` makes them.
        path: Of the file.
        classes: Their names.
        ink: Grey images tell how dark paper is, not how bright a picture.
        truth: What stands before the arrow.

    Example:
        >>> import tempfile
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> columns = gallery(net, torch.rand(3, 1, 8, 8))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     draw(columns, Path(place, "a.png"))
        ...     Path(place, "a.png").stat().st_size > 0
        True
    """
    check_png(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install "ijsat-aug[demo]".') from error
    rows = len(columns[0].pictures)
    figure = Figure(figsize=(1.7 * len(columns), 1.75 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for j, column in enumerate(columns):
        axes[0][j].set_title(column.title, fontsize=10)
        for i, (axis, picture) in enumerate(zip(axes[:, j], column.pictures, strict=True)):
            values = picture.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy()
            grey = values.shape[2] == 1
            axis.imshow(
                values[:, :, 0] if grey else values,
                cmap="gray_r" if ink else "gray",
                vmin=0,
                vmax=1,
            )
            axis.set(xticks=[], yticks=[])
            color = "red" if column.fooled[i] else "black"
            axis.set_xlabel(
                _caption(column, i, classes), fontsize=8, labelpad=2, color=color, parse_math=False
            )
    figure.suptitle(f"{truth} → what the model sees (its loss); red: fooled", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write_atomically(path, file.getvalue())


def _caption(column: Column, i: int, classes: Sequence[str] | None) -> str:
    shares, labels = column.truth[i].topk(min(2, column.truth.shape[1]))
    names = [_name(int(k), classes) for k, share in zip(labels, shares, strict=True) if share > 0]
    seen = _name(int(column.predictions[i]), classes)
    names, seen = [_short(name) for name in names], _short(seen)
    line = f"{' + '.join(names)} → {seen} ({abs(float(column.losses[i])):.2f})"
    return line if len(line) <= _WIDTH else line.replace(" → ", "\n→ ")


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"


def check_png(path: Path) -> None:
    """Refuse another ending than that of what is written.

    Example:
        >>> check_png(Path("a.jpg"))
        Traceback (most recent call last):
        ...
        ValueError: a.jpg would be a PNG file: call it a.png.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} would be a PNG file: call it {path.with_suffix('.png').name}.")


def _column(handle: ModelHandle, scale: Scale, title: str, batch: Tensor, target: Tensor) -> Column:
    logits = _logits(handle, batch)
    predictions = logits.argmax(1)
    losses = F.cross_entropy(logits, target, reduction="none")
    return Column(title, scale.to_pixels(batch), target, predictions, losses)


def _enlarged(column: Column, images: Tensor) -> Column:
    """The move alone, ten times as large, around grey."""
    return replace(column, pictures=(0.5 + 10 * (column.pictures - images)).clamp(0, 1))


@torch.no_grad()
def _logits(handle: ModelHandle, batch: Tensor) -> Tensor:
    with handle.frozen(batch.device, None):
        return handle(batch).float()


def _name(index: int, classes: Sequence[str] | None) -> str:
    return classes[index] if classes is not None and index < len(classes) else str(index)
