"""Where checkpoints come from: inside the wheel, the cache, a URL, or the Hugging Face hub."""

from __future__ import annotations

import difflib
import hashlib
import http.client
import json
import os
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

from .files import write_atomically

__all__ = ["CheckpointError", "cache_home", "image_sizes", "list_flows", "locate"]

_FILES = ("config.json", "README.md", "model.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not what it says it is."""


def cache_home() -> Path:
    """The folder for fetched checkpoints: ``IJSAT_HOME``, or the platform's cache folder.

    Example:
        >>> import os
        >>> os.environ["IJSAT_HOME"] = "/tmp/flows"
        >>> str(cache_home())
        '/tmp/flows'
        >>> del os.environ["IJSAT_HOME"]
    """
    if home := os.environ.get("IJSAT_HOME"):
        return Path(home).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("ijsat_aug", appauthor=False))


def list_flows() -> list[str]:
    """Names that :func:`ijsat_aug.load_flow` knows.

    Example:
        >>> "digits" in list_flows()
        True
    """
    return sorted(_registry())


def is_ours(name: str, sha256: str) -> bool:
    """Whether weights with this sum are those that a name stands for.

    Example:
        >>> is_ours("digits", "0" * 64), is_ours("mine", "0" * 64)
        (False, False)
    """
    return _registry().get(name, {}).get("model.safetensors") == sha256


def image_sizes() -> dict[str, str]:
    """The images that each flow takes.

    Example:
        >>> image_sizes()["digits"]
        '1x8x8'
    """
    return {name: _registry()[name]["shape"] for name in list_flows()}


def locate(source: str | Path, revision: str | None) -> tuple[Path, dict[str, str]]:
    """The local folder of a checkpoint, fetched when needed, and the known sha256 of its files."""
    text = os.fspath(source)
    path = Path(text).expanduser()
    named = isinstance(source, str) and text in _registry()
    local = named or path.is_dir()
    if not named and path.is_file():
        raise CheckpointError(
            f"{text} is a file, and a flow a folder of several: name {path.parent}, if that is one."
        )
    on_hub = not local and isinstance(source, str) and _like_hub_id(text)
    if revision is not None and not on_hub:
        raise ValueError(
            f"revision={revision!r} is for Hugging Face repositories, and {text!r} is none; for "
            "a file that must not change give sha256=..."
        )
    if named:
        return _named(text), _registry()[text]
    if local:
        return path, {}
    if on_hub:
        return _from_hub(text, revision, ""), {}
    if isinstance(source, Path) and text in list_flows():
        raise CheckpointError(
            f"there is no folder {text}; the flow of that name is {text!r}, a str."
        )
    near = difflib.get_close_matches(text, list_flows(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise CheckpointError(
        f"there is no flow {text!r}: it is neither a folder, nor 'owner/name' on the Hugging Face "
        f"hub, nor one of {list_flows()}.{hint}"
    )


def _like_hub_id(text: str) -> bool:
    owner, _, name = text.partition("/")
    plain = bool(owner and name) and "/" not in name and not text.startswith((".", "~"))
    return plain and not Path(owner).is_dir()  # a slip in the name of a folder


@cache
def _registry() -> dict[str, dict[str, str]]:
    file = _pretrained() / "registry.json"
    registry: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return registry


def _pretrained() -> Path:
    """``pretrained/`` of the wheel, or of the source tree."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "pretrained"
    return inside if inside.is_dir() else package.parent / "pretrained"


def _named(name: str) -> Path:
    shipped = _pretrained() / name
    if (shipped / "model.safetensors").is_file():
        return shipped
    checksums = _registry()[name]
    folder = cache_home() / name / checksums["model.safetensors"][:16]
    if all((folder / file).is_file() for file in _FILES):
        return folder
    base = os.environ.get("IJSAT_URL", "").rstrip("/")
    if not base:
        raise CheckpointError(
            f"flow {name!r} is not part of this installation; set IJSAT_URL to a place that has it "
            f"(https://..., file://... or hf://owner/repository), or copy its folder to {folder}."
        )
    if base.startswith("hf://"):
        owner_name, _, revision = base.removeprefix("hf://").partition("@")
        return _from_hub(owner_name, revision or None, f"{name}/")
    for file in _FILES:  # the weights last: they complete the folder
        _download(f"{base}/{name}/{file}", folder / file, checksums[file])
    return folder


def _download(url: str, target: Path, sha256: str) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data: bytes = response.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CheckpointError(f"cannot fetch {url} ({error}); check IJSAT_URL.") from error
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise CheckpointError(
            f"{url} is damaged or another file: its sha256 is {actual[:12]}…, the registry asks "
            f"for {sha256[:12]}…; nothing was kept."
        )
    try:
        write_atomically(target, data)
    except OSError as error:
        raise CheckpointError(
            f"cannot keep {url} in {target.parent} ({error}): set IJSAT_HOME to another folder."
        ) from error


def _from_hub(repository: str, revision: str | None, prefix: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{repository!r} lies on the Hugging Face hub; to fetch it: "
            'pip install "ijsat-aug[hub]".'
        ) from error
    options: dict[str, Any] = {"cache_dir": cache_home() / "hub", "revision": revision}
    try:
        paths = [
            Path(huggingface_hub.hf_hub_download(repository, f"{prefix}{file}", **options))
            for file in _FILES
        ]
    except Exception as error:  # the hub client raises errors of several libraries
        raise CheckpointError(
            f"cannot fetch {repository!r} from the Hugging Face hub, and there is no such folder: "
            f"{_first_line(error)}"
        ) from error
    return paths[0].parent


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
