"""The gallery of a user's own images, model and flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .attack.model import ModelHandle
from .flows.checkpoint import load_flow
from .flows.data import ImageData, is_folder, load_images, tell_order
from .flows.files import check_target
from .flows.probe import probe_network, several
from .gallery import check_png, draw, gallery
from .models import first_logits, load_model
from .transforms.checks import check_channels
from .transforms.joint_space import JointSpaceAdv
from .transforms.scale import Scale

__all__ = ["run"]


def run(
    source: str,
    out: Path,
    *,
    model: str | None = None,
    weights: str | None = None,
    flow: str | None = None,
    rows: int = 6,
    size: int | None = None,
    eps: float = 8 / 255,
    eta: float | None = None,
    steps: int = 5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> None:
    """Draw the gallery; the arguments are those of ``ijsat-aug show``.

    Labels are those of the images when the model has as many classes, and otherwise the model's own
    predictions.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     run("digits", Path(place, "a.png"), flow="digits", rows=2)
        ...     Path(place, "a.png").stat().st_size > 0
        True
    """
    check_target(out)
    check_png(out)
    if eta is not None and flow is None:
        raise ValueError("eta is a move along a manifold: say which, with --flow.")
    manifold = None if flow is None else load_flow(flow)
    if size is None and manifold is not None and manifold.shape[1] == manifold.shape[2]:
        size = manifold.shape[1]
    some = partial(_some, rows=rows, seed=seed)
    few = some if model is not None and is_folder(source) else None  # a network learns from all
    data = load_images(source, size=size, pick=few)
    if manifold is not None:
        check_channels(manifold, data.images)
    latent = 0 if manifold is None else eta
    JointSpaceAdv(None, manifold, eps=eps, eta=latent, steps=steps)  # refuses, before a training
    if model is None:
        if weights is not None:
            raise ValueError("weights belong to a model: say which, with --model.")
        if mean is not None or std is not None:
            raise ValueError("mean and std belong to a model: say which, with --model.")
        data = replace(data, labels=several(data.labels))
        network = probe_network(data.pixels, data.labels)
    else:
        network = load_model(model, weights)
        tell_order(data.classes or ())
    known = _classes(data)
    data = data if few is not None else data.take(some(len(data.images)))
    x = data.pixels
    told = _outputs(network, Scale.of(mean, std).to_model(x[:1]))
    labels = data.labels if known == told else None
    columns = gallery(
        network, x, labels, manifold, eps=eps, eta=eta, steps=steps, mean=mean, std=std
    )
    if labels is None:
        draw(columns, out, truth="its prediction")
    else:
        draw(columns, out, data.classes)


def _some(count: int, rows: int, seed: int) -> Tensor:
    """The places of so many at random, in order."""
    chance = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(count, generator=chance, device="cpu")[:rows].sort().values


def _classes(data: ImageData) -> int | None:
    """How many there are, also where few images were read."""
    if data.labels is None:
        return None
    return int(data.labels.max()) + 1 if data.classes is None else len(data.classes)


@torch.no_grad()
def _outputs(network: nn.Module, batch: Tensor) -> int:
    """How many classes a model tells apart."""
    handle = ModelHandle(network)
    with handle.frozen(batch.device, None):
        return first_logits(handle, batch).shape[1]
