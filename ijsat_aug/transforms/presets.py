"""What the transforms are set to for a purpose; docs/methods.md tells what each is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PRESETS", "find_preset"]

# Along the manifold and away from the model's own prediction.
_ALONG: Mapping[str, Any] = {"eps": 0, "target": "prediction"}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "accuracy": _ALONG,
    "fast": {**_ALONG, "fraction": 0.5},
    "corruptions": {"eps": 1 / 255, "target": "prediction", "fraction": 0.5},
    "robust": {"eps": 8 / 255, "steps": 7, "latent_steps": 2},
}


def find_preset(name: str) -> Mapping[str, Any]:
    """The settings of an attack, by the name of its purpose.

    Example:
        >>> find_preset("accuracy")
        {'eps': 0, 'target': 'prediction'}
    """
    if not isinstance(name, str):
        raise TypeError(
            f'the name of the preset comes first, as in preset("accuracy", model); got '
            f"{type(name).__name__}."
        )
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: there are {', '.join(PRESETS)}.")
    return PRESETS[name]
