"""The one line in a training script: a loader whose batches come out transformed."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..transforms.batch import BatchTransform
from ..transforms.replay import calmed, replay
from ..words import check_count
from .captured_transform import CapturedTransform

__all__ = ["AugmentedLoader", "collate"]

T = TypeVar("T")

# What is its own; all else is the loader's.
_OWN = ("loader", "transform", "device", "plan", "epoch", "heard", "_graph", "_told", "_thread")
_PLANNED = ("replay", "every", "epochs", "captured")


class AugmentedLoader(Generic[T]):
    """Any iterable of batches, moved to a device and transformed, one at a time.

    A batch is fetched and transformed when it is asked for, after the training step of the last
    one, because the transform asks the model: not in a thread beside that step. On CUDA its copy
    runs beside what the GPU still has to do of that step. Everything else (``len``, ``dataset``,
    ``sampler``, ``set_epoch``, ...) is the loader's own. In a loop with autocast give the transform
    its own ``amp_dtype``: it runs before the loop's block begins. What only looks at images
    (``update_bn``) gets the ``.loader`` inside: each pass counts as an epoch.

    Args:
        loader: A DataLoader, or anything that yields batches.
        transform: Gets a whole batch, such as ``(images, labels)``.
        device: Where batches go before they are transformed; by default they stay.
        replay: How often each batch is shown: first without attack, then moved along the gradient
            that the step before left on its images. The attack then asks no model, and costs what
            the flow costs; ``len`` counts every showing.
        every: Attack only every so many batches; the others are mixed or left as they are.
        epochs: ``(first, end)``: attack only from epoch ``first`` up to, without it, ``end``, where
            None is never. Epochs are passes over more than a first batch, counted from 0, or told
            by ``set_epoch`` of this loader or of a sampler in it; tell it where a resumed training
            begins, and in a loader without an end where each does.
        captured: On CUDA repeat the attack as a graph, from its fifth batch on: see
            :class:`~ijsat_aug.training.CapturedTransform`. Not with ``replay``.

    Example:
        >>> from ijsat_aug import RobustMixup
        >>> data = torch.utils.data.TensorDataset(torch.rand(6, 3, 4, 4), torch.arange(6))
        >>> loader = torch.utils.data.DataLoader(data, batch_size=4)
        >>> loader = AugmentedLoader(loader, RobustMixup(num_classes=6, eps=0))
        >>> [tuple(y.shape) for x, y in loader], len(loader), loader.batch_size
        ([(4, 6), (2, 6)], 2, 4)

        Batches that are shown twice, the second time along the gradient of the first step:

        >>> from ijsat_aug import JointSpaceAdv
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 6))
        >>> twice = AugmentedLoader(loader.loader, JointSpaceAdv(eta=0), replay=2)
        >>> for x, y in twice:
        ...     torch.nn.functional.cross_entropy(net(x), y).backward()
        >>> len(twice)
        4
    """

    def __init__(
        self,
        loader: Iterable[T],
        transform: Callable[[T], Any],
        device: torch.device | str | int | None = None,
        *,
        replay: int = 1,
        every: int = 1,
        epochs: tuple[int, int | None] | None = None,
        captured: bool = False,
    ) -> None:
        if not callable(transform) or isinstance(transform, type):
            got = transform.__name__ if isinstance(transform, type) else type(transform).__name__
            raise TypeError(f"transform must be a transform, as in {_EXAMPLE}; got {got}.")
        graph = None
        if isinstance(transform, CapturedTransform):
            graph, transform, captured = transform, transform.transform, True
        self.loader = loader
        self.transform = transform
        self.device = None if device is None else torch.device(device)
        self.plan = Plan(replay, every, (0, None) if epochs is None else epochs)
        self.epoch = 0
        self.heard: int | None = None
        self._told = 0  # how often
        self._thread: int | None = threading.get_ident()
        self._hear()
        if captured and replay > 1:
            raise ValueError(
                "captured=True repeats an attack that asks the model, which a replay does not do: "
                "leave one of them out."
            )
        if captured and graph is None:
            graph = CapturedTransform(transform)  # type: ignore[arg-type]
        self._graph = graph
        if self.plan == Plan():
            return
        if not isinstance(transform, BatchTransform):
            raise TypeError(
                "replay, every and epochs tell an attack when to rest: the transform must be one "
                f"of ours, not {type(transform).__name__}; put other transforms into the loader."
            )
        if replay > 1:
            transform.check_replay()

    def __iter__(self) -> Iterator[Any]:
        self._hear()
        self._check_thread()
        move, plan, epoch, told = _mover(self.device), self.plan, self.epoch, self._told
        if self._graph is not None and self._graph.transform is not self.transform:
            self._graph = CapturedTransform(self.transform)  # type: ignore[arg-type]
        work = self._graph or self.transform
        number = -1
        for batch in self.loader:  # not by enumerate, which would keep it
            number += 1
            if number == 0:
                self._overhear()
            if self._told != told:  # meanwhile, as of a loader without an end
                epoch, told = self.epoch, self._told
            elif number == 1 and self.epoch == epoch:  # a look at the first batch begins none
                self.epoch = epoch + 1
            ready = [move(batch)]
            del batch  # nobody holds it while the model is trained
            yield from plan.shown(work, ready, epoch, number)
        if number == 0 and self.epoch == epoch and self._told == told:
            self.epoch = epoch + 1

    def __len__(self) -> int:
        return self.plan.count(len(self.loader))  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Tell the loader, or the sampler in it, which epoch begins.

        Example:
            >>> AugmentedLoader([torch.rand(2, 3, 4, 4)], lambda batch: batch).set_epoch(3)
        """
        self.epoch = epoch
        self._told += 1
        counting = self._counting()
        if counting is not None:
            counting.set_epoch(epoch)

    def _check_thread(self) -> None:
        """A word, once, where batches are made beside the training step that they are for."""
        if self._thread not in (None, threading.get_ident()):
            self._thread = None
            warnings.warn(
                "an AugmentedLoader is read in another thread than it was made in. Its transform "
                "asks the model, which must not be trained meanwhile: unless this thread trains "
                "too, read the loader inside in the background, and wrap that reader.",
                stacklevel=3,
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_thread": None}  # of another process

    def _counting(self) -> Any:
        """Who else is told the epochs: the loader, a sampler in it, or the dataset."""
        batches = getattr(self.loader, "batch_sampler", None)
        owners = (
            self.loader,
            getattr(self.loader, "sampler", None),
            batches,
            getattr(batches, "sampler", None),
            getattr(self.loader, "dataset", None),
        )
        return next((owner for owner in owners if hasattr(owner, "set_epoch")), None)

    def _hear(self) -> None:
        """Go by the epoch that who counts them was told since, where it says so in a number."""
        owner = self._counting()
        if isinstance(owner, AugmentedLoader):
            owner._hear()
        told = _number_of(owner)
        if told is not None and told != self.heard:
            self.epoch = self.heard = told

    def _overhear(self) -> None:
        """What a loader told its sampler when it began, as Fabric's do, the user told nobody."""
        told = _number_of(self._counting())
        self.heard = self.heard if told is None else told

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):  # not there yet while it is being unpickled
            raise AttributeError(name)
        if name in _PLANNED:
            return self._graph is not None if name == "captured" else getattr(self.plan, name)
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PLANNED:
            raise AttributeError(
                f"{name} of an AugmentedLoader is not set: make another one around its .loader."
            )
        if name in _OWN or name.startswith("__"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.loader, name, value)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        captured = ", captured=True" if self._graph is not None else ""
        return (
            f"AugmentedLoader({self.loader!r}, {self.transform!r}, device={self.device}{captured})"
        )


