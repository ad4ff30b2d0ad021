"""The gallery of a user's own images, model and flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .attack.model import ModelHandle
from .flows.checkpoint import load_flow
from .flows.data import ImageData, load_images
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
    data = load_images(source, size=size)
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
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    index = order[:rows].sort().values
    x = data.take(index).pixels
    labels = _labels(data, network, Scale.of(mean, std).to_model(x[:1]))
    labels = None if labels is None else labels[index]
    columns = gallery(
        network, x, labels, manifold, eps=eps, eta=eta, steps=steps, mean=mean, std=std
    )
    if labels is None:
        draw(columns, out, truth="its prediction")
    else:
        draw(columns, out, data.classes)


@torch.no_grad()
def _labels(data: ImageData, network: nn.Module, batch: Tensor) -> Tensor | None:
    """The images' own labels, if the model has as many classes."""
    handle = ModelHandle(network)
    with handle.frozen(batch.device, None):
        classes = first_logits(handle, batch).shape[1]
    same = data.labels is not None and int(data.labels.max()) + 1 == classes
    return data.labels if same else None
