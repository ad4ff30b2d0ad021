"""Numbers as people write them."""

from __future__ import annotations

__all__ = ["number"]


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