@dataclass(frozen=True)
class Plan:
    """When the attack works, and how often a batch is shown.

    Attributes:
        replay: How often a batch is shown that is attacked.
        every: Attack one of so many batches.
        epochs: Attack from the first up to the second.

    Example:
        >>> Plan(replay=2, every=3).count(7)  # batches 0, 3 and 6 twice
        10
    """

    replay: int = 1
    every: int = 1
    epochs: tuple[int, int | None] = (0, None)

    def __post_init__(self) -> None:
        for name in ("replay", "every"):
            check_count(name, getattr(self, name), 1)
        if not (isinstance(self.epochs, (tuple, list)) and len(self.epochs) == 2):
            raise TypeError(f"epochs must be (first, end), got {self.epochs!r}.")
        first, end = self.epochs
        if not (isinstance(first, Integral) and isinstance(end, Integral | None)):
            raise TypeError(f"epochs must be whole numbers (first, end), got {self.epochs!r}.")
        if first < 0 or (end is not None and end < first):
            raise ValueError(f"epochs must be (first, end) in order, got {self.epochs!r}.")

    def count(self, batches: int) -> int:
        """How often batches are shown in an epoch; the same in all epochs."""
        return batches + (self.replay - 1) * -(-batches // self.every)

    def shown(self, transform: Any, ready: list[Any], epoch: int, number: int) -> Iterator[Any]:
        """What a batch, which is taken out of its list, becomes, one time or several."""
        first, end = self.epochs
        turn = number % self.every == 0
        works = turn and first <= epoch and (end is None or epoch < end)
        if works and self.replay > 1:
            yield from replay(transform, ready.pop(), self.replay)
        elif works:
            yield transform(ready.pop())
        else:
            for _ in range(self.replay - 1 if turn else 0):
                yield calmed(transform, ready[0], again=True)
            yield calmed(transform, ready.pop())


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


_EXAMPLE = "AugmentedLoader(loader, RobustMixup(model, ...), device)"


def _number_of(owner: Any) -> int | None:
    """The epoch that a sampler, a dataset or one of accelerate's loaders is in."""
    told = getattr(owner, "epoch", getattr(owner, "iteration", None))
    return int(told) if isinstance(told, Integral) else None


def _mover(device: torch.device | None) -> Callable[[Any], Any]:
    """What brings a batch to the device; on CUDA by a stream of its own."""
    if device is None:
        return lambda batch: batch
    if device.type != "cuda":
        return lambda batch: _moved(batch, lambda tensor: tensor.to(device), device)
    copies = _copies(torch.empty(0, device=device).device)  # "cuda" is the card of the moment

    def copy_beside(tensor: Tensor) -> Tensor:
        if tensor.is_cuda:
            return tensor.to(device)
        with torch.cuda.stream(copies):
            pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
            if type(pinned) is not type(tensor):  # of older torchvisions
                pinned = tensor
            there = pinned.to(device, non_blocking=True)
        there.record_stream(torch.cuda.current_stream(device))  # whose memory it must not lose
        return there

    def move(batch: Any) -> Any:
        batch = _moved(batch, copy_beside, device)
        torch.cuda.current_stream(device).wait_stream(copies)
        return batch

    return move


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The one stream that copies to a device: memory that is freed stays with its stream."""
    return torch.cuda.Stream(device)


def _moved(batch: Any, to_device: Callable[[Tensor], Tensor], device: torch.device) -> Any:
    """The batch with every tensor on the device."""
    if isinstance(batch, Tensor):
        return to_device(batch)
    if hasattr(batch, "to"):  # first, as a PackedSequence is a tuple too
        return batch.to(device)
    if hasattr(batch, "_make"):
        return batch._make(_moved(item, to_device, device) for item in batch)
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(item, to_device, device) for item in batch)
    if isinstance(batch, Mapping):
        items = {key: _moved(value, to_device, device) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return items
        new = copy.copy(batch)
        new.update(items)
        return new
    return batch
