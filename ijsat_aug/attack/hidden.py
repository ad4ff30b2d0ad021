"""The modules that a model calls although nothing that we can look into holds them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from .behind import walk

__all__ = ["around_others", "is_compiled"]


@contextmanager
def around_others(
    known: Iterable[nn.Module], around: Callable[[nn.Module], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Put a block around each call, by this thread, of a module that is not among the known ones.

    What such a module calls is inside its block.

    Example:
        >>> from contextlib import nullcontext
        >>> net, told = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), []
        >>> with around_others([], lambda module: nullcontext(told.append(module))):
        ...     _ = net(torch.ones(1, 2))
        >>> told == [net]
        True
    """
    usual, thread, calls = set(known), threading.get_ident(), _Calls(around)

    def is_other(module: nn.Module) -> bool:
        if torch.compiler.is_compiling():  # first: nothing else of this can be traced
            return False
        return threading.get_ident() == thread and module not in usual

    def before(module: nn.Module, inputs: Any) -> None:
        if is_other(module):
            calls.enter(module)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        if is_other(module):
            calls.leave(module)

    hooks = [
        register_module_forward_pre_hook(before),
        register_module_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        calls.close()


class _Calls:
    """The outermost call that has a block, and how deep that module is in itself."""

    def __init__(self, around: Callable[[nn.Module], AbstractContextManager[Any]]) -> None:
        self.around = around
        self.module: nn.Module | None = None
        self.depth = 0
        self.block = ExitStack()

    def enter(self, module: nn.Module) -> None:
        if self.module is None:
            self.block.enter_context(self.around(module))
            self.module = module
        self.depth += module is self.module

    def leave(self, module: nn.Module) -> None:
        self.depth -= module is self.module
        if self.depth == 0:
            self.close()

    def close(self) -> None:
        self.module, self.depth = None, 0
        self.block.close()


def is_compiled(model: Any) -> bool:
    """Whether it, or what it holds, is compiled, which would be compiled again to be watched.

    Example:
        >>> is_compiled(nn.Flatten()), is_compiled(torch.compile(nn.Flatten()))
        (False, True)
    """
    return any(map(_has_compiled, walk(model)))


def _has_compiled(thing: Any) -> bool:
    if isinstance(thing, FunctionType):
        return hasattr(thing, "_torchdynamo_orig_callable")
    return isinstance(thing, nn.Module) and any(
        getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod")
        for part in thing.modules()
    )
