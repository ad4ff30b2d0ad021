"""The report as rows: what the terminal, Markdown and HTML show alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from .corruptions.scores import corruption_score
from .report import Kind, Report, Result, Share

__all__ = ["Row", "check_same_images", "rows"]

_HEADINGS: tuple[tuple[Kind, str], ...] = (
    ("clean", "Clean"),
    ("lp", "Bounded in pixels"),
    ("manifold", "On the manifold"),
    ("unseen", "Unseen threats"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        part: Of the table, for a heading.
        title: What was done to the images.
        budget: How far.
        steps: Of the attack, or nothing.
        accuracy: With its 95 % interval; of the mean of corruptions the value alone.
        change: Against another report on the same images, with its 95 % interval.
        source: Reference.
        strong: Whether it sums up the rows before.

    Example:
        >>> row = Row("Clean", "clean", "", "", Share(0.75, 0.4, 0.9))
        >>> row.percent, row.interval
        ('75.0', '40.0 – 90.0')
    """

    part: str
    title: str
    budget: str
    steps: str
    accuracy: Share
    change: Share | None = None
    source: str = ""
    strong: bool = False

    @property
    def percent(self) -> str:
        """The accuracy in percent."""
        return f"{100 * self.accuracy.value:.1f}"

    @property
    def interval(self) -> str:
        """Its interval, where there is one."""
        _, low, high = self.accuracy
        return "" if math.isnan(low) else f"{100 * low:.1f} – {100 * high:.1f}"

    @property
    def difference(self) -> str:
        """The change in points, and how far its interval goes, on its longer side."""
        if self.change is None:
            return ""
        value, low, high = (100 * v for v in self.change)
        half = "" if math.isnan(low) else f" ± {max(high - value, value - low):.1f}"
        return f"{value:+.1f}{half}"


def rows(report: Report, against: Report | None = None) -> list[Row]:
    """The table, from clean images to corruptions.

    Args:
        report: What was found.
        against: Of another model on the same images: adds the change.

    Example:
        >>> clean = Result("clean", "clean", "clean", "", 0, "", "1110")
        >>> linf = Result("linf", "PGD L∞", "lp", "8/255", 50, "", "1010")
        >>> found = Report({}, {"clean": clean, "linf": linf})
        >>> [(row.title, row.percent) for row in rows(found)]
        [('clean', '75.0'), ('PGD L∞', '50.0'), ('worst case of 1 attack', '50.0')]
    """
    if against is not None:
        check_same_images(report.settings.get("data"), against)
    found = []
    for kind, part in _HEADINGS:
        results = report.of_kind(kind)
        found += [_row(part, result, report, against) for result in results]
        if kind == "unseen" and len(results) > 1:
            found.append(_union(report, against, part, "worst case of the unseen", "unseen"))
    attacks = report.attacks()
    if attacks:
        count = f"{len(attacks)} attack" + "s" * (len(attacks) > 1)
        found.append(_union(report, against, "Altogether", f"worst case of {count}"))
    return found + _corruptions(report, against)


def _row(part: str, result: Result, report: Report, against: Report | None) -> Row:
    other = _same(result, report, against)
    change = None if other is None else _paired([result.correct], [other.correct])
    steps = str(result.steps) if result.steps else ""
    return Row(part, result.title, result.budget, steps, result.accuracy, change, result.reference)


def _union(report: Report, against: Report | None, part: str, title: str, *kinds: Kind) -> Row:
    results = report.attacks(*kinds)
    names = [result.name for result in results]
    change = None
    if against is not None and all(_same(result, report, against) for result in results):
        change = _paired([report.worst(names)], [against.worst(names)])
    return Row(part, title, "", "", report.union(*kinds), change, strong=True)


def _corruptions(report: Report, against: Report | None) -> list[Row]:
    part = "Corruptions (mean of the severities)"
    groups = report.by_corruption()
    if not groups:
        return []
    if against is not None and report.settings.get("seed") != against.settings.get("seed"):
        against = None  # other noise
    found = []
    for group in groups.values():
        ours = [r.correct for r in group]
        theirs = [other.correct for r in group if (other := _same(r, report, against))]
        change = _paired(ours, theirs) if len(theirs) == len(ours) else None
        share = _clustered(ours)
        found.append(Row(part, group[0].title, f"{len(group)} severities", "", share, change))
    score = corruption_score({n: [r.accuracy.value for r in g] for n, g in groups.items()})
    mean = Share(score.accuracy, math.nan, math.nan)
    changes = [row.change.value for row in found if row.change is not None]
    change = None
    if len(changes) == len(found):
        change = Share(fmean(changes), math.nan, math.nan)
    title = f"mean of {len(found)} (mCE {score.mce:.1f})"
    return [*found, Row(part, title, "", "", mean, change, strong=True)]


def _clustered(lines: list[str]) -> Share:
    """A share whose interval counts images, not their five severities.

    It is the interval of Agresti and Coull (1998), of four images more, two right and two wrong.
    """
    means = _means(lines)
    low, high = _interval(means, more=4, total=2, squares=2)
    return Share(fmean(means), max(0.0, low), min(1.0, high))


def _paired(ours: list[str], theirs: list[str]) -> Share:
    """The difference of two shares of the same images; its interval counts images too.

    It is the interval of Agresti and Min (2005), of two images more, one half of which was gained
    and one half lost: few images that did not change are no proof that none will.
    """
    changes = [a - b for a, b in zip(_means(ours), _means(theirs), strict=True)]
    low, high = _interval(changes, more=2, total=0, squares=1)
    return Share(fmean(changes), max(-1.0, low), min(1.0, high))


def _interval(
    values: list[float], *, more: int, total: float, squares: float
) -> tuple[float, float]:
    """Of the mean of values, one an image, and of some more, whose sums these are."""
    count = len(values) + more
    middle = (sum(values) + total) / count
    spread = math.sqrt(((sum(v * v for v in values) + squares) / count - middle**2) / count)
    return middle - 1.96 * spread, middle + 1.96 * spread


def _means(lines: list[str]) -> list[float]:
    """Of each image, the share of the lines in which it is right."""
    return [fmean(c == "1" for c in image) for image in zip(*lines, strict=True)]


def _same(result: Result, report: Report, against: Report | None) -> Result | None:
    """The result of the other report under the same threat, if it has one."""
    if against is None or result.name not in against.results:
        return None
    other = against.results[result.name]
    kinds = ("budget", "steps", "reference")
    same = all(getattr(result, kind) == getattr(other, kind) for kind in kinds)
    if result.kind == "manifold":
        same = same and report.settings.get("flow") == against.settings.get("flow")
    return other if same else None


def check_same_images(ours: str | None, against: Report) -> None:
    """Refuse to compare what is of other images, given the fingerprint of ours."""
    if ours != against.settings.get("data"):
        raise ValueError("the two reports are of different images and cannot be compared.")
