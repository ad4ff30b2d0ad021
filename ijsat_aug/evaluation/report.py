"""What an evaluation found: for each threat, which images the model still gets right."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from ..flows.files import write_atomically

__all__ = ["Entry", "Kind", "Report", "Result", "Share", "wilson"]

Kind = Literal["clean", "lp", "manifold", "unseen", "corruption"]
ATTACKS: tuple[Kind, ...] = ("lp", "manifold", "unseen")
FORMAT = 1


class Share(NamedTuple):
    """A share of the images, and its 95 % interval.

    Example:
        >>> f"{Share(0.5, 0.4, 0.6).value:.0%}"
        '50%'
    """

    value: float
    low: float
    high: float


def wilson(hits: int, count: int, z: float = 1.959964) -> Share:
    """A share with the score interval of Wilson, which is right at 0 and 1 too.

    Example:
        >>> [round(v, 3) for v in wilson(0, 100)]
        [0.0, 0.0, 0.037]
    """
    if count == 0:
        raise ValueError("a share of no images at all is no number.")
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return Share(share, max(0.0, middle - half), min(1.0, middle + half))


@dataclass(frozen=True)
class Entry:
    """What is done to the images: one line of the table.

    Attributes:
        name: On the command line, such as ``"linf"``; of a corruption with its severity,
            ``"fog/3"``.
        title: For people.
        kind: Which part of the table it belongs to.
        budget: As people write it, such as ``"8/255"``.
        steps: Of the attack.
        reference: Where attack and budget come from.

    Example:
        >>> Entry("linf", "PGD L∞", "lp", "8/255", 50, "Madry et al., 2018").label
        'PGD L∞ 8/255'
    """

    name: str
    title: str
    kind: Kind
    budget: str
    steps: int
    reference: str

    @property
    def label(self) -> str:
        """Title and budget."""
        return f"{self.title} {self.budget}".strip()


@dataclass(frozen=True)
class Result(Entry):
    """What one threat left of the accuracy.

    Attributes:
        correct: One character an image: ``"1"`` where the model was right whatever the attack did.
        seconds: That it took.
        notes: What came out beside, such as the accuracy after each part of AutoAttack.
        pictures: The first images under the threat, as PNG in base64.
        seen: What the model took them for.

    Example:
        >>> result = Result("linf", "PGD", "lp", "8/255", 50, "Madry et al., 2018", "1101")
        >>> result.accuracy.value
        0.75
    """

    correct: str
    seconds: float = 0.0
    notes: Mapping[str, float] = field(default_factory=dict)
    pictures: tuple[str, ...] = field(default=(), repr=False)
    seen: tuple[int, ...] = ()

    @classmethod
    def of(cls, entry: Entry, correct: str, **found: Any) -> Result:
        """What was found of a threat."""
        facts = {field.name: getattr(entry, field.name) for field in fields(Entry)}
        return cls(**facts, correct=correct, **found)

    @property
    def accuracy(self) -> Share:
        """The share of images that are still right."""
        return wilson(self.correct.count("1"), len(self.correct))


@dataclass(frozen=True)
class Report:
    """Everything that was found.

    Attributes:
        settings: Model, data, seed, budgets and versions.
        results: By name of the threat.
        warnings: Why one should doubt a number.
        truth: The labels of the pictures.
        classes: Names of the classes, if there are any.

    Example:
        >>> clean = Result("clean", "clean", "clean", "", 0, "", "1110")
        >>> linf = Result("linf", "PGD", "lp", "8/255", 50, "", "1010")
        >>> fog = Result("fog", "Fog", "unseen", "0.1", 50, "", "0110")
        >>> report = Report({"images": 4}, {r.name: r for r in (clean, linf, fog)})
        >>> report.accuracy("linf"), report.union().value
        (0.5, 0.25)
    """

    settings: Mapping[str, Any]
    results: Mapping[str, Result]
    warnings: tuple[str, ...] = ()
    truth: tuple[int, ...] = ()
    classes: tuple[str, ...] | None = None

    def accuracy(self, name: str) -> float:
        """The accuracy under one threat."""
        if name not in self.results:
            raise KeyError(f"{name!r} was not evaluated; there are {', '.join(self.results)}.")
        return self.results[name].accuracy.value

    def of_kind(self, *kinds: Kind) -> list[Result]:
        """The results of some kinds, in order."""
        return [result for result in self.results.values() if result.kind in kinds]

    def attacks(self, *kinds: Kind) -> list[Result]:
        """The results of some kinds of attacks; of all by default."""
        return self.of_kind(*(kinds or ATTACKS))

    def worst(self, names: Iterable[str]) -> str:
        """For each image ``"1"`` where the model is right, clean and under all these threats."""
        rows = [self.results[name].correct for name in ("clean", *names)]
        return "".join("01"[all(c == "1" for c in image)] for image in zip(*rows, strict=True))

    def union(self, *kinds: Kind) -> Share:
        """The share of images that are right under every attack of these kinds; all by default."""
        worst = self.worst(result.name for result in self.attacks(*kinds))
        return wilson(worst.count("1"), len(worst))

    def corruptions(self) -> dict[str, float]:
        """The accuracy under each corruption, as the mean of its severities."""
        return {
            name: fmean(result.accuracy.value for result in results)
            for name, results in self.by_corruption().items()
        }

    def by_corruption(self) -> dict[str, list[Result]]:
        """The results of each corruption, one for each severity."""
        found: dict[str, list[Result]] = {}
        for result in self.of_kind("corruption"):
            found.setdefault(result.name.split("/")[0], []).append(result)
        return found

    def to_json(self) -> str:
        """All of it, with every single image."""
        values = {
            "format": FORMAT, "settings": dict(self.settings), "warnings": list(self.warnings),
            "truth": list(self.truth), "classes": self.classes,
            "summary": self.summary(),
            "results": {name: asdict(result) for name, result in self.results.items()},
        }  # fmt: skip
        return json.dumps(values, indent=1) + "\n"

    def summary(self) -> dict[str, float]:
        """The accuracies alone."""
        found = {r.name: r.accuracy.value for r in self.results.values() if r.kind != "corruption"}
        if self.attacks():
            found["worst case"] = self.union().value
        corruptions = self.corruptions()
        if corruptions:
            found["corruptions"] = fmean(corruptions.values())
        return {name: round(value, 6) for name, value in found.items()}

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json`, whole or not at all."""
        write_atomically(Path(path).expanduser(), self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what :meth:`save` wrote.

        Example:
            >>> import tempfile
            >>> clean = Result("clean", "clean", "clean", "", 0, "", "1110")
            >>> with tempfile.TemporaryDirectory() as place:
            ...     Report({}, {"clean": clean}).save(Path(place, "a.json"))
            ...     Report.load(Path(place, "a.json")).accuracy("clean")
            0.75
        """
        file = Path(path).expanduser()
        if file.is_dir():
            raise ValueError(f"{path} is a folder: give the file that to_json (--json) wrote.")
        if not file.exists():
            raise FileNotFoundError(f"{path} does not exist.")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"{path} has format {values['format']}; this version reads 1.")
            results = {name: read_result(value) for name, value in values["results"].items()}
            if len({len(result.correct) for result in results.values()}) > 1:
                raise KeyError("results of different images")
            classes = None if values["classes"] is None else tuple(values["classes"])
            return cls(
                values["settings"], results, tuple(values["warnings"]), tuple(values["truth"]),
                classes,
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, UnicodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is no report of an evaluation: give the file that --json wrote."
            ) from error


def read_result(values: Mapping[str, Any]) -> Result:
    """From what ``asdict`` made of it."""
    lists: dict[str, Sequence[Any]] = {k: tuple(values[k]) for k in ("pictures", "seen")}
    return Result(**{**values, **lists})
