"""The base of all transforms: a batch in, a batch of the same structure out."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import EllipsisType, MethodType
from typing import Any, ClassVar, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..attack.model import Mode, Model, ModelHandle
from ..words import is_between
from .checks import check_images, check_place
from .randomness import Randomness
from .scale import Scale
from .structure import LabelsGetter, Parts, maker, take_apart

__all__ = ["BatchTransform"]

Self = TypeVar("Self", bound="BatchTransform")

# Of samples that were left as they were; all else is 0 of them.
_OF_OTHERS = {"lam": 1.0, "loss": math.nan, "loss_start": math.nan}


class BatchTransform(nn.Module):
    """A transform of whole batches that asks a model.

    ``t(x, y)``, ``t((x, y, *rest))``, ``t({"image": x, "label": y, ...})`` and ``t(x)`` return what
    they got, with other images. After ``t.eval()`` it is the identity. The model is a handle: it is
    no submodule, so that nothing of it enters ``parameters()``, ``state_dict()``, ``.to()``,
    ``deepcopy`` or a pickle.

    A subclass draws all that is random in :meth:`make_params` and uses it in :meth:`transform`.

    Args:
        model: The model that is attacked; it may come later, by :meth:`bind`. A model that draws
            random numbers even in eval mode draws them from the global state.
        p: Probability that a batch is transformed at all.
        fraction: Share of the samples of a batch that is transformed, chosen at random; one at
            least.
        mode: ``"replace"`` the samples, or ``"append"`` the new ones behind the clean batch, as
            second half for split BatchNorm, through whose auxiliary branch they are then made;
            items other than images and labels stay as they are.
        mean: Of the normalisation of the batches; without it they are in [0, 1].
        std: Of the normalisation of the batches.
        labels_getter: Where the labels are: ``"default"`` (the second item, or the key ``labels``,
            ``label``, ``target``, ...), another key, a callable that gets the batch, or None.
        model_mode: ``"eval"`` freezes BatchNorm and dropout while the attack runs.
        amp_dtype: Autocast of the model in the attack; by default the caller's.
        memory_format: Of the images inside the attack, such as ``torch.channels_last``.
        generator: A generator or a seed; the global random state is then left alone.

    Attributes:
        last: Detached tensors about the last batch; of samples that were left as they were a move
            of 0 and a loss of NaN. Empty when all were.

    Example:
        >>> class Darker(BatchTransform):
        ...     def make_params(self, images, labels):
        ...         return {"factor": self.random.uniform((len(images), 1, 1, 1), images.device)}
        ...     def transform(self, images, labels, params):
        ...         return images * params["factor"], labels
        >>> darker = Darker(torch.nn.Identity(), generator=0)
        >>> batch = {"image": torch.ones(2, 3, 4, 4), "path": ["a", "b"]}
        >>> bool((darker(batch)["image"] < 1).all()), darker.eval()(batch) is batch
        (True, True)
    """

    # Settings that are no attributes, and in which of them they are; those that stay as they were.
    _lies_in: ClassVar[Mapping[str, str]] = {}
    _fixed: ClassVar[frozenset[str]] = frozenset(
        ("mean", "std", "model_mode", "amp_dtype", "memory_format", "generator")
    )

    def __init__(
        self,
        model: Model | None = None,
        *,
        p: float = 1.0,
        fraction: float = 1.0,
        mode: Literal["replace", "append"] = "replace",
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        labels_getter: LabelsGetter = "default",
        model_mode: Mode = "eval",
        amp_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        generator: torch.Generator | int | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("replace", "append"):
            raise ValueError(f'mode must be "replace" or "append", got {mode!r}.')
        self._mode = mode
        self.p = p
        self.fraction = fraction
        self.scale = Scale.of(mean, std)
        self.labels_getter = labels_getter
        self.handle = ModelHandle(
            model, mode=model_mode, amp_dtype=amp_dtype, memory_format=memory_format,
            route="auxiliary" if mode == "append" else "clean",
        )  # fmt: skip
        self.random = Randomness(generator)
        self.last: dict[str, Tensor] = {}
        self._seen: set[torch.device] = set()

    def __setattr__(self, name: str, value: Any) -> None:
        # A module would take any module, and shadow the property with a submodule.
        if name in self._fixed or isinstance(getattr(type(self), name, None), property):
            raise AttributeError(
                f"{name} of a {type(self).__name__} is not set: make another one; .bind(model) "
                "sets the model."
            )
        if name in self._lies_in:
            place = self._lies_in[name]
            raise AttributeError(
                f"{name} of a {type(self).__name__} lies in its .{place}: set .{place} to "
                f"dataclasses.replace(t.{place}, {name}=...)."
            )
        self._check_setting(name, value)
        super().__setattr__(name, value)

    def _check_setting(self, name: str, value: Any) -> None:
        """Refuse what a setting cannot be, at first and later."""
        if name == "p" and not is_between(value, 0, 1):
            raise ValueError(f"p is a probability, got {value!r}.")
        if name == "fraction" and not is_between(value, 0, 1):
            raise ValueError(f"fraction is a share of the samples, got {value!r}.")
        if name == "p" and value < 1 and self.mode == "append":
            raise ValueError('mode="append" needs p=1: batches must not change their size.')
        if name == "fraction" and value < 1 and self.mode == "append":
            raise ValueError('mode="append" needs fraction=1: a clean half and a new half.')

    @property
    def mode(self) -> Literal["replace", "append"]:
        """Whether the new samples take the place of the batch, or stand behind it."""
        return self._mode

    @property
    def needs_model(self) -> bool:
        """Whether there is anything to ask of a model."""
        return True

    @property
    def model(self) -> Model | None:
        """The model without its wrappers, or None."""
        return self.handle.model

    def bind(self: Self, model: Model) -> Self:
        """Set the model, and return the transform.

        Example:
            >>> net = torch.nn.Identity()
            >>> BatchTransform().bind(net).model is net
            True
        """
        self.handle = self.handle.to(model)
        self._seen.clear()
        return self

    def forward(self, *batch: Any) -> Any:
        """The batch with other images."""
        if not self.training:
            return batch[0] if len(batch) == 1 else batch
        parts = self.parts_of(batch)
        if parts.labels is None and parts.others and self.labels_getter == "default":
            self.find_no_labels()
        images, labels, _ = self.augment(parts.images, parts.labels)
        return parts.rebuild(images, labels)

    def parts_of(self, batch: tuple[Any, ...]) -> Parts:
        """The images and labels in a batch, and what stands beside them.

        Example:
            >>> batch = {"image": torch.rand(2, 3, 4, 4), "name": ["a", "b"]}
            >>> BatchTransform().parts_of((batch,)).images.shape
            torch.Size([2, 3, 4, 4])
        """
        return take_apart(batch, self.labels_getter)

    def find_no_labels(self) -> None:
        """Called where a batch holds more than images, and no labels under a usual name."""

    def augment(
        self, images: Tensor, labels: Any, params: dict[str, Any] | EllipsisType | None = ...
    ) -> tuple[Tensor, Any, dict[str, Any] | None]:
        """The new images and labels, and all that was random in them.

        Args:
            images: ``(B, C, H, W)``.
            labels: Of the batch, or None.
            params: What another call has drawn, to do the same again; by default it is drawn anew.

        Example:
            >>> from ijsat_aug import RobustMixup
            >>> mix = RobustMixup(num_classes=3, eps=0)
            >>> x, y = torch.rand(3, 1, 4, 4), torch.arange(3)
            >>> once, _, params = mix.augment(x, y)
            >>> bool((mix.augment(x, y, params)[0] == once).all())
            True
        """
        self._ask(self.needs_model)
        plain, labels = self._admitted(images, labels)
        params = self.draw(plain, labels) if isinstance(params, EllipsisType) else params
        if params is None:
            return images.detach(), labels, None
        new, labels = self.replay(plain, labels, params)
        return new.as_subclass(type(images)), labels, params

    def calm(self, images: Tensor, labels: Any) -> tuple[Tensor, Any, Tensor | None]:
        """The batch without its attack: how a replay begins, and what batches in between are.

        Returns:
            Images, labels, and which of them :meth:`follow` may move; None is all.

        Example:
            >>> from ijsat_aug import RobustMixup
            >>> mix = RobustMixup(torch.nn.Identity(), num_classes=3)
            >>> x, y, _ = mix.calm(torch.rand(3, 1, 4, 4), torch.arange(3))  # mixed, not attacked
            >>> y.shape
            torch.Size([3, 3])
        """
        labels = self._admitted(images, labels)[1]
        images = images.detach()
        if self.mode == "append":
            twice = torch.cat([images, images]).as_subclass(type(images))
            return twice, _joined(labels, labels, len(images)), None
        return images, labels, None

    def _ask(self, needed: bool) -> None:
        """Refuse to go on without a model that is needed; in a worker there should be none."""
        check_place()
        if needed and self.model is None:
            raise ValueError(
                f"{type(self).__name__} has no model yet (and none any more where it was "
                "pickled): pass it, or call .bind(model) first."
            )

    def _admitted(self, images: Tensor, labels: Any) -> tuple[Tensor, Any]:
        """The batch after all checks: images without torchvision's type, labels as they leave."""
        check_place()
        check_images(images)
        plain = images.as_subclass(Tensor)
        labels = self.as_labels(plain, labels)
        self.check(plain, labels)
        for part in transforms_in(self):
            part.last = {}
        self._seen.add(images.device)
        return plain, labels

    def check_replay(self) -> None:
        """Refuse settings with which :meth:`follow` cannot move a batch along a gradient.

        Example:
            >>> from ijsat_aug import JointSpaceAdv
            >>> JointSpaceAdv(eta=0, steps=3).check_replay()
            Traceback (most recent call last):
            ...
            ValueError: a replay moves batches once along the gradient ...: it needs steps=1.
        """
        raise TypeError(f"{type(self).__name__} has no attack that could follow a gradient.")

    def follow(
        self, images: Tensor, labels: Any, gradient: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """What :meth:`calm` gave, moved along a gradient that came from elsewhere."""
        self.check_replay()
        raise NotImplementedError

    def draw(self, images: Tensor, labels: Any) -> dict[str, Any] | None:
        """All that is random for one batch; None when the batch is left as it is.

        Example:
            >>> BatchTransform(torch.nn.Identity(), p=0).draw(torch.rand(2, 3, 4, 4), None)
        """
        return self._draw(images, labels, self.make_params)

    def _draw(
        self, images: Tensor, labels: Any, make: Callable[[Tensor, Any], dict[str, Any]]
    ) -> dict[str, Any] | None:
        index = self.choose_samples(images)
        if index is None:
            return make(images, labels)
        if len(index) == 0:
            return None
        some = pick(labels, index, len(images))
        return {"index": index, **make(images[index], some)}

    def choose_samples(self, images: Tensor, scores: Tensor | None = None) -> Tensor | None:
        """Which samples ``p`` and ``fraction`` choose, in order; None where it is all of them.

        Args:
            images: The batch.
            scores: ``(B,)``, of which the largest are chosen; by default it is chance.

        Example:
            >>> half = BatchTransform(torch.nn.Identity(), fraction=0.5)
            >>> half.choose_samples(torch.rand(4, 3, 2, 2), torch.tensor([1.0, 3.0, 0.0, 2.0]))
            tensor([1, 3])
        """
        count = len(images)
        if self.p < 1:
            for part in transforms_in(self):
                part.handle.check_alone("p=1, or every= of AugmentedLoader")
        share = self.fraction * count if self.random.chance(self.p) else 0
        chosen = max(1, round(share)) if share else 0
        if chosen == count > 0:
            return None
        if chosen == 0:
            return torch.empty(0, dtype=torch.long, device=images.device)
        if scores is None:
            scores = -self.random.uniform((count,), images.device)
        index: Tensor = scores.argsort(descending=True)[:chosen].sort().values
        return index

    def replay(self, images: Tensor, labels: Any, params: dict[str, Any]) -> tuple[Tensor, Any]:
        """The new batch, given what :meth:`draw` drew."""
        index = params.get("index")
        rest = {name: value for name, value in params.items() if name != "index"}
        count = len(images)
        some = (images, labels) if index is None else (images[index], pick(labels, index, count))
        new_images, new_labels = self.transform(*some, rest)
        images = images.detach()
        if self.mode == "append":
            return torch.cat([images, new_images]), _joined(labels, new_labels, count)
        if index is None:
            return new_images, new_labels
        self.last = spread(self.last, index, count)
        images = images.clone()
        images[index] = new_images
        return images, labels if new_labels is some[1] else labels.index_copy(0, index, new_labels)

    def check(self, images: Tensor, labels: Any) -> None:
        """Refuse a bad batch before anything runs; its labels are those of :meth:`as_labels`."""
        self.scale.check(images, values=self.careful(images))

    def as_labels(self, images: Tensor, labels: Any) -> Any:
        """The labels as they come out, whether or not a sample is transformed."""
        return labels

    def careful(self, images: Tensor) -> bool:
        """Whether to look at values too: always on the host, once on a device."""
        return images.device.type == "cpu" or images.device not in self._seen

    def make_params(self, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
        """All that is random for one batch."""
        raise NotImplementedError

    def transform(
        self, images: Tensor, labels: Tensor | None, params: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The new images and labels, given what :meth:`make_params` drew."""
        raise NotImplementedError

    def __copy__(self: Self) -> Self:
        # A module's own copy would share what it holds and has seen.
        twin = type(self).__new__(type(self))
        for name, value in vars(self).items():
            twin.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
        for name, part in self._modules.items():
            if isinstance(part, BatchTransform):
                twin._modules[name] = copy.copy(part)
        return twin

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        # Copied alone, it stays with the model that it had; so does what is bound to an object
        # that is not copied.
        stays = [] if memo else self._of_the_user()
        bound = [each for each in self._callables() if isinstance(each, MethodType)]
        stays += [each for each in bound if id(each.__self__) not in memo]
        memo.update((id(thing), thing) for thing in stays)
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(vars(self), memo))
        return twin

    def _of_the_user(self) -> list[Any]:
        """What is not this transform's own: models, and what asks them."""
        models = [part.model for part in transforms_in(self)]
        parts = [part for one in models if isinstance(one, nn.Module) for part in one.modules()]
        return [*models, *parts]

    def _callables(self) -> list[Any]:
        """The user's callables that may be bound to an object."""
        return [self.labels_getter]

    def extra_repr(self) -> str:
        """The settings that differ from their defaults."""
        kind = type(self.model).__name__ if self.model is not None else None
        settings = {
            "p": (self.p, 1.0),
            "fraction": (self.fraction, 1.0),
            "mode": (self.mode, "replace"),
            "mean": (self.scale.mean, None),
            "std": (self.scale.std, None),
            "model_mode": (self.handle.mode, "eval"),
            "amp_dtype": (self.handle.amp_dtype, None),
            "memory_format": (self.handle.memory_format, None),
        }
        changed = {name: value for name, (value, usual) in settings.items() if value != usual}
        return ", ".join(f"{name}={value}" for name, value in ({"model": kind} | changed).items())


def transforms_in(transform: nn.Module) -> list[BatchTransform]:
    """The transform, and the attack in it.

    Example:
        >>> from ijsat_aug import RobustMixup
        >>> [type(part).__name__ for part in transforms_in(RobustMixup(num_classes=3))]
        ['RobustMixup', 'JointSpaceAdv']
    """
    return [part for part in transform.modules() if isinstance(part, BatchTransform)]


def pick(labels: Any, index: Tensor, count: int) -> Any:
    """The labels of some of ``count`` samples.

    Example:
        >>> labels = {"kind": torch.tensor([3, 1, 4]), "path": ["a", "b", "c"]}
        >>> pick(labels, torch.tensor([0, 2]), 3)
        {'kind': tensor([3, 4]), 'path': ['a', 'c']}
    """
    return _each_label(
        lambda tensor: tensor[index], lambda samples: [samples[i] for i in index.tolist()],
        count, labels,
    )  # fmt: skip


def of_some(
    index: Tensor | None,
    move: Callable[[Tensor, Any, Tensor], tuple[Tensor, dict[str, Tensor]]],
    images: Tensor,
    labels: Any,
    gradient: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The images, some of which move along their gradient, and what is known of all.

    Args:
        index: Which; None is all of them.
        move: From some images, labels and gradients to the moved images and facts about them.
        images: The batch.
        labels: Of it.
        gradient: Of it.

    Example:
        >>> x = torch.zeros(3, 1)
        >>> up = lambda x, y, g: (x + g, {"pixel_norm": g[:, 0]})
        >>> moved, facts = of_some(torch.tensor([2]), up, x, None, torch.ones(3, 1))
        >>> moved.flatten(), facts
        (tensor([0., 0., 1.]), {'pixel_norm': tensor([0., 0., 1.])})
    """
    if index is None:
        return move(images, labels, gradient)
    count = len(images)
    if len(index) == 0:
        return images.detach(), {}
    moved, facts = move(images[index], pick(labels, index, count), gradient[index])
    whole = images.detach().clone()  # index_copy would lose its memory format
    whole[index] = moved
    return whole, spread(facts, index, count)


def spread(facts: Mapping[str, Tensor], index: Tensor, count: int) -> dict[str, Tensor]:
    """What is known of some of ``count`` samples, as of all of them.

    Example:
        >>> facts = {"loss": torch.tensor([2.0]), "pixel_norm": torch.tensor([0.1])}
        >>> spread(facts, torch.tensor([1]), 3)
        {'loss': tensor([nan, 2., nan]), 'pixel_norm': tensor([0.0000, 0.1000, 0.0000])}
    """
    whole = {}
    for name, fact in facts.items():
        whole[name] = fact.new_full((count, *fact.shape[1:]), _OF_OTHERS.get(name, 0))
        whole[name][index] = fact
    return whole


def _joined(labels: Any, new: Any, count: int) -> Any:
    """The labels of ``count`` samples, and those of the new ones behind them."""
    return _each_label(
        _cat, lambda *samples: [one for s in samples for one in s], count, labels, new
    )


def _cat(first: Tensor, *others: Tensor) -> Tensor:
    """One behind the other; a mask or boxes of torchvision stay what they are."""
    joined = torch.cat([first, *others]).as_subclass(Tensor)
    vision = sys.modules.get("torchvision.tv_tensors")  # where there are some, it is imported
    if vision is not None and isinstance(first, vision.TVTensor):
        return cast(Tensor, vision.wrap(joined, like=first))
    return joined.as_subclass(type(first))


def _each_label(
    of_tensors: Callable[..., Tensor], of_samples: Callable[..., list[Any]], count: int,
    *labels: Any,
) -> Any:  # fmt: skip
    """What becomes of labels of one structure: tensors, lists of one a sample, or several of them.

    What is none of these, such as the name of a dataset or weights of the classes, stays as it is.
    """
    first = labels[0]
    again = partial(_each_label, of_tensors, of_samples, count)
    if isinstance(first, Tensor):
        return of_tensors(*labels) if _one_each(first, count) else first
    if isinstance(first, np.ndarray):
        one_each = _one_each(first, count)
        return np.asarray(of_samples(*labels), first.dtype) if one_each else first
    if isinstance(first, Mapping):
        return {name: again(*(one[name] for one in labels)) for name in first}
    if not isinstance(first, (list, tuple)):
        return first
    if all(isinstance(f, Tensor) and _one_each(f, count) for f in first):
        return maker(first)([again(*fields) for fields in zip(*labels, strict=True)])
    of_each = type(first) in (list, tuple) and len(first) == count
    return type(first)(of_samples(*labels)) if of_each else first


def _one_each(array: Any, count: int) -> bool:
    """Whether a tensor or an array holds something for every sample."""
    return array.ndim > 0 and len(array) == count
