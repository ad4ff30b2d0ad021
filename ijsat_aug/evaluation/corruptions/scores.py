"""One number for many corruptions: the mean corruption error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

__all__ = ["CorruptionScore", "corruption_score"]


class CorruptionScore(NamedTuple):
    """What a model made of corrupted images.

    Attributes:
        accuracy: Mean accuracy, in [0, 1].
        mce: Mean corruption error, in per cent.
        errors: The corruption error of each corruption, in per cent.

    Example:
        >>> CorruptionScore(0.75, 25.0, {"fog": 25.0}).mce
        25.0
    """

    accuracy: float
    mce: float
    errors: Mapping[str, float]


def corruption_score(
    accuracies: Mapping[str, Sequence[float]],
    baseline: Mapping[str, Sequence[float]] | None = None,
) -> CorruptionScore:
    """The mean over corruptions of the mean over severities of the error.

    With a baseline, each corruption's error is the ratio of the sums over its severities
    (Hendrycks and Dietterich, 2019, there of AlexNet). Published figures are of ``STANDARD``.

    Args:
        accuracies: Accuracies in [0, 1] at each severity, by corruption.
        baseline: Errors in [0, 1] of another model at each severity, by corruption.

    Example:
        >>> accuracies = {"fog": [0.9, 0.7], "snow": [0.8, 0.8]}
        >>> round(corruption_score(accuracies).mce, 6)
        20.0
        >>> score = corruption_score(accuracies, {"fog": [0.2, 0.2], "snow": [0.2, 0.6]})
        >>> round(score.mce, 6), round(score.errors["snow"], 6)
        (75.0, 50.0)
    """
    _check(accuracies, "accuracies")
    if baseline is not None:
        _check(baseline, "baseline")
        unlike = [n for n in accuracies if len(baseline.get(n, ())) != len(accuracies[n])]
        if unlike:
            raise ValueError(f"the baseline needs as many errors as accuracies of {unlike}.")
    errors = {}
    for name, values in accuracies.items():
        reference = len(values) if baseline is None else sum(baseline[name])
        if reference == 0:
            raise ValueError(
                f"the baseline makes no error on {name}: nothing can be relative to it."
            )
        errors[name] = 100 * sum(1 - value for value in values) / reference
    accuracy = fmean(fmean(values) for values in accuracies.values())
    return CorruptionScore(accuracy, fmean(errors.values()), errors)


def _check(values: Mapping[str, Sequence[float]], word: str) -> None:
    if not values or not all(len(v) and min(v) >= 0 and max(v) <= 1 for v in values.values()):
        raise ValueError(f"{word} must have values in [0, 1] at each severity of each corruption.")
