"""A transform as a CUDA graph, beside a training loop that stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..transforms.batch import BatchTransform
from ..transforms.joint_space import JointSpaceAdv
from ..transforms.robust_mixup import RobustMixup
from .captured import CapturedStep

__all__ = ["CapturedTransform"]


class CapturedTransform:
    """A transform whose work on a GPU becomes a CUDA graph, from its fifth batch on.

    The attack then no longer waits for the launch of its many small kernels, and does what the
    transform does. The model is trained meanwhile, in place. A graph keeps the settings of the
    transform and where the weights lie: after a change of these it is made anew. A last, smaller
    batch, and all on a CPU, go through the transform itself.

    The graph has memory of its own, and asks nothing of the host: neither may the model.

    Args:
        transform: One of ours, without ``tau``, ``model_mode="train"`` or an attack of your own.

    Example:
        >>> from ijsat_aug import RobustMixup
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> mix = CapturedTransform(RobustMixup(net, num_classes=10))
        >>> x, y = mix(torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1]))
        >>> x.shape, y.shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4, 10]))
    """

    def __init__(self, transform: BatchTransform) -> None:
        _check_captured(transform)
        self.transform = transform
        self._step = CapturedStep(self._work)
        self._known: Any = None

    def __call__(self, *batch: Any) -> Any:
        """The batch with other images, which the next call leaves alone."""
        transform = self.transform
        parts = transform.parts_of(batch)
        images = parts.images
        if not (isinstance(images, Tensor) and images.is_cuda and transform.training):
            return transform(*batch)
        if self._known != self._state():
            _check_captured(transform)
            result = transform(*batch)  # may move a flow
            self._known, self._step = self._state(), CapturedStep(self._work)
            return result
        plain = images.as_subclass(Tensor)
        params = transform.draw(plain, parts.labels)
        if params is None:
            return parts.rebuild(*transform.augment(images, parts.labels, None)[:2])
        found = self._step(plain, parts.labels, params)
        new, labels, same, transform.last = pytree.tree_map_only(Tensor, Tensor.clone, found)
        return parts.rebuild(new.as_subclass(type(images)), parts.labels if same else labels)

    def _work(self, images: Tensor, labels: Any, params: dict[str, Any]) -> tuple[Any, ...]:
        new, news, _ = self.transform.augment(images, labels, params)
        return new, news, news is labels, self.transform.last

    def _state(self) -> Any:
        """What a graph keeps for ever."""
        parts = _transforms(self.transform)
        modules = [module for part in parts for module in part.handle.modules]
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
        low = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        flows = [getattr(part, "_flow", None) for part in parts]
        places = [None if t is None else t.data_ptr() for t in tensors]
        return repr(self.transform), [part.training for part in parts], flows, low, places

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedTransform, (self.transform,)  # a copy makes a graph of its own


def _check_captured(transform: Any) -> None:
    """Refuse what draws or decides on the host."""
    if not isinstance(transform, BatchTransform):
        raise TypeError(f"only a transform of ours can be captured, got {transform!r}.")
    for part in _transforms(transform):
        if part.handle.mode == "train":
            raise ValueError(
                'model_mode="train" draws in the model, which a graph repeats: take "eval".'
            )
        if isinstance(part, JointSpaceAdv) and part.threat.tau is not None:
            raise ValueError("tau asks the host whether to go on, which a graph cannot: tau=None.")
        if isinstance(part, RobustMixup) and part.attack is not None and part.climb is None:
            raise ValueError(
                "an attack of your own may draw on the host, which a graph cannot: capture a whole "
                "step of yours by CapturedStep, or leave captured=True out."
            )


def _transforms(transform: BatchTransform) -> list[BatchTransform]:
    """The transform, and the attack in it."""
    return [part for part in transform.modules() if isinstance(part, BatchTransform)]
