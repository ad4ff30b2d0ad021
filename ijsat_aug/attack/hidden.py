"""The modules that a model calls although nothing that we can look into holds them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["is_compiled", "told_of_others"]


@contextmanager
def told_of_others(known: Iterable[nn.Module], tell: Callable[[nn.Module], None]) -> Iterator[None]:
    """Tell of each module that this thread calls and that is not known, before it runs.

    What is inside such a module counts as known from then on.

    Example:
        >>> net, others = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), []
        >>> with told_of_others([], others.append):
        ...     _ = net(torch.ones(1, 2))
        >>> others == [net]
        True
    """
    seen, thread = set(known), threading.get_ident()

    def look(module: nn.Module, inputs: Any) -> None:
        ours = threading.get_ident() == thread and not torch.compiler.is_compiling()
        if ours and module not in seen:
            seen.update(module.modules())
            tell(module)

    hook = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def is_compiled(model: Any) -> bool:
    """Whether it or a module in it is compiled, which would be compiled again to be watched.

    Example:
        >>> is_compiled(nn.Flatten()), is_compiled(torch.compile(nn.Flatten()))
        (False, True)
    """
    if hasattr(model, "_torchdynamo_orig_callable"):
        return True
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    return any(
        getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod")
        for part in parts
    )
