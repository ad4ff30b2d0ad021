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
from dataclasses import dataclass, field
from typing import Any

import torch

_AHEAD = 2  # turns of a training that a GPU has before it

Training = Generator[None, None, Any]


@dataclass
class _Lane:
    """A training, its stream, and what of it the GPU has not done yet."""

    training: Training
    stream: Any
    pending: deque[Callable[[], bool]] = field(default_factory=deque)

    def may_go_on(self) -> bool:
        """Whether the GPU has not more of it than it can keep up with."""
        while self.pending and self.pending[0]():
            self.pending.popleft()
        return len(self.pending) < _AHEAD

    def go_on(self) -> bool:
        """Take a turn; False when there are no more."""
        with on(self.stream):
            try:
                next(self.training)
            except StopIteration:
                return False
            if self.stream is not None:
                self.pending.append(finished(torch.device("cuda")))
        return True


def side_by_side(
    trainings: Iterable[Callable[[], Training]], at_once: int, *, until: float | None = None
) -> None:
    """Run generators, some at once, each on a stream of its own; each yields after some steps.

    A GPU has some turns of each waiting and no more, so that it shares its time between them
    however long their turns are. One that fails lets the others go on.

    Args:
        trainings: Make the generators, in the order in which they begin.
        at_once: How many run side by side.
        until: The ``time.monotonic()`` at which the rest is left undone.
    """
    waiting = deque(trainings)
    running: list[_Lane] = []
    streams = [new_stream() for _ in range(at_once)]  # there are 32: more would share them
    failed = 0
    while waiting or running:
        while waiting and streams:
            running.append(_Lane(waiting.popleft()(), streams.pop()))
        ready = [lane for lane in running if lane.may_go_on()]
        if not ready:
            time.sleep(2e-4)
        for lane in ready:
            try:
                goes_on = lane.go_on()
            except Exception:
                traceback.print_exc()
                goes_on = False
                failed += 1
            if not goes_on:
                running.remove(lane)
                streams.append(lane.stream)
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
