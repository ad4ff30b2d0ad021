"""What a latent ball means in pixels: how far eta moves the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..words import is_between
from .manifold import Manifold
from .probe import as_they_are, probe_network, several

__all__ = ["calibrate", "matching_eta", "recommended_eta", "round_trip"]

Norm = Literal["linf", "l2"]
ETAS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RECOMMENDED_RMS = 8 / 255
_WORST_STEPS = 5
_NOTHING = 1e-6  # of a pixel's range


def recommended_eta(flow: Any, norm: Norm) -> float:
    """The latent radius that the flow's calibration recommends, and transforms take by default.

    A gradient step so far changes the pixels by 8/255 in the root mean square. Of a flow without a
    calibration there is none: a ``ValueError``.

    Example:
        >>> import ijsat_aug
        >>> round(recommended_eta(ijsat_aug.load_flow("digits"), "linf"), 3)
        0.046
    """
    recommended = getattr(flow, "info", {}).get("calibration", {}).get("recommended", {})
    if recommended.get(norm) == 0:
        raise ValueError(
            "the flow was not finite at the smallest radius of its calibration, which recommends "
            "none: calibrate it on images like those that it was trained on, or give eta=."
        )
    if norm not in recommended:
        raise ValueError(
            "this flow has no calibrated radius: give eta=, such as "
            f"ijsat_aug.flows.calibrate(flow, images)['recommended']['{norm}']."
        )
    return float(recommended[norm])


def calibrate(
    flow: Manifold,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    network: nn.Module | None = None,
    etas: Sequence[float] = ETAS,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure how far latent balls of several radii move images.

    Each radius is measured in three directions: ``random`` (a random corner, or a random point of
    the sphere), ``gradient`` (one step along the loss gradient of a small network) and ``worst``
    (ascent of the displacement itself). An L2 radius is ``eta * sqrt(D)``, so that both norms
    move a latent value by ``eta`` on average.

    Args:
        flow: Any manifold; a conditional one with the context of these images.
        images: Real images in [0, 1], some hundreds.
        labels: Their classes; by default those that ``network`` sees in them.
        network: The classifier that gives the gradient; by default a small one is trained on
            ``images`` with :func:`probe_network`, without labels, or with one alone, to tell
            mirrored images apart.
        etas: Radii per latent value.
        seed: Of the directions and of the network.

    Example:
        >>> import ijsat_aug
        >>> flow = ijsat_aug.load_flow("digits")
        >>> table = calibrate(flow, torch.rand(8, 1, 8, 8), etas=(0.01, 0.02))
        >>> [row["eta"] for row in table["linf"]]
        [0.01, 0.02]
        >>> sorted(table["linf"][0]["random"])
        ['non_finite', 'out_of_range', 'pixel_linf', 'pixel_rms']
    """
    if labels is not None and (labels.shape != images.shape[:1] or bool((labels < 0).any())):
        raise ValueError(
            f"labels are classes from 0, one an image, got {tuple(labels.shape)} for "
            f"{len(images)} images: leave them out where there are none."
        )
    if len(etas) == 0 or min(etas) <= 0:
        raise ValueError(f"etas must be radii > 0, got {tuple(etas)}.")
    with torch.inference_mode(False):
        images = _at_home(flow, images).clone()
        if network is None:
            labels = several(labels)
            network = probe_network(images, labels, seed)
            labels = as_they_are(images) if labels is None else labels
        modes = {module: module.training for module in network.modules()}
        try:
            return _table(flow, images, labels, network.eval(), sorted(etas), seed)
        finally:
            for module, training in modes.items():
                module.training = training


