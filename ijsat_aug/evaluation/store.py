"""A folder with one file for each finished threat: an evaluation that was stopped goes on there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..flows.files import check_target, write_atomically
from .report import Entry, Result, read_result

__all__ = ["Store", "fingerprint"]

_SETTINGS = "settings.json"


class Store:
    """Results on disk, which are only reused with the same model, data and settings.

    Args:
        folder: Made when it is missing; None keeps nothing.
        settings: What the results depend on, as JSON takes it.
        overwrite: Forget what is there.

    Example:
        >>> import tempfile
        >>> clean = Result("clean", "clean", "clean", "", 0, "", "1110")
        >>> with tempfile.TemporaryDirectory() as place:
        ...     Store(place, {"seed": 0}).put(clean)
        ...     Store(place, {"seed": 0}).get(clean) == clean
        True
    """

    def __init__(
        self, folder: str | Path | None, settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is None:
            return
        place = self.folder / _SETTINGS
        check_target(place)
        before = None if overwrite else _settings(place)
        wanted = json.loads(json.dumps(dict(settings)))
        # The same model may answer a little differently, as on another machine.
        if before is not None and _alike(before.get("logits"), wanted.get("logits")):
            wanted["logits"] = before["logits"]
        if before is not None and before != wanted:
            other = [k for k in {*before, *wanted} if before.get(k) != wanted.get(k)]
            other = sorted({"model" if k in ("logits", "parts") else k for k in other})
            raise ValueError(
                f"{self.folder} holds results of another {', '.join(other)}: choose another "
                "folder, or pass overwrite=True (--overwrite)."
            )
        old = list(self.folder.glob("result-*-????????.json"))
        if before is None and old and not overwrite:
            raise ValueError(
                f"{self.folder} holds results, and no {_SETTINGS} that tells of what: choose "
                "another folder, or pass overwrite=True (--overwrite)."
            )
        for file in old if overwrite else ():
            file.unlink()
        if before != wanted:
            write_atomically(place, (json.dumps(wanted, indent=1) + "\n").encode())

    def get(self, entry: Entry) -> Result | None:
        """The result of a threat with this budget, if there is one that is whole."""
        file = self._file(entry)
        if file is None or not file.is_file():
            return None
        try:
            return read_result(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def put(self, result: Result) -> None:
        """Keep a result."""
        file = self._file(result)
        if file is not None:
            write_atomically(file, json.dumps(asdict(result)).encode())

    def _file(self, entry: Entry) -> Path | None:
        if self.folder is None:
            return None
        # The reference tells the files that a corruption comes from, and your threats from ours.
        words = f"{entry.name}-{entry.budget}-{entry.steps}-{entry.reference}"
        plain = "".join(c if c.isalnum() else "-" for c in entry.name)
        return self.folder / f"result-{plain}-{hashlib.sha256(words.encode()).hexdigest()[:8]}.json"


def _settings(place: Path) -> dict[str, Any] | None:
    """What the results in a folder were made with, if there are any."""
    if not place.is_file():
        return None
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{place} is damaged: choose another folder, or pass overwrite=True (--overwrite)."
        )
    return found


def _alike(before: list[float] | None, now: list[float] | None) -> bool:
    if before is None or now is None or len(before) != len(now):
        return False
    within = 0.01 * max(map(abs, before), default=0.0)
    return all(abs(b - n) <= within for b, n in zip(before, now, strict=True))


def fingerprint(*things: Any) -> str:
    """A short sum of tensors, modules, dataclasses and plain values, which tells if they changed.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> before = fingerprint(model)
        >>> _ = torch.nn.init.ones_(model.bias)
        >>> fingerprint(model) == before, len(before)
        (False, 16)
    """
    summed = hashlib.sha256()
    for thing in things:
        for part in _parts(thing):
            summed.update(part)
    return summed.hexdigest()[:16]


def _parts(thing: Any, name: str = "tensor", depth: int = 5) -> Iterator[bytes]:
    import torch

    if isinstance(thing, torch.Tensor):
        yield f"{name}{tuple(thing.shape)}{thing.dtype}".encode()
        flat = thing.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(thing, torch.nn.Module):
        for key, tensor in thing.state_dict().items():
            yield from _parts(tensor, key)
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from _parts(getattr(thing, field.name), field.name)
    elif isinstance(thing, np.ndarray):
        yield f"{name}{thing.shape}{thing.dtype}".encode()
        yield np.ascontiguousarray(thing).tobytes()
    elif isinstance(thing, (tuple, list)) and depth:
        for number, part in enumerate(thing):
            yield from _parts(part, str(number), depth - 1)
    elif isinstance(thing, dict) and depth:
        for key, part in thing.items():
            yield from _parts(part, str(key), depth - 1)
    elif depth and repr(thing) == object.__repr__(thing) and hasattr(thing, "__dict__"):
        yield type(thing).__qualname__.encode()  # not the repr, which is a place in memory
        for key, value in vars(thing).items():
            yield from _parts(value, key, depth - 1)
    else:
        yield (getattr(thing, "__qualname__", None) or repr(thing)).encode()
