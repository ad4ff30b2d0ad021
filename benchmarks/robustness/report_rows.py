"""A report as the numbers that a record keeps."""

from __future__ import annotations

from typing import Any

from ijsat_aug.evaluation import Report
from ijsat_aug.evaluation.table import rows


def answers(report: Report) -> dict[str, str]:
    """Which images stay right under each threat, image by image: all else follows from it."""
    threats = (one for one in report.results.values() if one.kind != "corruption")
    return {one.name: one.correct for one in threats}


def numbers(report: Report, against: Report | None = None) -> list[dict[str, Any]]:
    """Its table, and the changes against another network on the same images."""
    return [
        {
            "part": row.part, "threat": row.title, "budget": row.budget, "steps": row.steps,
            "accuracy": round(100 * row.accuracy.value, 2), "interval": row.interval,
            "change": row.difference,
        }
        for row in rows(report, against)
    ]  # fmt: skip
