"""Many small trainings at once on a GPU: a step is one CUDA graph, a training one stream.

The kernels of a small network are shorter than it takes to launch them, and too small to fill a
GPU. Captured in a graph they are launched at once, and graphs on several streams run side by side.
On a CPU the same code runs step by step.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree

_WARM_UP = 3  # eager calls, in which libraries choose their kernels and optimisers their state


class Graphed:
    """A function of tensors that returns nothing; on a GPU a CUDA graph, from the fourth call on.

    All that is random has to be among its inputs: whatever it decides on the host is decided once.

    Args:
        run: Takes tensors, or mappings and tuples of tensors, always of the same shapes.
    """

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Any] = []

    def __call__(self, *inputs: Any) -> None:
        """Call the function, or replay what it did."""
        self.calls += 1
        leaves, tree = pytree.tree_flatten(inputs)
        if self.calls <= _WARM_UP or not any(_on_gpu(leaf) for leaf in leaves):
            self.run(*inputs)
            return
        if self.graph is None:
            self.inputs = [leaf.clone() if _on_gpu(leaf) else leaf for leaf in leaves]
            self.graph = _capture(lambda: self.run(*pytree.tree_unflatten(self.inputs, tree)))
        for ours, leaf in zip(self.inputs, leaves, strict=True):
            if _on_gpu(ours):
                ours.copy_(leaf, non_blocking=True)
        self.graph.replay()


def _on_gpu(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_cuda


def _capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """As ``torch.cuda.graph`` does, but without waiting for what other streams do."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        run()
    finally:
        graph.capture_end()
    return graph


Training = Generator[None, None, Any]


def side_by_side(
    trainings: Iterable[Callable[[], Training]], at_once: int, *, until: float | None = None
) -> None:
    """Run generators, some at once, each on a stream of its own; each yields after some steps.

    One that fails lets the others go on.

    Args:
        trainings: Make the generators, in the order in which they begin.
        at_once: How many run side by side.
        until: The ``time.monotonic()`` at which the rest is left undone.
    """
    waiting = deque(trainings)
    running: deque[tuple[Training, Any]] = deque()
    failed = 0
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append((waiting.popleft()(), new_stream()))
        training, stream = running.popleft()
        with on(stream):
            try:
                next(training)
            except StopIteration:
                continue
            except Exception:
                traceback.print_exc()
                failed += 1
                continue
        running.append((training, stream))
        if until is not None and time.monotonic() > until:
            break
    if failed:
        raise RuntimeError(f"{failed} of the trainings failed; what they say stands above.")


def alone(training: Training) -> Any:
    """What a generator returns, run on a stream of its own."""
    with on(new_stream()):
        while True:
            try:
                next(training)
            except StopIteration as stop:
                return stop.value


def new_stream() -> Any:
    """A stream that begins after what was asked of the usual one; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    return stream


def on(stream: Any) -> AbstractContextManager[Any]:
    """Work on this stream."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def finish(device: torch.device) -> None:
    """Wait for what was begun, on any stream."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def finished(device: torch.device) -> Callable[[], bool]:
    """Whether the stream has done what it was given until now."""
    if device.type != "cuda":
        return lambda: True
    event = torch.cuda.Event()
    event.record()
    return event.query
