"""The modules that a model calls although nothing that we can look into holds them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from .behind import walk

__all__ = ["around_others", "is_compiled"]


@contextmanager
def around_others(
    known: Iterable[nn.Module],
    around: Callable[[nn.Module], AbstractContextManager[Any]],
    concerns: Callable[[nn.Module, bool], bool] = lambda module, inside: True,
) -> Iterator[Calls]:
    """Put a block around each call, by this thread, of a module that is not among the known ones.

    What such a module calls is inside its block. Yields what it saw.

    Args:
        known: These.
        around: Makes the block.
        concerns: Tells of another module, and whether a known one calls it, if it gets a block.

    Example:
        >>> from contextlib import nullcontext
        >>> net, told = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), []
        >>> with around_others([], lambda module: nullcontext(told.append(module))):
        ...     _ = net(torch.ones(1, 2))
        >>> told == [net]
        True
    """
    usual, thread, calls = set(known), threading.get_ident(), Calls(around, _active.calls)

    def is_seen() -> bool:
        # First: nothing else of this can be traced.
        return not torch.compiler.is_compiling() and threading.get_ident() == thread

    def before(module: nn.Module, inputs: Any) -> None:
        if not is_seen():
            return
        if module in usual:
            calls.of_known += 1
        elif calls.module is not None or concerns(module, calls.of_known > 0):
            calls.enter(module)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        if not is_seen():
            return
        calls.half |= isinstance(output, Tensor) and output.dtype == torch.float16
        if module in usual:
            calls.of_known -= 1
        elif calls.module is not None:
            calls.leave(module)

    hooks = [
        register_module_forward_pre_hook(before),
        register_module_forward_hook(after, always_call=True),
    ]
    outer = _active.calls
    _active.calls = (*outer, calls)
    try:
        yield calls
    finally:
        _active.calls = outer
        for hook in hooks:
            hook.remove()
        calls.close()


class Calls:
    """The outermost call that has a block, and how deep that module is in itself."""

    def __init__(
        self,
        around: Callable[[nn.Module], AbstractContextManager[Any]],
        outer: tuple[Calls, ...],
    ) -> None:
        self.around, self.outer = around, outer
        self.module: nn.Module | None = None
        self.depth = 0
        self.of_known = 0  # that we are in
        self.half = False  # whether a module returned float16
        self.block = ExitStack()

    def enter(self, module: nn.Module) -> None:
        if self.module is None:
            block = self.around(module)
            # In the block of another, which torch's order of hooks would close before this one.
            if all(other.module is None for other in self.outer):
                self.block.enter_context(block)
            self.module = module
        self.depth += module is self.module

    def leave(self, module: nn.Module) -> None:
        self.depth -= module is self.module
        if self.depth == 0:
            self.close()

    def close(self) -> None:
        self.module, self.depth = None, 0
        self.block.close()


class _Active(threading.local):
    """Who watches in a thread."""

    calls: tuple[Calls, ...] = ()


_active = _Active()


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
