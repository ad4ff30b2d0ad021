"""All images that a network's features hardly tell from the clean one (LPIPS)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from ...attack.ascent import Picture, Pixels, Variable
from ...attack.balls import Draw, L2Ball
from ...precision import full_precision
from .space import Space, check

__all__ = [
    "Distance",
    "PerceptualBall",
    "alexnet_distance",
    "feature_distance",
    "lpips",
    "perceptual",
]

Distance = Callable[[Tensor, Tensor], Tensor]
"""``(images, images) -> (B,)``, 0 for equal images."""

_LOOK = 0.1  # how far ahead the slope of the distance is measured, in L2 (PAT)
_NOISE = 0.01  # of the start
_EDGE = 0.9  # from this share of the budget on a step follows the edge
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of its pixels


@dataclass(frozen=True, eq=False)
class PerceptualBall:
    """All images in [0, 1] within ``radius`` of the centre by any distance between images.

    Attributes:
        centre: The clean images.
        radius: The budget.
        measure: ``(images, images) -> (B,)``, differentiable.
        halvings: Of the line to the clean image, each a call of ``measure``.

    Example:
        >>> rms = lambda a, b: (a - b).square().mean((1, 2, 3)).sqrt()
        >>> ball = PerceptualBall(torch.zeros(2, 3, 8, 8), 0.25, rms)
        >>> bool((ball.distance(ball.project(torch.rand(2, 3, 8, 8))) <= 0.25).all())
        True
    """

    centre: Tensor
    radius: float
    measure: Distance
    halvings: int = 10

    def step(self, value: Tensor, gradient: Tensor, size: float) -> Tensor:
        """Uphill as far as the distance to ``value`` seems to grow to ``size``, projected.

        Near the edge the way goes along it: the part of the gradient that leads out is taken away.
        """
        outward, distance = self._outward(value)
        leads_out = (gradient * outward).flatten(1).sum(1).clamp(min=0)
        at_edge = distance >= _EDGE * self.radius
        uphill = gradient - _each(leads_out * at_edge, value) * outward
        with torch.no_grad():
            ahead = L2Ball(value, _LOOK).step(value, uphill, _LOOK)
            slope = (self._measured(ahead, value) / _LOOK).clamp(min=1e-4)
            return self.project(value + (ahead - value) * _each(size / slope / _LOOK, value))

    def _outward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Where the distance grows fastest, of length 1, and the distance."""
        with torch.enable_grad():
            leaf = value.detach().requires_grad_()
            distance = self._measured(leaf, self.centre)
            (slope,) = torch.autograd.grad(distance.sum(), leaf)
        slope = slope.nan_to_num()  # at the centre a root has no slope
        return F.normalize(slope.flatten(1)).reshape(slope.shape), distance.detach()

    @torch.no_grad()
    def project(self, value: Tensor) -> Tensor:
        """The farthest point inside on the line to the clean image, found by bisection."""
        away = value.clamp(0, 1) - self.centre
        inside = torch.zeros_like(away[:, 0, 0, 0])
        outside = torch.ones_like(inside)
        share = outside
        for _ in range(1 + self.halvings):
            fits = self.distance(self._along(away, share)) <= self.radius
            inside, outside = torch.where(fits, share, inside), torch.where(fits, outside, share)
            share = (inside + outside) / 2
        return self._along(away, inside)

    def _along(self, away: Tensor, share: Tensor) -> Tensor:
        return (self.centre + _each(share, away) * away).clamp(0, 1)  # which may round beyond

    @torch.no_grad()
    def distance(self, value: Tensor) -> Tensor:
        """The distance from the clean image of each sample."""
        return self._measured(value, self.centre)

    def take(self, index: Tensor) -> PerceptualBall:
        """The balls of some samples."""
        return replace(self, centre=self.centre[index])

    def _measured(self, a: Tensor, b: Tensor) -> Tensor:
        with full_precision(a.device):
            return self.measure(a, b)


