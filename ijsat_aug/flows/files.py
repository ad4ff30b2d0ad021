"""Files that are either whole or absent."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

__all__ = ["check_target", "write_atomically", "write_together"]


def check_target(path: Path) -> None:
    """Refuse a place where no file can be written, before the work that it is to hold.

    Example:
        >>> check_target(Path("a", "report.html"))
        >>> check_target(Path(__file__, "report.html"))
        Traceback (most recent call last):
        ...
        NotADirectoryError: ...files.py is a file, and cannot hold ...report.html; name another...
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it.")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir():
        raise NotADirectoryError(
            f"{place} is a file, and cannot hold {path.name}; name another place."
        )
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {place} is read-only to you.")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there: a reader never sees half of it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder, "a.txt"), b"whole")
        ...     Path(folder, "a.txt").read_bytes()
        b'whole'
    """
    write_together(path.parent, {path.name: data})


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files beside their places first, and only then move them there, in order.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_together(Path(folder), {"a": b"1", "b": b"2"})
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['a', 'b']
    """
    folder.mkdir(parents=True, exist_ok=True)
    staged: dict[Path, Path] = {}
    try:
        for name, data in files.items():
            temporary = folder / f".{name}.{secrets.token_hex(4)}"
            with temporary.open("xb") as file:  # with the permissions that the user's mask leaves
                staged[temporary] = folder / name
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for source, target in staged.items():
            source.replace(target)
    finally:
        for source in staged:
            source.unlink(missing_ok=True)
