"""Take a batch apart into images and labels, and put it together again as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["USUAL_LABELS", "LabelsGetter", "Parts", "geometry_in", "take_apart"]

LabelsGetter = Callable[[Any], Any] | str | None

_IMAGES = ("image", "images", "pixel_values", "img", "imgs", "input", "inputs", "x")
USUAL_LABELS = ("labels", "label", "targets", "target", "class", "y")
_GEOMETRY = ("mask", "masks", "box", "boxes", "bbox", "bboxes", "keypoints")
_TV_GEOMETRY = ("Mask", "BoundingBoxes", "KeyPoints")  # of torchvision, which need not be imported


@dataclass(frozen=True)
class Parts:
    """Images and labels of a batch, the way back, if it holds more, and has a place for labels.

    Example:
        >>> batch = {"image": "x", "kind": "y", "path": "p"}
        >>> parts = take_apart((batch,), labels_getter="kind")
        >>> parts.images, parts.labels, parts.rebuild("X", "Y")
        ('x', 'y', {'image': 'X', 'kind': 'Y', 'path': 'p'})
    """

    images: Any
    labels: Any
    rebuild: Callable[[Any, Any], Any]
    others: bool = False
    has_place: bool = False


def take_apart(batch: tuple[Any, ...], labels_getter: LabelsGetter) -> Parts:
    """The parts of ``transform(*batch)``.

    ``batch`` is ``(x,)``, ``(x, y, ...)``, one tuple or list of these, or one mapping.
    ``labels_getter`` is ``"default"`` (the second item, or a usual key), a key, a callable that
    gets the batch, or None for no labels.
    """
    if not batch:
        raise TypeError("a transform needs a batch: transform(images, labels).")
    if len(batch) > 1:
        return _sequence(batch, tuple, labels_getter)
    (only,) = batch
    if isinstance(only, Mapping):
        return _mapping(only, labels_getter)
    if isinstance(only, (tuple, list)) and only:
        return _sequence(only, maker(only), labels_getter)
    return Parts(only, None, lambda images, labels: images)


def geometry_in(batch: Any) -> list[str]:
    """The masks, boxes and keypoints of a batch, by key or type.

    Example:
        >>> geometry_in(({"image": "x", "mask": "m", "label": "y"},))
        ['mask']
    """
    if isinstance(batch, Mapping):
        named = {key: str(key) for key in batch if str(key).lower() in _GEOMETRY}
        rest = [value for key, value in batch.items() if key not in named]
        return [*named.values(), *geometry_in(rest)]
    if isinstance(batch, (tuple, list)):
        return [name for item in batch for name in geometry_in(item)]
    kind = type(batch).__name__
    return [kind] if kind in _TV_GEOMETRY else []


def _sequence(
    batch: tuple[Any, ...] | list[Any], make: Callable[[list[Any]], Any], getter: LabelsGetter
) -> Parts:
    second = batch[1] if len(batch) > 1 and _like_labels(batch[1]) else None
    whole = make(list(batch))
    labels = found = second if getter == "default" else _get(getter, whole)
    same = [i for i, item in enumerate(batch) if i and item is labels and item is not None]
    places = same[:1] if getter == "default" else same

    def rebuild(images: Any, labels: Any) -> Any:
        items = [images, *batch[1:]]
        for place in places:
            items[place] = labels
        if not places:
            _check_unchanged(found, labels)
        return make(items)

    return Parts(batch[0], labels, rebuild, others=len(batch) > 1, has_place=bool(places))


def _mapping(batch: Mapping[str, Any], getter: LabelsGetter) -> Parts:
    image_key = _image_key(batch)
    if getter == "default":
        key = _label_key(batch)
        labels = found = None if key is None else batch[key]
    else:
        key = getter if isinstance(getter, str) else None
        labels = found = _get(getter, batch)
    same = [k for k, v in batch.items() if v is labels and v is not None]
    label_keys = same if key is None else [key]

    def rebuild(images: Any, labels: Any) -> Any:
        news = {image_key: images}
        news |= dict.fromkeys(label_keys, labels)
        if not label_keys:
            _check_unchanged(found, labels)
        try:
            new = copy.copy(batch)
            for key, value in news.items():
                new[key] = value  # type: ignore[index]
        except TypeError:  # a read-only mapping
            return {**batch, **news}
        return new

    others, has_place = len(batch) > 1, bool(label_keys)
    return Parts(batch[image_key], labels, rebuild, others, has_place)


def _check_unchanged(found: Any, labels: Any) -> None:
    if labels is not found:
        raise ValueError(
            "there is no place for the new labels: labels_getter must return an item of the batch "
            "itself, not a copy or a part of one."
        )


def _image_key(batch: Mapping[str, Any]) -> str:
    lower = {str(key).lower(): key for key in batch}
    pictures = [k for k, v in batch.items() if isinstance(v, Tensor) and v.ndim == 4]
    named = [lower[name] for name in _IMAGES if name in lower]
    for candidates in ([k for k in named if k in pictures], named):
        if candidates:
            return candidates[0]
    if len(pictures) == 1:
        return pictures[0]
    raise ValueError(
        f"cannot tell the images among the keys {sorted(map(str, batch))}; name them one of "
        f"{', '.join(_IMAGES)}."
    )


def _label_key(batch: Mapping[str, Any]) -> str | None:
    lower = {str(key).lower(): key for key in batch}
    usual = [lower[name] for name in USUAL_LABELS if name in lower]
    return next((k for k in usual if _like_labels(batch[k])), None)


def _like_labels(item: Any) -> bool:
    """Tensors, and what somebody may have meant as labels: an error later, not silence."""
    if isinstance(item, Mapping):
        return _label_key(item) is not None
    numbers = isinstance(item, (list, tuple)) and all(isinstance(i, (int, float)) for i in item)
    return isinstance(item, (Tensor, np.ndarray, int, float)) or (numbers and len(item) > 0)


def _get(getter: LabelsGetter, batch: Any) -> Any:
    if getter is None:
        return None
    if callable(getter):
        return getter(batch)
    if isinstance(batch, Mapping) and getter in batch:
        return batch[getter]
    raise ValueError(f"the batch has no labels under {getter!r}; check labels_getter.")


def maker(batch: Any) -> Callable[[list[Any]], Any]:
    if hasattr(batch, "_make"):  # a named tuple
        return type(batch)._make  # type: ignore[no-any-return]
    return type(batch)
