"""Rewrite pretrained/registry.json from the folders beside it.

Run:  python benchmarks/register.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
FILES = ("config.json", "README.md", "model.safetensors")


def checksums() -> dict[str, dict[str, str]]:
    """Name -> shape of the images, and file -> sha256, of every checkpoint in ``pretrained/``."""
    folders = sorted(path.parent for path in PRETRAINED.glob("*/model.safetensors"))
    return {folder.name: _entry(folder) for folder in folders}


def _entry(folder: Path) -> dict[str, str]:
    shape = json.loads((folder / "config.json").read_text())["architecture"]["shape"]
    files = {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in FILES}
    return {"shape": "x".join(map(str, shape)), **files}


if __name__ == "__main__":
    path = PRETRAINED / "registry.json"
    path.write_text(json.dumps(checksums(), indent=1) + "\n")
    print(path.read_text())
