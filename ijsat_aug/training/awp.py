"""Adversarial weight perturbation: train at the worst weights of a small neighbourhood."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..attack.balls import unit
from ..attack.traces import buffers_kept, no_cached_weights
from ..words import is_between

__all__ = ["AdversarialWeightPerturbation"]


class AdversarialWeightPerturbation:
    """Moves every weight matrix uphill by ``gamma`` of its norm while the gradient is taken (AWP).

    The weights are put back bit for bit, so that the optimiser steps from where it was, along the
    gradient of the perturbed place (Wu et al., 2020). A step inside the block, as in the authors'
    loop, stays. BatchNorm's running statistics are those of the training pass alone. Under DDP each
    process perturbs by its own batch; the gradients are averaged as ever, but not with its
    ``static_graph=True``, which takes the first of the two backward passes for that of the step:
    it is refused where it is seen, so give the model with that wrapper.

    Args:
        model: The model that is trained.
        gamma: Size of the perturbation, relative to the norm of each weight.

    Example:
        >>> model, x = torch.nn.Linear(4, 2), torch.randn(8, 4)
        >>> awp = AdversarialWeightPerturbation(model, gamma=0.01)
        >>> before = model.weight.clone()
        >>> with awp(lambda: model(x).square().mean()) as loss:  # the loss at the worst weights
        ...     loss.backward()
        >>> bool((model.weight == before).all()), model.weight.grad is not None
        (True, True)
    """

    def __init__(self, model: nn.Module, gamma: float = 0.01) -> None:
        if not is_between(gamma, 0):
            raise ValueError(f"gamma must be a number >= 0, got {gamma!r}.")
        self.model = model
        self.gamma = gamma

    @contextmanager
    def __call__(self, loss: Callable[[], Tensor]) -> Iterator[Tensor]:
        """Yield ``loss()`` at the perturbed weights; call ``backward`` inside the block."""
        self._refuse_static_graph()
        self._refuse_cached_casts()
        weights = [p for p in self.model.parameters() if p.requires_grad and p.ndim > 1]
        if not weights:
            raise ValueError("the model has no trainable weight matrix to perturb.")
        with buffers_kept(list(self.model.modules())), no_cached_weights(), torch.enable_grad():
            gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
        found = zip(weights, gradients, strict=True)
        moves = [(w, w.detach().clone(), self._uphill(w, g)) for w, g in found if g is not None]
        there = False
        try:
            with torch.no_grad():
                for weight, _, perturbed in moves:
                    weight.copy_(perturbed)
            there = True
            with no_cached_weights():
                yield loss()
        finally:
            with torch.no_grad():
                for weight, original, perturbed in moves:
                    if not there and torch.equal(weight, original):
                        continue  # it never left, as the way there was interrupted
                    step = weight - perturbed
                    weight.copy_(torch.where(step == 0, original, original + step))

    @torch.no_grad()
    def _uphill(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The weight, moved along its gradient by ``gamma`` of its norm.

        It stays where there is no gradient, or none that is finite, as a GradScaler has them.
        """
        gradient = gradient.to_dense()  # that of an embedding may be sparse
        perturbed = weight + unit(gradient[None])[0] * (self.gamma * weight.norm())
        return torch.where(perturbed.isfinite().all(), perturbed, weight)

    def _refuse_static_graph(self) -> None:
        model = getattr(self.model, "_orig_mod", self.model)  # of torch.compile
        if isinstance(model, DistributedDataParallel) and model.static_graph:
            raise ValueError(
                "AWP takes two backward passes a step, of which DistributedDataParallel with "
                "static_graph=True would average the first alone: leave static_graph out."
            )

    def _refuse_cached_casts(self) -> None:
        devices = {p.device.type for p in self.model.parameters()}
        cached = torch.is_autocast_cache_enabled() and any(
            torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d) for d in devices
        )
        if cached:
            raise RuntimeError(
                "AWP inside autocast would train on stale casts of the weights: open autocast "
                "inside the loss function, not around the AWP block."
            )
