"""The one line in a training script: a loader whose batches come out transformed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import default_collate

__all__ = ["AugmentedLoader", "collate"]

T = TypeVar("T")


class AugmentedLoader(Generic[T]):
    """Any iterable of batches, moved to a device and transformed, one at a time.

    A batch is transformed when it is asked for, after the training step of the last one, because
    the transform asks the model. On CUDA the copy of the next batch overlaps that step. Everything
    else (``len``, ``dataset``, ``sampler``, ``set_epoch``, ...) is the loader's own.

    Args:
        loader: A DataLoader, or anything that yields batches.
        transform: Gets a whole batch, such as ``(images, labels)``.
        device: Where batches go before they are transformed; by default they stay.

    Example:
        >>> from ijsat_aug import RobustMixup
        >>> data = torch.utils.data.TensorDataset(torch.rand(6, 3, 4, 4), torch.arange(6))
        >>> loader = torch.utils.data.DataLoader(data, batch_size=4)
        >>> loader = AugmentedLoader(loader, RobustMixup(num_classes=6, eps=0))
        >>> [tuple(y.shape) for x, y in loader], len(loader), loader.batch_size
        ([(4, 6), (2, 6)], 2, 4)
    """

    def __init__(
        self,
        loader: Iterable[T],
        transform: Callable[[T], Any],
        device: torch.device | str | int | None = None,
    ) -> None:
        if not callable(transform):
            raise TypeError(f"transform must be callable, got {type(transform).__name__}.")
        self.loader = loader
        self.transform = transform
        self.device = None if device is None else torch.device(device)

    def __iter__(self) -> Iterator[Any]:
        if self.device is not None and self.device.type == "cuda":
            batches: Iterable[Any] = _ahead(self.loader, self.device)
        else:
            batches = (_moved(batch, self.device) for batch in self.loader)
        for batch in batches:
            yield self.transform(batch)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Tell the loader, or the sampler in it, which epoch begins.

        Example:
            >>> AugmentedLoader([torch.rand(2, 3, 4, 4)], lambda batch: batch).set_epoch(3)
        """
        owners: tuple[Any, ...] = (
            self.loader,
            getattr(self.loader, "sampler", None),
            getattr(getattr(self.loader, "batch_sampler", None), "sampler", None),
        )
        for owner in owners:
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
                return

    def __getattr__(self, name: str) -> Any:
        if name in ("loader", "__setstate__"):  # not there yet while it is being unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __repr__(self) -> str:
        return f"AugmentedLoader({self.loader!r}, {self.transform!r}, device={self.device})"


class collate:
    """A ``collate_fn`` that transforms the batch, for loaders without workers.

    In a worker it fails with a clear error: there the model would be a stale copy.

    Args:
        transform: Gets a whole batch.
        collate_fn: Makes a batch of samples.

    Example:
        >>> from ijsat_aug import RobustMixup
        >>> data = torch.utils.data.TensorDataset(torch.rand(4, 3, 4, 4), torch.arange(4))
        >>> mix = RobustMixup(num_classes=4, eps=0)
        >>> loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=collate(mix))
        >>> [tuple(y.shape) for x, y in loader]
        [(4, 4)]
    """

    def __init__(
        self,
        transform: Callable[[Any], Any],
        collate_fn: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self.transform = transform
        self.collate_fn = collate_fn

    def __call__(self, samples: list[Any]) -> Any:
        """The transformed batch of some samples."""
        return self.transform(self.collate_fn(samples))


def _moved(batch: Any, device: torch.device | None) -> Any:
    """The batch with every tensor on the device; the copy does not wait where it need not."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        if device.type == "cuda" and batch.device.type == "cpu" and not batch.is_pinned():
            batch = batch.pin_memory()
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "_make"):
        return batch._make(_moved(item, device) for item in batch)
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(item, device) for item in batch)
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return batch


def _ahead(loader: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Copy the next batch on a stream of its own while the caller works on this one."""
    copies = torch.cuda.Stream(device)
    iterator = iter(loader)

    def fetch() -> Any:
        with torch.cuda.stream(copies):
            return _moved(next(iterator), device)

    try:
        following = fetch()
    except StopIteration:
        return
    while True:
        torch.cuda.current_stream(device).wait_stream(copies)
        batch = following
        _hold(batch, torch.cuda.current_stream(device))
        try:
            following = fetch()
        except StopIteration:
            yield batch
            return
        yield batch


def _hold(batch: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that the batch is used on this stream too."""
    if isinstance(batch, Tensor):
        batch.record_stream(stream)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            _hold(value, stream)
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            _hold(item, stream)