def perceptual(measure: Distance) -> Space:
    """The space of all images within ``budget`` by a distance of one's own.

    The set is that of the neural perceptual threat model (PAT, Laidlaw et al., 2021), the search is
    not: PAT's PPGD takes steps that solve for the features with conjugate gradients and projects by
    Newton's method, its Lagrangian attack penalises the distance with a growing weight. Here a step
    follows the gradient of the loss, ``budget / sqrt(steps)`` long by the distance and along the
    edge where it is reached, and is brought back on the line to the clean image: weaker than PAT's,
    but always inside. A step costs a backward and 26 forward passes of the network that measures.

    Example:
        >>> rms = lambda a, b: (a - b).square().mean((1, 2, 3)).sqrt()
        >>> space = perceptual(rms)
        >>> picture, variables = space(torch.rand(2, 3, 8, 8), 0.1, 16, torch.rand)
        >>> variables["pixel"].step_size
        0.025
    """

    def space(
        images: Tensor, budget: float, steps: int, uniform: Draw
    ) -> tuple[Picture, dict[str, Variable]]:
        check(images, budget, steps)
        ball = PerceptualBall(images, budget, measure)
        start = ball.project(images + _NOISE * (2 * uniform(tuple(images.shape)) - 1))
        size = budget / math.sqrt(steps)
        return Pixels(), {"pixel": Variable(start, ball, size, (True,) * steps)}

    return space


def feature_distance(layers: Callable[[Tensor], Sequence[Tensor]]) -> Distance:
    """How far apart the features of a network's layers are: LPIPS without learned weights, as PAT.

    The features at every place have length 1, and every layer counts alike. (The distance of the
    package lpips is squared, weighs features, and is another scale for budgets.)

    Args:
        layers: From images to feature maps ``(B, C, H, W)``.

    Example:
        >>> red, green = torch.eye(2).reshape(2, 1, 2, 1, 1)
        >>> feature_distance(lambda x: [x])(red, green)
        tensor([1.4142])
    """

    def features(images: Tensor) -> Tensor:
        maps = [
            F.normalize(layer, dim=1) / math.sqrt(layer[0, 0].numel()) for layer in layers(images)
        ]
        return torch.cat([layer.flatten(1) for layer in maps], 1)

    return lambda a, b: (features(a) - features(b)).norm(dim=1)


def alexnet_distance(
    weights: Mapping[str, Tensor] | None = None, device: torch.device | str = "cpu"
) -> Distance:
    """The :func:`feature_distance` of torchvision's AlexNet, after each of its five convolutions.

    Args:
        weights: A state dict; by default that of ImageNet, which torchvision downloads once.
        device: Where the images are.

    Example:
        >>> from torchvision.models import alexnet
        >>> distance = alexnet_distance(alexnet().state_dict())
        >>> x = torch.rand(2, 3, 32, 32)
        >>> distance(x, x)
        tensor([0., 0.])
    """
    with torch.device("meta"):
        network = models.alexnet()
    network.load_state_dict(_downloaded() if weights is None else weights, assign=True)
    parts = network.features.to(device).requires_grad_(False)[:-1]
    mean, std = (torch.tensor(v, device=device).reshape(3, 1, 1) for v in _IMAGENET)

    def layers(images: Tensor) -> list[Tensor]:
        if images.shape[1] not in (1, 3) or min(images.shape[2:]) < 31:
            raise ValueError(
                "AlexNet needs grey or RGB images of at least 31 x 31 pixels, got "
                f"{tuple(images.shape[1:])}: pass a distance of your own to perceptual()."
            )
        x, found = (images - mean) / std, []
        for part in parts:
            x = part(x)
            if isinstance(part, nn.ReLU):
                found.append(x)
        return found

    return feature_distance(layers)


def lpips(
    images: Tensor, budget: float, steps: int, uniform: Draw
) -> tuple[Picture, dict[str, Variable]]:
    """All images within ``budget`` by AlexNet's features; PAT's bound is 0.5.

    Differences: those of :func:`perceptual`; PAT's AlexNet for CIFAR-10 was trained on it.

    Example:
        >>> from ijsat_aug.evaluation.spaces import SPACES
        >>> SPACES["lpips"].space is lpips, SPACES["lpips"].budget
        (True, 0.5)
    """
    return perceptual(_alexnet_distance(images.device))(images, budget, steps, uniform)


@lru_cache(maxsize=4)
def _alexnet_distance(device: torch.device) -> Distance:
    return alexnet_distance(device=device)


def _downloaded() -> Mapping[str, Tensor]:
    weights = models.AlexNet_Weights.IMAGENET1K_V1
    try:
        found: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:  # URLError is one
        raise FileNotFoundError(
            f"AlexNet's weights are not here and could not be fetched: put {weights.url} into "
            f"{torch.hub.get_dir()}/checkpoints, or pass a distance of your own to perceptual()."
        ) from error
    return found


def _each(factors: Tensor, like: Tensor) -> Tensor:
    return factors.reshape(-1, *(1,) * (like.ndim - 1))
