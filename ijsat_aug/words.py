"""Numbers, as people write them and as settings need them."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

__all__ = ["check_count", "is_between", "number"]


def number(text: str, kind: str = "number") -> float:
    """A number, or a share such as 8/255.

    Args:
        text: As it was written.
        kind: What it should have been, for the message.

    Example:
        >>> number("0.5"), number("51/255")
        (0.5, 0.2)
    """
    top, _, bottom = text.partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{text!r} is no {kind}; write for example 0.03 or 8/255.") from error


def check_count(name: str, value: int, least: int) -> None:
    """A whole number, and not too small.

    Example:
        >>> check_count("steps", 1.5, 0)
        Traceback (most recent call last):
        ...
        ValueError: steps must be an integer >= 0, got 1.5.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")


def is_between(value: Any, least: float, most: float = math.inf) -> bool:
    """Whether it is a number, a finite one, of this range.

    Example:
        >>> is_between(0.5, 0, 1), is_between("0.5", 0, 1), is_between(math.inf, 0)
        (True, False, False)
    """
    return isinstance(value, Real) and math.isfinite(value) and least <= float(value) <= most
