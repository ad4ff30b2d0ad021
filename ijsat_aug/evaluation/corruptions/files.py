"""Corrupted data sets on disk, in the layout of CIFAR-10-C, whoever made them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...flows.files import write_atomically
from .apply import CORRUPTIONS, FrostImages, as_pictures, check_choice, check_images, corrupt
from .severities import SEVERITIES, STANDARD

__all__ = ["CorruptionFiles"]

# Changes with what `corrupt` makes of the same images and seed.
_VERSION = 1


class CorruptionFiles:
    """A folder of ``<name>.npy``, severities 1 to 5 one after the other, and ``labels.npy``.

    Each file holds ``(5 N, H, W, C)`` uint8; grey ones may be ``(5 N, H, W)``. Folders that were
    written here say in ``corruptions.json`` of which images and seed; one without it, such as the
    official CIFAR-10-C, is read as it is and never written to.

    Args:
        folder: Made by the first :meth:`ensure`.

    Example:
        >>> images = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = CorruptionFiles(folder)
        ...     files.write(images, torch.arange(10), ["fog", "contrast"])
        ...     few, labels = files.read("fog", 3, 4, 6)
        ...     files.names, few.shape, labels
        (('fog', 'contrast'), torch.Size([2, 3, 8, 8]), tensor([4, 5]))
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    @property
    def names(self) -> tuple[str, ...]:
        """The corruptions that are there."""
        return tuple(name for name in CORRUPTIONS if self._path(name).exists())

    def write(
        self,
        images: Tensor,
        labels: Tensor,
        names: Sequence[str] = STANDARD,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        frost_images: FrostImages | None = None,
    ) -> None:
        """Write corruptions of a data set, unless they are there already.

        Args:
            images: ``(N, C, H, W)`` uint8, the whole data set.
            labels: ``(N,)`` classes.
            names: Some of ``CORRUPTIONS``.
            seed: As of :func:`corrupt`.
            device: As of :func:`corrupt`.
            frost_images: As of :func:`corrupt`.
        """
        for name in names:
            check_choice(name, seed=seed)
        check_images(images)
        if len(images) == 0 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"a data set needs images and one label for each, got {len(images)} images and "
                f"labels {tuple(labels.shape)}."
            )
        if self.foreign:
            for name in names:
                self._check_foreign(self._path(name), images, labels)
            return
        notes = _description(images, labels, seed)
        for name in names:
            if name == "frost":
                frost_images = None if frost_images is None else as_pictures(frost_images)
                notes["frost_images"] = None if frost_images is None else _digest(frost_images)
            self._note(notes)
            if not self._path("labels").exists():
                with _whole(self._path("labels"), labels, np.int64) as write:
                    for _ in SEVERITIES:
                        write(labels)
            if self._path(name).exists():
                continue
            with _whole(self._path(name), images, np.uint8) as write:
                for severity in SEVERITIES:
                    damaged = corrupt(
                        images, name, severity, seed=seed, device=device, frost_images=frost_images
                    )
                    write(damaged.permute(0, 2, 3, 1))

    def ensure(self, name: str, images: Tensor, labels: Tensor, **options: Any) -> None:
        """:meth:`write` one corruption."""
        self.write(images, labels, [name], **options)

    def read(
        self, name: str, severity: int, begin: int = 0, end: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images ``(n, C, H, W)`` uint8 and classes ``(n,)``, from ``begin`` to ``end``."""
        check_choice(name, severity)
        images, labels = _load(self._path(name)), _load(self._path("labels"))
        _check_layout(self._path(name), images)
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"{self.folder} has {len(images)} images of {name}, but labels of shape "
                f"{labels.shape}; there must be one for each."
            )
        count = len(images) // len(SEVERITIES)
        start, stop, _ = slice(begin, end).indices(count)
        part = slice((severity - 1) * count + start, (severity - 1) * count + max(start, stop))
        pixels = torch.from_numpy(np.array(images[part]))
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return pixels, torch.from_numpy(labels[part].astype(np.int64))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    @property
    def _notes(self) -> Path:
        return self.folder / "corruptions.json"

    @property
    def foreign(self) -> bool:
        """Whether it holds corruptions that were not written here."""
        return not self._notes.exists() and any(self.folder.glob("*.npy"))

    def _check_foreign(self, path: Path, images: Tensor, labels: Tensor) -> None:
        """Whether what others wrote could be of these images, or of more that follow them."""
        if not path.exists():
            raise ValueError(
                f"{self.folder} has no {path.name}, and what it has was not written here; choose "
                "another folder for it."
            )
        array = _load(path)
        _check_layout(path, array)
        shape = array.shape[1:] if array.ndim == 4 else (*array.shape[1:], 1)
        if shape != _layout(images)[1:] or len(array) < len(SEVERITIES) * len(images):
            raise ValueError(
                f"{path} holds {array.shape}, but the data set is {_layout(images)} at each "
                "severity; choose another folder."
            )
        if not np.array_equal(_load(self._path("labels"))[: len(labels)], labels.cpu().numpy()):
            raise ValueError(
                f"the labels in {self.folder} are not those of the data set; choose another folder."
            )

    def _note(self, notes: dict[str, Any]) -> None:
        """Compare what is to be written with what was, or say it for the first time."""
        known = json.loads(self._notes.read_text()) if self._notes.exists() else {}
        if not self._path("frost").exists():
            known.pop("frost_images", None)
        wrong = [word for word in notes if word in known and known[word] != notes[word]]
        if wrong:
            raise ValueError(
                f"{self.folder} was written with other {', '.join(wrong)}; choose another folder, "
                "or delete this one."
            )
        if known.keys() >= notes.keys():
            return
        text = json.dumps({**known, **notes}, indent=1) + "\n"
        write_atomically(self._notes, text.encode())


def _layout(images: Tensor) -> tuple[int, ...]:
    """Channels last, if there are any."""
    count, *rest = images.shape
    return (count, *rest[1:], *rest[:1])


@contextmanager
def _whole(path: Path, one: Tensor, dtype: type) -> Iterator[Callable[[Tensor], None]]:
    """What writes ``one`` at a severity after the other; the file is in its place when all is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".part", dir=path.parent)
    staged = Path(name)
    count, *rest = _layout(one)
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
        "shape": (len(SEVERITIES) * count, *rest),
    }  # fmt: skip
    try:
        with os.fdopen(handle, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            yield lambda part: part.cpu().numpy().astype(dtype, "C").tofile(file)
        staged.chmod(0o644)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _load(path: Path) -> NDArray[Any]:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; write it with CorruptionFiles.ensure.")
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _check_layout(path: Path, array: NDArray[Any]) -> None:
    channels = array.shape[3] if array.ndim == 4 else 1
    whole = array.ndim in (3, 4) and channels in (1, 3) and len(array) % len(SEVERITIES) == 0
    if array.dtype != np.uint8 or not whole:
        raise ValueError(
            f"{path} holds {array.dtype} {array.shape}; expected uint8 (5 N, H, W, C) with 1 or 3 "
            "channels, or (5 N, H, W)."
        )


def _description(images: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "seed": seed,
        "shape": list(_layout(images)),
        "images": _digest([images]),
        "labels": _digest([labels.long()]),
    }


def _digest(tensors: Iterable[Tensor]) -> str:
    """The sha256 of shapes and values."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(repr(tuple(tensor.shape)).encode())
        total.update(tensor.cpu().contiguous().numpy().data)
    return total.hexdigest()
