"""Training images for a flow, from wherever they are, as one uint8 tensor."""

from __future__ import annotations

import inspect
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ImageData", "load_images"]

_GREY = {"1", "L"}  # modes of Pillow
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True)
class ImageData:
    """Integer grey levels ``(N, C, H, W)`` below ``bins``, and labels when there are any.

    Example:
        >>> data = ImageData(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), None, 256, "black")
        >>> [len(part.images) for part in data.split(0.2)]
        [8, 2]
    """

    images: Tensor
    labels: Tensor | None
    bins: int
    name: str
    classes: tuple[str, ...] | None = None

    @property
    def pixels(self) -> Tensor:
        """The images as floats in [0, 1]."""
        return self.images.float() / (self.bins - 1)

    def split(self, held_out: float, seed: int = 0) -> tuple[ImageData, ImageData]:
        """A random training part and a held-out part, the same for the same seed."""
        count = len(self.images)
        test = min(max(1, round(held_out * count)), count - 1)
        order = torch.randperm(
            count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
        )
        return self.take(order[test:]), self.take(order[:test])

    def first(self, count: int) -> ImageData:
        """So many of them at most."""
        return self.take(slice(count))

    def take(self, index: Tensor | slice) -> ImageData:
        """The images (and labels) at an index."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, images=self.images[index], labels=labels)

    def spaced(self, count: int) -> ImageData:
        """So many of them at most, evenly spaced, as a folder is sorted by class."""
        return self.take(evenly_spaced(len(self.images), count))


def evenly_spaced(whole: int, count: int) -> Tensor:
    """The places of so many at most of a whole, from its first to its last.

    Example:
        >>> evenly_spaced(9, 3), evenly_spaced(2, 5)
        (tensor([0, 4, 8]), tensor([0, 1]))
    """
    return torch.linspace(0, whole - 1, min(count, whole), device="cpu").round().long()


def load_images(
    source: str | Path,
    *,
    size: int | None = None,
    root: str | Path | None = None,
    train: bool = True,
    pick: Callable[[int], Tensor] | None = None,
) -> ImageData:
    """Load images for the flow trainer.

    Args:
        source: ``"digits"`` (scikit-learn's), an ``.npy`` or ``.npz`` file, a folder of images
            (class sub-folders become labels), or the name of a torchvision dataset such as
            ``"CIFAR10"``.
        size: Resize the shorter side and crop the centre; needed for a folder of mixed sizes.
        root: Where the torchvision dataset lies; it is downloaded there when it is missing.
        train: The training split of a torchvision dataset, or of the digits (1500 of 1797).
        pick: From how many pictures a folder holds to the places of those that are read, as there
            may be more than fit into memory; not for other sources.

    Example:
        >>> digits = load_images("digits")
        >>> digits.images.shape, digits.bins
        (torch.Size([1500, 1, 8, 8]), 17)
    """
    path = Path(source).expanduser()
    if pick is not None and not is_folder(source):
        raise ValueError(f"pick is for folders of pictures, and {source} is none.")
    if is_folder(source):
        data = _from_folder(path, size, pick)
    elif source == "digits":
        data = _digits(train)
    elif path.suffix in {".npy", ".npz"}:
        data = _from_array(path)
    else:
        data = _from_torchvision(str(source), root, train, size)
    if size is not None and data.images.shape[2:] != (size, size):
        data = replace(data, images=_resize(data.images, size))
    if len(data.images) == 0:
        raise ValueError(f"{source} holds no images.")
    return data


def is_folder(source: str | Path) -> bool:
    """Whether it names a folder; one that is called digits is "./digits".

    Example:
        >>> is_folder("."), is_folder("digits")
        (True, False)
    """
    return source != "digits" and Path(source).expanduser().is_dir()


def _digits(train: bool) -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('"digits" needs scikit-learn: pip install "ijsat-aug[demo]".') from error
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    everything = ImageData(
        images, torch.from_numpy(digits.target).long(), 17, "scikit-learn's digits"
    )
    training, test = everything.split(297 / 1797)
    return training if train else test


def _from_array(path: Path) -> ImageData:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        images, found = _arrays(path)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
        # numpy's own words advise to unpickle
        raise ValueError(
            f"{path} is damaged, or holds objects, which are never unpickled (allow_pickle=False): "
            "save arrays of numbers."
        ) from None
    if images is None:
        raise ValueError(f"{path} holds no array 'images': save them under that name.")
    labels = None
    if found is not None:
        if found.dtype.kind not in "iub":
            raise TypeError(f"{path} holds labels of {found.dtype}; save class numbers.")
        if found.size and found.min() < 0:
            raise ValueError(f"{path} holds labels below 0; save class numbers from 0 on.")
        labels = torch.from_numpy(found.astype(np.int64)).flatten()
        if len(labels) != len(images):
            raise ValueError(f"{path} holds {len(images)} images but {len(labels)} labels.")
    return ImageData(_channels_first(images, path), labels, 256, path.name)


def _arrays(path: Path) -> tuple[Any, Any]:
    """The images and the labels of a file; None for what it does not hold."""
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded, None
    with loaded:
        labelled = ("labels", "y", "targets")
        others = [name for name in loaded.files if name not in labelled]
        alone = others if len(others) == 1 else ()  # of several, who knows which
        wanted = (("images", "x", "data", *alone), labelled)
        names = (next((n for n in one if n in loaded.files), None) for one in wanted)
        images, labels = (None if name is None else loaded[name] for name in names)
    return images, labels


def _channels_first(images: np.ndarray[Any, Any], path: Path | str) -> Tensor:
    if images.dtype != np.uint8:
        raise TypeError(f"{path} holds {images.dtype}; save the images as uint8, 0..255.")
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    if tensor.ndim == 3:
        tensor = tensor[:, None]
    elif tensor.ndim == 4 and tensor.shape[1] > 4 >= tensor.shape[3]:
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.ndim != 4 or tensor.shape[1] > 4:
        raise ValueError(
            f"{path} has shape {tuple(images.shape)}; expected (N, H, W), (N, H, W, C) or "
            "(N, C, H, W) with at most 4 channels."
        )
    return tensor.contiguous()


def _pictures_in(folder: Path) -> list[Path]:
    """In folders that are links too, as torchvision follows them."""
    return sorted(Path(path) for path in _found_in(folder, frozenset()))


def _found_in(folder: str | Path, above: frozenset[str]) -> Iterator[str]:
    """Not ._cat.png of macOS, nor .ipynb_checkpoints/cat.png of Jupyter, nor a link upwards."""
    above |= {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in seen:
        if entry.is_dir():
            if not (entry.is_symlink() and os.path.realpath(entry.path) in above):
                yield from _found_in(entry.path, above)
        elif Path(entry.name).suffix.lower() in _SUFFIXES:
            yield entry.path


def outside_classes(source: str | Path) -> Path | None:
    """The first picture that keeps a folder from being one of labelled images.

    Example:
        >>> outside_classes("digits") is None
        True
    """
    folder = Path(source).expanduser()
    found = _pictures_in(folder) if is_folder(source) else []
    return next((f for f in found if f.parent == folder), None)


def tell_order(classes: Sequence[str]) -> None:
    """Say in which order numbers are classes, where there are two.

    Example:
        >>> tell_order(["cat", "dog"])
    """
    if all(name.isdecimal() for name in classes) and [*classes] != sorted(classes, key=int):
        warnings.warn(
            f"The folders of classes are taken as text, {', '.join(classes[:4])}, ..., as "
            "torchvision's ImageFolder does: if the model counts otherwise, give their numbers "
            "leading zeros.",
            stacklevel=3,
        )


def _from_folder(folder: Path, size: int | None, pick: Callable[[int], Tensor] | None) -> ImageData:
    from PIL import Image

    files = _pictures_in(folder)
    if not files:
        raise ValueError(f"{folder} holds no image ({', '.join(sorted(_SUFFIXES))}).")

    classes = None
    names = [f.relative_to(folder).parts[0] for f in files if f.parent != folder]
    labels = None
    if len(names) == len(files):
        classes = tuple(sorted(set(names)))
        labels = torch.tensor([classes.index(name) for name in names], device="cpu")
    picked = files
    if pick is not None:
        places = pick(len(files))
        picked = [files[i] for i in places.tolist()]
        labels = None if labels is None else labels[places]

    def pictures() -> Iterator[tuple[Any, Path]]:
        for file in picked:
            try:
                with Image.open(file) as picture:
                    picture.load()
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(
                    f"{file} cannot be read as a picture ({error}): mend it, or take it away."
                ) from error
            yield picture, file

    images = _stack(pictures(), size, folder)
    if images.shape[1] == 1 and len(picked) < len(files) and any(map(_is_coloured, files)):
        images = images.repeat(1, 3, 1, 1)
    return ImageData(images, labels, 256, folder.name, classes)


def _is_coloured(file: Path) -> bool:
    """What its header says; one that cannot be read says nothing."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return picture.mode not in _GREY
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _from_torchvision(
    name: str, root: str | Path | None, train: bool, size: int | None
) -> ImageData:
    from torchvision import datasets

    kind: Callable[..., Any] | None = getattr(datasets, name, None)
    if Path(name).suffix.lower() in _SUFFIXES and Path(name).is_file():
        raise ValueError(f"{name} is a single picture; name the folder of several.")
    if kind is None or not isinstance(kind, type):
        raise ValueError(
            f"{name!r} is neither a file or folder that exists, nor 'digits', nor a dataset of "
            "torchvision; check the spelling or the path."
        )
    if root is None:
        raise ValueError(
            f"say where torchvision's {name} lies or may be downloaded to: root=..., or --root."
        )
    known = inspect.signature(kind).parameters
    # Of those with **kwargs some hand it on.
    bases = kind.__mro__ if "kwargs" in known else (kind,)
    loads = any("download" in inspect.signature(base).parameters for base in bases)
    options: dict[str, Any] = {"download": True} if loads else {}
    if "train" in known:
        options["train"] = train
    elif "split" not in known and not train:
        raise ValueError(f"torchvision's {name} has no test split; give other images as test.")
    by_split = "split" in known and "train" not in known
    try:
        with _one_at_a_time(Path(root).expanduser()) if loads else nullcontext():
            dataset = _split(kind, root, options, train) if by_split else kind(root, **options)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name} is not in {root}, and cannot be downloaded: {error}.") from error
    targets: list[Any] = []

    def pictures() -> Iterator[tuple[Any, str]]:
        for i in range(len(dataset)):
            picture, target = dataset[i][:2]
            targets.append(target)
            yield picture, f"number {i} of {name}"

    images = _stack(pictures(), size, name)
    whole = all(isinstance(target, int) for target in targets)
    labels = torch.tensor(targets, device="cpu") if whole else None
    return ImageData(images, labels, 256, f"torchvision {name}")


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Processes that were launched together would download to the same files."""
    with ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from filelock import FileLock

            # Where no file can be locked, such as in a folder of somebody else's, data may lie.
            with suppress(OSError, NotImplementedError):
                root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(root / ".ijsat-aug.lock"))
        yield


def _split(
    kind: Callable[..., Any], root: str | Path, options: Mapping[str, Any], train: bool
) -> Any:
    """The training or the test split of a dataset, by the first usual name that it knows."""
    refused: ValueError | None = None
    for split in ("train", "trainval") if train else ("test", "val"):
        try:
            return kind(root, split=split, **options)
        except ValueError as error:
            refused = refused or error
    raise ValueError(
        f"torchvision's {kind.__name__} cannot be loaded by its name alone ({refused}): save its "
        "images as a folder or an .npz file."
    ) from refused


def _resize(images: Tensor, size: int) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    resized: Tensor = F.center_crop(F.resize(images, [size], antialias=True), [size, size])
    return resized


def _stack(
    pictures: Iterable[tuple[Any, Path | str]], size: int | None, source: Path | str
) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    tensors: list[Tensor] = []
    for picture, name in pictures:
        if picture.mode.startswith(("I", "F")):
            raise ValueError(
                f"{name} is a picture of more than 8 bits (mode {picture.mode}); convert it to 8 "
                "bits first."
            )
        grey = picture.mode in _GREY
        tensor = F.pil_to_tensor(picture.convert("L" if grey else "RGB"))
        tensors.append(tensor if size is None else _resize(tensor, size))
    if any(t.shape[0] == 3 for t in tensors):
        tensors = [t.expand(3, -1, -1) for t in tensors]
    if len({t.shape for t in tensors}) > 1:
        raise ValueError(f"the images of {source} differ in size; give one (size=, --size).")
    return torch.stack(tensors)
