"""Draw docs/<study>.png from benchmarks/results/<study>.json: means and their 95 % intervals.

Run:  python benchmarks/accuracy/plot.py lowdata-cifar10
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.augmentations import NOT_OURS
from benchmarks.harness import RESULTS

DOCS = RESULTS.parents[1] / "docs"
OURS, THEIRS = "tab:blue", "tab:gray"


def panel(axis: Axes, title: str, table: Mapping[str, Any]) -> None:
    """A row for each augmentation, the best at the top; hollow where it trained for longer."""
    rows = sorted(table.items(), key=lambda item: item[1]["accuracy"][0])
    for place, (name, row) in enumerate(rows):
        mean, half = row["accuracy"]
        longer = ", for as long as " in name
        colour = THEIRS if longer or name in NOT_OURS else OURS
        axis.errorbar(
            mean, place, xerr=half or 0, fmt="o", color=colour, capsize=3,
            markerfacecolor="white" if longer else colour,
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), [name.replace(", for as", ",\nfor as") for name, _ in rows])
    axis.set(title=title, xlabel="test accuracy, %")
    axis.margins(y=0.5 / len(rows))
    axis.grid(axis="x", alpha=0.3)


def draw(name: str) -> Path:
    """The picture of a study."""
    tables = json.loads((RESULTS / f"{name}.json").read_text())["table"]
    heights = [len(table) + 1.5 for table in tables.values()]
    figure = Figure((8, 0.38 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(tables), height_ratios=heights, squeeze=False)[:, 0]
    for axis, (setting, table) in zip(axes, tables.items(), strict=True):
        panel(axis, f"{setting} labels" if setting.isdigit() else setting, table)
    path = DOCS / f"{name}.png"
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("studies", nargs="+", help="names in benchmarks/results")
    for study in parser.parse_args().studies:
        print(draw(study))
