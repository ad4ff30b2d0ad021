"""A training step as a CUDA graph: its kernels are launched at once, not one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["CapturedStep"]

_WARM_UP = 3  # calls in which libraries choose their kernels and optimisers make their state
_KINDS = 16  # of inputs, beyond which the oldest is forgotten


class CapturedStep:
    """A function of tensors that becomes a CUDA graph at its fourth call; on a CPU it is called.

    A small network keeps a fast GPU waiting for launches, and a flow has many small kernels: there
    a captured step is several times faster. A graph repeats what was done with other contents, so
    that all that is random, and all that changes, has to come in as a tensor: the draws of a
    transform by ``draw``, a learning rate that is scheduled as a tensor that ``fill_`` changes
    (``SGD(..., lr=tensor, fused=True)``; Adam also needs ``capturable=True``). The shapes that come
    a fourth time first are captured; inputs of others, such as a last, smaller batch, are passed to
    the function itself.

    Args:
        step: Takes tensors, or tuples and mappings of tensors. It may not ask for values on the
            host (``item``, ``if tensor:``), and leaves no gradients for the next call. What it
            returns is overwritten by the next call.

    Example:
        >>> from ijsat_aug import JointSpaceAdv, RobustMixup
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> mix = RobustMixup(net, num_classes=10, attack=JointSpaceAdv(net, "digits"))
        >>> @CapturedStep
        ... def step(x, y, params):
        ...     x, y, _ = mix.augment(x, y, params)
        ...     loss = torch.nn.functional.cross_entropy(net(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     return loss.detach()
        >>> for x, y in [(torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1]))]:
        ...     loss = step(x, y, mix.draw(x, y))
        >>> bool(loss > 0)
        True
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step
        self._calls: list[list[Any]] = []  # each kind of inputs, and how often it came
        self._kind: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Any] = []
        self._output: Any = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def captured(self) -> bool:
        """Whether there is a graph."""
        return self._graph is not None

    def __call__(self, *inputs: Any) -> Any:
        """Call the function, or repeat what it did with these inputs."""
        leaves, tree = pytree.tree_flatten(inputs)
        device = next((leaf.device for leaf in leaves if _on_gpu(leaf)), None)
        if device is None:
            return self.step(*inputs)
        with torch.cuda.device(device), self._aside():
            kind = (tree, [_kind_of(leaf) for leaf in leaves])
            if self._graph is None and self._count(kind) > _WARM_UP:
                self._inputs = [_own(leaf) for leaf in leaves]
                self._graph, self._kind = self._capture(tree), kind
            if kind != self._kind:
                return self.step(*inputs)
            assert self._graph is not None
            with torch.no_grad():
                for ours, leaf in zip(self._inputs, leaves, strict=True):
                    if _on_gpu(ours):
                        ours.copy_(leaf, non_blocking=True)
            self._graph.replay()
            return self._output

    def _count(self, kind: Any) -> int:
        """How often this kind of inputs came."""
        for entry in self._calls:
            if entry[0] == kind:
                entry[1] += 1
                return int(entry[1])
        self._calls = [*self._calls[-_KINDS:], [kind, 1]]
        return 1

    def _capture(self, tree: Any) -> torch.cuda.CUDAGraph:
        """As ``torch.cuda.graph`` does, but without waiting for what other streams do."""
        torch.cuda.empty_cache()  # nothing that torch keeps can be freed during a capture
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            self._output = self.step(*pytree.tree_unflatten(self._inputs, tree))
        except BaseException as error:
            with suppress(RuntimeError):
                graph.capture_end()
            _end_capture_of_the_generator()
            if not isinstance(error, Exception):  # Ctrl-C
                raise
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise torch.cuda.OutOfMemoryError(
                    "no memory of the GPU is left for a CUDA graph, which has memory of its own: "
                    "take smaller batches, or do not capture."
                ) from error
            raise RuntimeError(
                "the step, or the attack of captured=True, cannot be captured as a CUDA graph: it "
                "must not ask for values on the host (item, if tensor:), copy from the CPU or draw "
                "on it, nor be compiled into graphs of its own: pass these in, or do not capture."
            ) from error
        graph.capture_end()
        return graph

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On a stream of its own, as a graph needs it; on the caller's where that is one."""
        current = torch.cuda.current_stream()
        if current != torch.cuda.default_stream():
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)


def _end_capture_of_the_generator() -> None:
    """A capture that failed leaves torch's generator in it, and no dropout would work again."""
    graph, one = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    with suppress(RuntimeError):
        graph.capture_begin(capture_error_mode="thread_local")
        one.add_(1)
        graph.capture_end()


def _own(leaf: Any) -> Any:
    """A tensor on the GPU that later calls write to, without what led to it."""
    if not _on_gpu(leaf):
        return leaf
    with torch.inference_mode(False):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _on_gpu(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_cuda


def _kind_of(leaf: Any) -> Any:
    """What a graph cannot change: all of it but the contents of tensors on the GPU."""
    if isinstance(leaf, Tensor) and not leaf.is_cuda:
        raise ValueError(
            "a captured step got a tensor on the CPU beside those on the GPU, and would keep its "
            'contents for ever: move it first, as in x.to("cuda", non_blocking=True).'
        )
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if _on_gpu(leaf) else leaf
