"""A transform as a CUDA graph, beside a training loop that stays as it is."""

from __future__ import annotations

import warnings
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..transforms.batch import BatchTransform, transforms_in
from ..transforms.joint_space import JointSpaceAdv
from ..transforms.robust_mixup import RobustMixup
from .captured import CapturedStep

__all__ = ["CapturedTransform"]

_PATIENCE = 50  # batches, after which it is told that nothing was captured
_OF_THE_MOMENT = {"last", "_seen", "_buffers", "_parameters", "_modules"}
_OWN = ("transform", "_tried", "_known", "_step")


class CapturedTransform:
    """A transform whose work on a GPU becomes a CUDA graph, from its fifth batch on.

    The attack then no longer waits for the launch of its many small kernels, and does what the
    transform does. The model is trained meanwhile, in place. A graph keeps the settings of the
    transform, where the weights lie, and the attributes of the model's modules: after a change of
    these it is made anew, some batches later, so that what changes with every batch is never
    captured. What else is Python in a model or in an objective of your own stays as it was:
    :meth:`reset` makes the graph anew. Batches of another shape than most, and all on a CPU, go
    through the transform itself.

    The graph has memory of its own, and asks nothing of the host: neither may the model. All
    attributes are those of the transform.

    Args:
        transform: A ``JointSpaceAdv`` without ``tau`` or a ``RobustMixup`` around one, not of
            ``model_mode="train"``; the model is a module that is not sharded.

    Example:
        >>> from ijsat_aug import RobustMixup
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> mix = CapturedTransform(RobustMixup(net, num_classes=10))
        >>> x, y = mix(torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1]))
        >>> x.shape, y.shape, mix.num_classes
        (torch.Size([4, 1, 8, 8]), torch.Size([4, 10]), 10)
    """

    def __init__(self, transform: BatchTransform) -> None:
        _check_captured(transform)
        self.transform = transform
        self._tried = 0
        self.reset()

    def reset(self) -> None:
        """Make the graph anew, some batches later.

        Example:
            >>> CapturedTransform(RobustMixup(num_classes=10, eps=0)).reset()
        """
        self._known: Any = None
        self._step = CapturedStep(partial(_work, self.transform))

    def __call__(self, *batch: Any) -> Any:
        """The batch with other images, which the next call leaves alone."""
        transform = self.transform
        parts = transform.parts_of(batch)
        images = parts.images
        if not (isinstance(images, Tensor) and images.is_cuda and transform.training):
            return transform(*batch)
        if _differ(self._known, _state(transform)):
            self._tell_of_none()
            _check_captured(transform)
            self.reset()
            result = transform(*batch)  # may move a flow
            self._known = _state(transform)
            return result
        plain, labels = images.detach().as_subclass(Tensor), parts.labels
        params = transform.draw(plain, transform.as_labels(plain, labels))
        if params is None:
            return parts.rebuild(*transform.augment(images, parts.labels, None)[:2])
        self._tell_of_none()
        found = self._step(plain, labels, params)
        new, labels, same, lasts = pytree.tree_map_only(Tensor, Tensor.clone, found)
        for part, last in zip(transforms_in(transform), lasts, strict=True):
            part.last = last
        return parts.rebuild(new.as_subclass(type(images)), parts.labels if same else labels)

    def _tell_of_none(self) -> None:
        """A word, once, where batch after batch nothing is captured."""
        self._tried = -1 if self._step.captured or self._tried < 0 else self._tried + 1
        if self._tried == _PATIENCE:
            warnings.warn(
                f"captured=True has captured nothing in {_PATIENCE} batches: the settings, the "
                "places of the weights or the shapes of the batches change too often.",
                stacklevel=3,
            )

    def __getattr__(self, name: str) -> Any:
        if name == "transform" or name.startswith("__"):  # not there yet while it is unpickled
            raise AttributeError(name)
        found = getattr(self.transform, name)
        return partial(self._instead, found) if isinstance(found, MethodType) else found

    def _instead(self, method: MethodType, *args: Any, **kwargs: Any) -> Any:
        """What a method of the transform returns; where that is the transform, this one."""
        result = method(*args, **kwargs)
        return self if result is self.transform else result

    def __setattr__(self, name: str, value: Any) -> None:
        owner = super() if name in _OWN else self.transform
        owner.__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedTransform, (self.transform,)  # a copy makes a graph of its own


def _work(transform: BatchTransform, images: Tensor, labels: Any, params: Any) -> tuple[Any, ...]:
    """What is captured: the batch, whether its labels are as they were, and what there is to tell.

    A function, as a graph that held its owner would outlive it.
    """
    new, news, _ = transform.augment(images, labels, params)
    return new, news, news is labels, [part.last for part in transforms_in(transform)]


def _state(transform: BatchTransform) -> list[Any]:
    """What a graph keeps for ever."""
    parts = transforms_in(transform)
    each = {id(part.model): part for part in parts}  # they share a model as a rule
    modules = [module for part in each.values() for module in part.handle.modules]
    flows = [getattr(part, "_flow", (None,))[0] for part in parts]
    modules += [m for flow in flows if isinstance(flow, nn.Module) for m in flow.modules()]
    held = [t for m in modules for kind in (m._parameters, m._buffers) for t in kind.values()]
    places = [None if t is None else (t.data_ptr(), t.shape, t.dtype) for t in held]
    settings = [{n: v for n, v in vars(p).items() if n not in _OF_THE_MOMENT} for p in parts]
    low = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return [low, settings, modules, [dict(vars(module)) for module in modules], places]


def _differ(one: Any, other: Any) -> bool:
    try:
        return bool(one != other)
    except (RuntimeError, TypeError, ValueError):  # of tensors and arrays, which are others
        return True


def _check_captured(transform: Any) -> None:
    """Refuse what draws or decides on the host, and what moves unseen."""
    for part in transforms_in(transform) if isinstance(transform, BatchTransform) else [transform]:
        if type(part) not in (JointSpaceAdv, RobustMixup):
            raise TypeError(
                f"only JointSpaceAdv and RobustMixup can be captured, not {type(part).__name__}: "
                "leave captured=True out, or capture a whole step of yours by CapturedStep."
            )
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
        _check_model(part)


def _check_model(part: BatchTransform) -> None:
    if not (part.model is None or isinstance(part.model, nn.Module)):
        raise ValueError(
            "a graph cannot see where the weights of a model lie that is no module: make an "
            "nn.Module of it, or leave captured=True out."
        )
    part.handle.check_alone("leave captured=True out")
    weights = [p for module in part.handle.modules for p in module._parameters.values()]
    if any(p is not None and p.is_cuda and p.numel() and not p.data_ptr() for p in weights):
        raise ValueError(
            "the weights of the model are of a kind whose memory a graph cannot follow: leave "
            "captured=True out."
        )
