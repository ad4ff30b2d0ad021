"""The modules behind something of the user's, and what of it copies share."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

__all__ = ["Shared", "roots", "walk"]

T = TypeVar("T")

_MANY = 256  # things that something holds, beyond which none of them is looked at
_IN_ALL = 4096  # things that are looked at


class Shared(Generic[T]):
    """Something of the user's that copies share, unless what it asks is copied beside them.

    A module may hold a model and what attacks it, in any order. Whether the model is copied too,
    the memo of the copy tells when the thing is first used.

    Args:
        thing: Such as a model, or a callable that holds one.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> shared = Shared(net)
        >>> copy.deepcopy(shared).thing is net
        True
        >>> twin, other = copy.deepcopy([shared, net])
        >>> twin.thing is other
        True
    """

    def __init__(self, thing: T) -> None:
        self._thing = thing
        self._copies: dict[int, Any] = {}

    @property
    def thing(self) -> T:
        """The thing."""
        if self._copies:
            memo, self._copies = self._copies, {}
            asked = (self._thing, *roots(self._thing))
            if any(memo.get(id(one), one) is not one for one in asked):
                self._thing = copy.deepcopy(self._thing, memo)
        return self._thing

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared[T]:
        twin = Shared(self.thing)
        twin._copies = {} if twin._thing is None else memo
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return Shared, (self.thing,)


def roots(thing: Any) -> Iterator[nn.Module]:
    """The modules that something callable holds, or what it holds does, as they are uncompiled."""
    for held in walk(thing):
        held = _held(held, "_orig_mod") or held
        if isinstance(held, nn.Module):
            yield held


def walk(thing: Any) -> Iterator[Any]:
    """Something callable and what it holds, down to modules.

    Of an object the attributes are looked at, but not the objects among them; of a function the
    global names that it uses, and of a function among these.

    Example:
        >>> net = nn.Flatten()
        >>> [type(held).__name__ for held in walk(lambda x: net(x))]
        ['function', 'Flatten']
    """
    return _walk(thing, 5, False, 2, iter(range(_IN_ALL)))


def _walk(
    thing: Any, depth: int, inside: bool, globals_too: int, left: Iterator[int]
) -> Iterator[Any]:
    if next(left, None) is None:
        return
    yield thing
    if isinstance(thing, nn.Module):
        return
    held = _held_by(thing)
    if held is None and not inside and not isinstance(thing, (type, ModuleType, Tensor)):
        held, inside = list(getattr(thing, "__dict__", {}).values()), True
    if depth and held is not None and len(held) <= _MANY:
        for inner in held:
            yield from _walk(inner, depth - 1, inside, globals_too, left)
    if isinstance(thing, FunctionType) and depth and globals_too:
        for named in _named_in(thing):
            yield from _walk(named, depth - 1, inside, globals_too - 1, left)


def _held_by(thing: Any) -> Sequence[Any] | None:
    """What is in a function or a container; None of another object."""
    if isinstance(thing, (list, tuple)):
        return thing
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, partial):
        return (thing.func, *thing.args, *thing.keywords.values())
    if isinstance(thing, MethodType):
        return (thing.__self__,)
    wrapped = _held(thing, "__wrapped__")
    wrapped = wrapped or _held(thing, "_torchdynamo_orig_callable")
    held = [] if wrapped is None else [wrapped]
    if isinstance(thing, FunctionType):
        defaults = (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        cells = (cell.cell_contents for cell in thing.__closure__ or () if _full(cell))
        return [*held, *cells, *defaults]
    return held or None


def _held(thing: Any, name: str) -> Any:
    """An attribute, or None; an object of the user's may answer with an error of any kind."""
    try:
        return getattr(thing, name, None)
    except Exception:
        return None


def _named_in(function: FunctionType) -> list[Any]:
    """What a function finds among global names, but for packages and classes."""
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    return [value for value in named if not isinstance(value, (ModuleType, type))]


def _full(cell: Any) -> bool:
    try:
        return bool(cell.cell_contents is not None)
    except ValueError:  # not assigned yet
        return False
