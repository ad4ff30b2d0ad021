"""What a pass through a model leaves in it, put back."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "RESTLESS",
    "attributes_kept",
    "buffers_kept",
    "gradients_kept",
    "no_cached_weights",
    "version_of",
]

Restless = MutableMapping[nn.Module, set[str]]
RESTLESS: Restless = WeakKeyDictionary()  # the buffers that a module changes in eval mode too
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_FEW = 256  # things in a container, beyond which it is not copied


@contextmanager
def gradients_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The parameters of modules without their gradients, which they have again afterwards.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> with gradients_kept([net]):
        ...     net.zero_grad()
        >>> net.weight.grad
        tensor([[1., 1.]])
    """
    own = (p for module in modules for p in module._parameters.values() if p is not None)
    kept = [(p, p.grad) for p in own if p.is_leaf and p.grad is not None]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def buffers_kept(modules: Iterable[nn.Module], restless: Restless | None = None) -> Iterator[None]:
    """Their running statistics and other buffers, put back afterwards.

    Args:
        modules: Whose they are.
        restless: Those of its modules that need it, by name, where that is known; learns it, by a
            look at their values, of a module that it does not know. By default all.

    Example:
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with buffers_kept([norm]):
        ...     _ = norm(torch.ones(4, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    known: Restless = {} if restless is None else restless
    asked = [(module, known.get(module)) for module in modules if len(module._buffers)]
    before = [
        (module, name, buffer, buffer.clone() if _is_writable(buffer) else None)
        for module, names in asked
        for name, buffer in _buffers(module).items()
        if names is None or name in names
    ]
    still = [
        (module, name, buffer, version_of(buffer))
        for module, names in asked
        if names is not None
        for name, buffer in _buffers(module).items()
        if name not in names
    ]
    try:
        yield
        now = {module: _buffers(module) for module, _ in asked}
        for module, name, buffer, version in still:
            if now[module].get(name) is not buffer or version_of(buffer) != version:
                # All from now on: not every kernel counts what it writes.
                known[module].update(now[module])
        if restless is not None:
            restless.update({module: set() for module, names in asked if names is None})
            for module, name, buffer, value in before:
                if name not in restless[module] and (
                    now[module].get(name) is not buffer or _has_changed(buffer, value)
                ):
                    restless[module].add(name)
    finally:
        for module, name, buffer, value in before:
            if value is not None:
                buffer.data.copy_(value)  # .data: a pending backward pass may have saved it
            if _buffers(module).get(name) is not buffer:  # the model put another one there
                module._buffers[name] = buffer


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Their attributes, such as caches and losses that a pass collects, put back afterwards.

    What is in a list, a dict or a set of the user's too; attributes that are new stay.

    Example:
        >>> net = torch.nn.Flatten()
        >>> net.size, net.cache = 8, {}
        >>> with attributes_kept([net]):
        ...     net.size, net.cache["bias"] = 16, torch.ones(2)
        >>> net.size, net.cache
        (8, {})
    """
    before = []
    for module in modules:
        all_ = vars(module)
        own = {name: all_[name] for name in all_.keys() - _OF_EVERY_MODULE}
        held = [(v, v.copy()) for v in own.values() if _is_container(v)]
        before.append((module, own, held))
    try:
        yield
    finally:
        for module, own, held in before:
            vars(module).update(own)
            for container, content in held:
                if not _holds(container, content):
                    container.clear()
                    add = container.extend if isinstance(container, list) else container.update
                    add(content)


@contextmanager
def no_cached_weights() -> Iterator[None]:
    """Without the cache of ``parametrize.cached()``, where weights would stay without gradient.

    Example:
        >>> from torch.nn.utils import parametrizations
        >>> layer = parametrizations.weight_norm(torch.nn.Linear(2, 2))
        >>> with parametrize.cached():
        ...     with no_cached_weights(), torch.no_grad():
        ...         _ = layer.weight
        ...     layer.weight.requires_grad
        True
    """
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


def version_of(tensor: Tensor) -> int:
    """How often it was written to; tensors of inference mode do not count.

    Example:
        >>> version_of(torch.zeros(2).add_(1))
        1
    """
    return 0 if tensor.is_inference() else tensor._version


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that are there; a scripted module has but ``items``."""
    return {name: buffer for name, buffer in module._buffers.items() if buffer is not None}


def _is_writable(buffer: Tensor) -> bool:
    """Whether a model can write to it: not where elements share their memory."""
    if buffer.layout != torch.strided:
        return False
    places = zip(buffer.stride(), buffer.shape, strict=True)
    return not any(step == 0 and count > 1 for step, count in places)


def _has_changed(buffer: Tensor, value: Tensor | None) -> bool:
    return not (value is None or buffer.is_meta or torch.equal(buffer, value))


def _is_container(value: Any) -> bool:
    return type(value) in (list, dict, set) and len(value) <= _FEW


def _holds(container: Any, content: Any) -> bool:
    """Whether it has these very things; of tensors one could not ask whether they are equal."""
    if isinstance(container, dict):
        same_keys = list(container) == list(content)
        return same_keys and _holds(list(container.values()), list(content.values()))
    if isinstance(container, set):
        return bool(container == content)
    return len(container) == len(content) and all(map(operator.is_, container, content))
