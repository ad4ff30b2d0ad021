"""What the transforms are set to for a purpose; docs/methods.md tells what each is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

__all__ = ["PRESETS", "Preset", "find_preset"]


class Preset(NamedTuple):
    """Settings of the attack, and whether it takes the place of the batch."""

    attack: Mapping[str, Any]
    mode: Literal["replace", "append"] = "replace"


# Along the manifold and away from the model's own prediction.
_ALONG: Mapping[str, Any] = {"eps": 0, "target": "prediction"}

PRESETS: Mapping[str, Preset] = {
    "accuracy": Preset(_ALONG),
    "fast": Preset({**_ALONG, "fraction": 0.5}),
    "corruptions": Preset({"eps": 2 / 255}, mode="append"),
    "robust": Preset({"eps": 8 / 255, "steps": 7, "latent_steps": 2}),
}


def find_preset(name: str) -> Preset:
    """The settings of that name.

    Example:
        >>> find_preset("accuracy").attack
        {'eps': 0, 'target': 'prediction'}
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: there are {', '.join(PRESETS)}.")
    return PRESETS[name]
