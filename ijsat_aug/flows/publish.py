"""Turn trained weights into a finished checkpoint: measure, draw, write."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import calibrate, round_trip
from .checkpoint import save_flow
from .data import ImageData
from .fold import freeze
from .frozen import FrozenGlow
from .glow import GlowConfig, bits_per_dim, build_glow, dequantize
from .probe import as_they_are, probe_network, several

__all__ = ["evaluate", "publish", "save_pictures"]

_CALIBRATION_IMAGES = 256
_NETWORK_IMAGES = 10_000
_USUAL = 64 * 64  # pixels of images, beyond which fewer are measured at once
_COLUMNS = 16  # of pictures


def publish(
    state: Mapping[str, Tensor],
    config: GlowConfig,
    folder: Path,
    *,
    train: ImageData,
    held_out: ImageData,
    test: ImageData | None = None,
    name: str | None = None,
    license: str = "unspecified",
    training: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """Measure a trained flow, draw its samples, and write its checkpoint folder and card.

    The small network of the calibration learns from ``train``, and radii are measured on
    ``held_out``: they are a setting of trainings, which must not have seen ``test``. That tells
    the bits/dim, and gives the pictures of reconstructions.

    Example:
        >>> import tempfile
        >>> from ijsat_aug.flows.checkpoint import load_flow, load_state
        >>> from ijsat_aug.flows.data import load_images
        >>> config, state = load_state("digits")
        >>> train, held_out = load_images("digits").split(0.05)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = publish(state, config, Path(place, "d"), train=train, held_out=held_out)
        ...     sorted(load_flow(folder).info["metrics"])
        ['bits_per_dim', 'images', 'round_trip']
    """
    save = partial(
        save_flow, folder, config, state, name=name, data=train.name, license=license,
        training=training,
    )  # fmt: skip
    save()  # whatever happens below, the weights are there
    with torch.random.fork_rng(devices=[]):
        model = build_glow(config)
    model.load_state_dict(dict(state))
    model.to(device)
    flow = freeze(config, state, device=device)
    shown = held_out.spaced(_as_memory_allows(_CALIBRATION_IMAGES, config))
    images = shown.pixels.to(device)
    bits = {"held_out": evaluate(model, config, held_out)}
    if test is not None:
        bits["test"] = evaluate(model, config, test)
    metrics = {
        "bits_per_dim": {split: round(value, 4) for split, value in bits.items()},
        "images": {"train": len(train.images), "held_out": len(held_out.images)}
        | ({"test": len(test.images)} if test is not None else {}),
        "round_trip": {k: float(f"{v:.3g}") for k, v in round_trip(flow, images).items()},
    }
    count = _as_memory_allows(_NETWORK_IMAGES, config)
    seen = train.first(count)
    labels, asked = _numbered(seen.labels, shown.labels)
    if labels is None or asked is None:
        asked = as_they_are(shown.images)
    network = probe_network(seen.pixels.to(device), labels)
    save_pictures(flow, test or held_out, folder)
    table = calibrate(flow, images, asked, network=network)
    return save(metrics=metrics, calibration=table)


def _as_memory_allows(count: int, config: GlowConfig) -> int:
    """So many images, and fewer that are larger than 64 pixels."""
    _, height, width = config.shape
    return max(16, count * min(height * width, _USUAL) // (height * width))


def _numbered(train: Tensor | None, shown: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Labels as classes without gaps; None where they teach nothing, or not what is asked."""
    train = several(train)
    if train is None or shown is None:
        return None, None
    _, classes = torch.cat((train, shown)).unique(return_inverse=True)
    learnt, asked = classes[: len(train)], classes[len(train) :]
    return (learnt, asked) if int(asked.max()) <= int(learnt.max()) else (None, None)


@torch.no_grad()
def evaluate(model: nn.Module, config: GlowConfig, data: ImageData, seed: int = 0) -> float:
    """Mean bits per dimension of a normflows Glow on images, dequantised with a fixed seed."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    total, batch_size = 0.0, _as_memory_allows(256, config)
    for start in range(0, len(data.images), batch_size):
        part = data.take(slice(start, start + batch_size))
        u = dequantize(part.images.to(device), config.bins, generator)
        labels = None if part.labels is None else part.labels.to(device)
        total += float(bits_per_dim(model(u, labels), config).sum())
    return total / len(data.images)


def save_pictures(flow: FrozenGlow, data: ImageData, folder: Path) -> None:
    """Write ``samples.png`` and ``walk.png``, and real images above decoded ones.

    Each row of ``walk.png`` goes from one sample to another, through latents of the same spread;
    the pairs of ``reconstructions.png`` are the data's own images, which the others do not show.
    """
    from torchvision.utils import save_image

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(flow.device).manual_seed(0)
    rows = [flow.sample(_COLUMNS, t, generator) for t in (0.5, 0.7, 0.85, 1.0)]
    real = data.spaced(_COLUMNS).pixels.to(flow.device)
    pairs = torch.cat((real, flow.decode(flow.encode(real)).clamp(0, 1)))
    pictures = {
        "samples": (torch.cat(rows), _COLUMNS),
        "reconstructions": (pairs, len(real)),
        "walk": (walk(flow, 4, generator), _COLUMNS),
    }
    scale = max(1, 64 // flow.shape[1])
    for name, (images, columns) in pictures.items():
        images = images[:, : 3 if images.shape[1] >= 3 else 1]  # of many channels the first ones
        images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        save_image(images.cpu(), folder / f"{name}.png", nrow=columns, pad_value=1.0)


def walk(flow: FrozenGlow, rows: int, generator: torch.Generator) -> Tensor:
    """Images on the way from a sample at temperature 0.7 to another, row after row."""
    ends = [flow.encode(flow.sample(rows, 0.7, generator)) for _ in range(2)]
    angle = torch.linspace(0, torch.pi / 2, _COLUMNS, device=flow.device)[:, None]
    on_the_way = ((angle.cos() * a + angle.sin() * b) for a, b in zip(*ends, strict=True))
    return flow.decode(torch.cat(list(on_the_way))).clamp(0, 1)
