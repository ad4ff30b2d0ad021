"""What settings may be, and what they are by default, wherever several transforms have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["check_choices", "usual_step"]


def check_choices(settings: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Words that are among those that are known.

    Example:
        >>> from types import SimpleNamespace
        >>> check_choices(SimpleNamespace(norm="l1"), {"norm": ("linf", "l2")})
        Traceback (most recent call last):
        ...
        ValueError: norm must be one of "linf", "l2"; got 'l1'.
    """
    for name, allowed in choices.items():
        value = getattr(settings, name)
        if value not in allowed:
            known = ", ".join(f'"{a}"' for a in allowed)
            raise ValueError(f"{name} must be one of {known}; got {value!r}.")


def usual_step(moves: int) -> float:
    """The size of one of so many moves, as a share of the radius that they have.

    Example:
        >>> usual_step(1), usual_step(10)
        (1.25, 0.25)
    """
    return min(1.25, 2.5 / max(moves, 1))
