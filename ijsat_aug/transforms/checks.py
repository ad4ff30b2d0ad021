"""Bad input, told before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..flows.checkpoint import load_flow
from ..flows.manifold import Manifold, as_manifold, is_of_each_sample
from ..flows.registry import image_sizes

__all__ = [
    "check_blendable",
    "check_channels",
    "check_flow",
    "check_images",
    "check_manifold",
    "check_one_weight",
    "check_place",
    "check_space",
    "check_start",
    "check_weights",
    "find_flow",
]


def check_images(images: Any) -> None:
    """A batch of floating images."""
    if not isinstance(images, Tensor):
        raise TypeError(
            f"a batch of images must be a tensor (B, C, H, W), got {type(images).__name__}; apply "
            "the transform after the samples were collated."
        )
    if not images.is_floating_point():
        if images.ndim < 3:
            raise TypeError(
                f"the images are {images.dtype} of shape {tuple(images.shape)}: they come first, "
                "then the labels."
            )
        raise TypeError(
            f"the images are {images.dtype}, floats in [0, 1] are needed: divide 8-bit images by "
            "255, or use v2.ToDtype(torch.float32, scale=True)."
        )
    if images.ndim != 4:
        raise ValueError(
            f"the images have shape {tuple(images.shape)}, a batch (B, C, H, W) is needed: apply "
            "the transform after the samples were collated."
        )


def check_blendable(beside: Sequence[str]) -> None:
    """No masks, boxes or keypoints beside images that are blended."""
    if beside:
        raise ValueError(
            f"RobustMixup blends images, and blends of {', '.join(beside)} have no meaning: leave "
            "them out of the batch, or use JointSpaceAdv, which keeps them."
        )


def find_flow(flow: Manifold | str | PathLike[str] | None) -> Manifold | None:
    """A flow, also by what :func:`ijsat_aug.load_flow` takes."""
    if isinstance(flow, (str, PathLike)):
        return load_flow(Path(flow) if isinstance(flow, PathLike) else flow)
    return flow


def check_manifold(flow: Any) -> Manifold:
    """A flow."""
    if flow is None:
        raise ValueError("a latent move needs a flow: pass one, or eta=0 for pixels alone.")
    return as_manifold(flow)


def check_channels(flow: Manifold | None, images: Tensor) -> Manifold:
    """A flow of images with as many channels."""
    flow = check_manifold(flow)
    wanted, given = flow.shape[0], images.shape[1]
    if wanted != given:
        fix = {
            (1, 3): "make them grey with v2.Grayscale()",
            (3, 1): "name a flow of grey images, or repeat the channel: x.expand(-1, 3, -1, -1)",
        }.get((wanted, given), "convert the images")
        raise ValueError(
            f"the flow takes images of {wanted} channels, the batch has {given} (known flows: "
            f"{_known()}): {fix}, or train a flow on such images with `ijsat-aug train-flow`."
        )
    return flow


def check_flow(flow: Manifold | None, images: Tensor) -> None:
    """A flow that takes these images."""
    flow = check_channels(flow, images)
    if tuple(images.shape[1:]) != tuple(flow.shape):
        size = tuple(images.shape[2:])
        raise ValueError(
            f"the flow takes images of {_size(flow.shape)}, the batch has {_size(images.shape[1:])}"
            f" (known flows: {_known()}): use ijsat_aug.flows.Pyramid(flow, {size}), or train a "
            "flow at that size with `ijsat-aug train-flow`."
        )


def check_start(name: str, start: Tensor | None, shape: Sequence[int]) -> None:
    """A start of the right shape."""
    if start is not None and tuple(start.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(start.shape)}.")


def check_weights(lam: Tensor | float, images: Tensor, *, values: bool) -> Tensor:
    """Mixing weights ``(M, B)`` of one, ``(B,)`` or ``(M, B)``; ``values`` costs a host sync."""
    count = len(images)
    weights = torch.as_tensor(lam, device=images.device)
    if weights.ndim > 2 or (weights.ndim and weights.shape[-1] != count):
        raise ValueError(
            f"lam must be one weight, ({count},) or (draws, {count}); got {tuple(weights.shape)}."
        )
    if weights.ndim == 2 and len(weights) == 0:
        raise ValueError("lam has no draw to choose from.")
    if values and weights.numel() and not bool(((weights >= 0) & (weights <= 1)).all()):
        raise ValueError("lam is the weight of the own image, from 0 to 1.")
    return weights.expand(count)[None] if weights.ndim < 2 else weights


def check_one_weight(draws: int, lam_steps: int) -> None:
    """One weight for the whole batch only where nothing chooses among them."""
    if draws > 1 or lam_steps > 0:
        raise ValueError(
            "per_sample=False is one weight for the batch; draws and lam_steps choose one for "
            "each sample."
        )


def check_space(space: str, flow: object) -> None:
    """A flow where images are mixed along it, and there alone."""
    if space != "pixel" and flow is None:
        raise ValueError(f"space={space!r} needs a flow.")
    if space == "pixel" and flow is not None:
        raise ValueError(
            'the flow would do nothing in space="pixel": for moves along it (IJSAT) give '
            'attack=JointSpaceAdv(model, flow), for blends along it space="latent".'
        )
    if is_of_each_sample(flow):
        raise ValueError(
            "a flow that is another one for every class or context has no latents between two "
            f'images: space={space!r} needs one without them, or space="pixel".'
        )


def check_place() -> None:
    """Not in a worker of a DataLoader, whose copy of the model never learns."""
    if get_worker_info() is not None:
        raise ValueError(
            "this transform runs in a DataLoader worker, where the model is a stale copy: wrap the "
            "loader in AugmentedLoader(loader, transform, device), or apply it in the training "
            "loop."
        )


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _known() -> str:
    return ", ".join(f"{name} {size}" for name, size in image_sizes().items())