def _table(
    flow: Manifold,
    images: Tensor,
    labels: Tensor | None,
    network: nn.Module,
    etas: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    z = flow.encode(images)
    with torch.no_grad():
        still = flow.decode(z)  # not the image, where the manifold is not exact
    targets = None if labels is None else labels.to(images.device)
    directions = {
        "random": _random_direction(seed),
        "gradient": _gradient_direction(flow, network, images, targets),
        "worst": _worst_direction(flow, seed),
    }
    table: dict[str, Any] = {"images": len(images), "seed": seed}
    for norm in ("linf", "l2"):
        unit = 1.0 if norm == "linf" else math.sqrt(flow.latent_dim)
        table[norm] = [
            {
                "eta": eta * unit,
                **{name: _measure(flow, images, still, z, find, norm, eta * unit)
                   for name, find in directions.items()},
            }
            for eta in etas
        ]  # fmt: skip
    table["recommended"] = {
        norm: matching_eta(table, RECOMMENDED_RMS, norm) for norm in ("linf", "l2")
    }
    return table


def matching_eta(calibration: Mapping[str, Any], pixel_rms: float, norm: str = "linf") -> float:
    """The radius whose gradient step moves pixels by ``pixel_rms`` (an L-inf ``eps``, say).

    Interpolates the table linearly, from the origin and never beyond its largest stable radius.

    Example:
        >>> table = {"linf": [{"eta": 0.1, "gradient": {"pixel_rms": 0.2, "non_finite": 0.0}}]}
        >>> matching_eta(table, 0.1)
        0.05
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f'norm must be "linf" or "l2", got {norm!r}.')
    if norm not in calibration:
        raise ValueError("the flow has no calibration table; run calibrate(), or give eta.")
    if not is_between(pixel_rms, 0):
        raise ValueError(f"pixel_rms must be a number >= 0, got {pixel_rms!r}.")
    below_eta, below_rms = 0.0, 0.0
    for row in calibration[norm]:
        rms = row["gradient"]["pixel_rms"]
        if row["gradient"]["non_finite"] > 0 or rms is None:
            break
        if rms >= pixel_rms:
            share = (pixel_rms - below_rms) / max(rms - below_rms, 1e-12)
            return float(below_eta + share * (row["eta"] - below_eta))
        below_eta, below_rms = row["eta"], rms
    if below_eta and not below_rms > _NOTHING:
        raise ValueError(
            "the gradient of the network moves nothing on this manifold, so that no radius can be "
            "told: calibrate with another network."
        )
    return float(below_eta)


def round_trip(flow: Manifold, images: Tensor) -> dict[str, float]:
    """Largest |decode(encode(x)) - x| on real, mixed, black, white and noise images.

    Example:
        >>> import ijsat_aug
        >>> errors = round_trip(ijsat_aug.load_flow("digits"), torch.rand(4, 1, 8, 8))
        >>> max(errors.values()) < 1e-5
        True
    """
    images = _at_home(flow, images)
    generator = torch.Generator(images.device).manual_seed(0)
    noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    kinds = {
        "real": images,
        "mixed": (images + images.roll(1, 0)) / 2,
        "black": torch.zeros_like(images),
        "white": torch.ones_like(images),
        "noise": noise,
    }
    return {k: float((flow.decode(flow.encode(x)) - x).abs().max()) for k, x in kinds.items()}


Find = Callable[[Tensor, Tensor, str, float], Tensor]


def _random_direction(seed: int) -> Find:
    def find(x: Tensor, z: Tensor, norm: str, radius: float) -> Tensor:
        generator = torch.Generator(z.device).manual_seed(seed)
        noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        return _to_sphere(noise, norm, radius)

    return find


def _gradient_direction(
    flow: Manifold, network: nn.Module, images: Tensor, labels: Tensor | None
) -> Find:
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        logits = network(leaf)
        y = logits.argmax(1) if labels is None else labels.to(images.device)
        loss = F.cross_entropy(logits, y, reduction="sum")
        (g,) = torch.autograd.grad(loss, leaf)
    ascent = _pulled(flow, flow.encode(images), lambda _: g)  # for every radius and norm

    def find(x: Tensor, z: Tensor, norm: str, radius: float) -> Tensor:
        return _to_sphere(ascent, norm, radius)

    return find


def _worst_direction(flow: Manifold, seed: int) -> Find:
    start = _random_direction(seed)

    def find(x: Tensor, z: Tensor, norm: str, radius: float) -> Tensor:
        step = start(x, z, norm, radius)
        for _ in range(_WORST_STEPS):
            g = _pulled(flow, z + step, lambda moved: (moved - x).nan_to_num(0.0, 0.0, 0.0))
            g = g.nan_to_num(0.0, 0.0, 0.0)
            step = _to_sphere(g + 1e-20 * step, norm, radius)
        return step

    return find


def _pulled(flow: Manifold, z: Tensor, push: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient at ``z`` of a push on the image that ``z`` decodes to."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        image = flow.decode(leaf)
        (g,) = torch.autograd.grad(image, leaf, push(image.detach()))
    return g


def _to_sphere(direction: Tensor, norm: str, radius: float) -> Tensor:
    if norm == "linf":
        return radius * direction.sign()
    return radius * F.normalize(direction, dim=1, eps=torch.finfo(direction.dtype).tiny)


@torch.no_grad()
def _measure(
    flow: Manifold, images: Tensor, still: Tensor, z: Tensor, find: Find, norm: str, radius: float
) -> dict[str, float | None]:
    move = flow.decode(z + find(still, z, norm, radius)) - still
    finite = move.isfinite().flatten(1).all(1)
    moved = images + move
    away = move[finite].flatten(1)
    half_level = 0.5 / (getattr(getattr(flow, "config", None), "bins", 256) - 1)
    outside = ((moved < -half_level) | (moved > 1 + half_level))[finite]
    if not bool(finite.any()):
        return {"pixel_linf": None, "pixel_rms": None, "out_of_range": None, "non_finite": 1.0}
    return {
        "pixel_linf": _rounded(away.abs().amax(1).median()),
        "pixel_rms": _rounded(away.square().mean(1).sqrt().median()),
        "out_of_range": _rounded(outside.float().mean()),
        "non_finite": _rounded(1 - finite.float().mean()),
    }


def _at_home(flow: Any, images: Tensor) -> Tensor:
    """The images where the flow is, and in its precision, if it says so."""
    if not images.is_floating_point():
        raise TypeError(f"the images are {images.dtype}, floats in [0, 1] are needed: / 255.")
    if len(images) == 0:
        raise ValueError("there is no image to measure on; give some hundreds.")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"the images go from {low:.3g} to {high:.3g}, a flow takes them in [0, 1]: give them "
            "before they are normalised."
        )
    device = getattr(flow, "device", images.device)
    return images.to(device, getattr(flow, "dtype", images.dtype))


def _rounded(value: Tensor) -> float:
    return float(f"{float(value):.4g}")
