"""The report for the terminal, as Markdown, and as one HTML file with pictures."""

from __future__ import annotations

import html
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from .pictures import from_png, to_png
from .report import Report, Result
from .table import Row, rows

__all__ = ["to_html", "to_markdown", "to_table"]

_NO_AUTOATTACK = (
    "Without AutoAttack of that budget beside it, the accuracy under {} is an upper bound, and no "
    "claim of robustness."
)
_OTHER_VERSION = (
    "The changes are against a report of ijsat-aug {}, this one is of {}: attacks may differ too."
)


def to_table(report: Report, against: Report | None = None) -> Any:
    """A table of rich.

    Example:
        >>> clean = Result("clean", "clean", "clean", "", 0, "", "1110")
        >>> to_table(Report({"images": 4, "name": "model"}, {"clean": clean})).row_count
        1
    """
    from rich.table import Table
    from rich.text import Text

    remarks = "\n".join(_remarks(report, against))
    table = Table(title=Text(_title(report, against)), caption=Text(remarks) if remarks else None)
    for name in _columns(against):
        left = name in ("threat", "budget")
        table.add_column(name, justify="left" if left else "right")
    for _, group in groupby(rows(report, against), key=lambda row: row.part):
        for row in group:
            style = "bold" if row.strong else None
            table.add_row(*map(Text, _cells(row, against)), style=style)
        table.add_section()
    return table


def to_markdown(report: Report, against: Report | None = None) -> str:
    """A table in Markdown, and the warnings under it.

    Example:
        >>> clean = Result("clean", "clean", "clean", "", 0, "", "1110")
        >>> print(to_markdown(Report({"images": 4, "name": "model"}, {"clean": clean})))
        **model, 4 images**
        <BLANKLINE>
        | threat | budget | steps | accuracy % | 95 % interval |
        |:--|:--|--:|--:|--:|
        | clean |  |  | 75.0 | 30.1 – 95.4 |
        <BLANKLINE>
    """
    columns = _columns(against)
    lines = [
        f"**{_plain(_title(report, against))}**", "",
        f"| {' | '.join(columns)} |",
        f"|{'|'.join(':--' if c in ('threat', 'budget') else '--:' for c in columns)}|",
    ]  # fmt: skip
    for row in rows(report, against):
        cells = [_plain(cell) for cell in _cells(row, against)]
        lines.append(f"| {' | '.join(f'**{c}**' if row.strong and c else c for c in cells)} |")
    lines += [f"\n> {remark}" for remark in _remarks(report, against)]
    return "\n".join(lines) + "\n"


def to_html(report: Report, against: Report | None = None) -> str:
    """One file with everything in it: warnings, table, and the images of each threat.

    Example:
        >>> clean = Result("clean", "clean", "clean", "", 0, "", "1110")
        >>> page = to_html(Report({"images": 4, "name": "model"}, {"clean": clean}))
        >>> page.startswith("<!doctype html>"), "75.0" in page, "http" in page
        (True, True, False)
    """
    title = html.escape(_title(report, against))
    warnings = "".join(f"<p class=warning>{html.escape(w)}</p>" for w in _remarks(report, against))
    settings = ", ".join(f"{k} {v}" for k, v in report.settings.items() if v is not None)
    return _PAGE.format(
        title=title, warnings=warnings, table=_html_table(report, against),
        pictures=_html_pictures(report), settings=html.escape(settings),
    )  # fmt: skip


def _plain(text: str) -> str:
    """Words that Markdown takes for nothing else."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _title(report: Report, against: Report | None) -> str:
    settings = report.settings
    title = f"{settings.get('name', 'model')}, {settings.get('images', '?')} images"
    return title if against is None else f"{title}, against {against.settings.get('name')}"


def _remarks(report: Report, against: Report | None) -> list[str]:
    """Warnings, and what the numbers do not say by themselves."""
    found = report.results
    budgets = {name: result.budget for name, result in found.items()}
    pairs = {"linf": "autoattack", "l2": "autoattack_l2"}
    alone = [
        found[name].title
        for name, sure in pairs.items()
        if name in found and budgets.get(sure) != budgets[name]
    ]
    remarks = [*report.warnings]
    if alone:
        remarks.append(_NO_AUTOATTACK.format(" and ".join(alone)))
    if against is not None:
        ours, theirs = (one.settings.get("version") for one in (report, against))
        if ours != theirs:
            remarks.append(_OTHER_VERSION.format(theirs, ours))
    return remarks


def _columns(against: Report | None) -> list[str]:
    columns = ["threat", "budget", "steps", "accuracy %", "95 % interval"]
    return columns if against is None else [*columns, "change"]


def _cells(row: Row, against: Report | None) -> list[str]:
    cells = [row.title, row.budget, row.steps, row.percent, row.interval]
    return cells if against is None else [*cells, row.difference]


def _html_table(report: Report, against: Report | None) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in (*_columns(against), "source"))
    body = []
    for part, group in groupby(rows(report, against), key=lambda row: row.part):
        body.append(f"<tr class=part><td colspan=9>{html.escape(part)}</td></tr>")
        for row in group:
            line = "".join(f"<td>{html.escape(c)}</td>" for c in _cells(row, against))
            line += f"<td class=source>{html.escape(row.source)}</td>"
            bar = f"--share:{100 * row.accuracy.value:.1f}%"
            body.append(f'<tr class="{"strong" if row.strong else ""}" style="{bar}">{line}</tr>')
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _html_pictures(report: Report) -> str:
    shown = [result for result in report.results.values() if result.pictures]
    clean = next((r for r in shown if r.kind == "clean"), None)
    if clean is None:
        return ""
    lines = [_html_line(report, clean, result) for result in shown]
    truth = "".join(f"<th>{html.escape(_name(report, k))}</th>" for k in report.truth)
    return f"<table class=grid><tr><th></th>{truth}</tr>{''.join(lines)}</table>"


def _html_line(report: Report, clean: Result, result: Result) -> str:
    title = html.escape(result.label)
    cells = []
    for i, (image, seen) in enumerate(zip(result.pictures, result.seen, strict=True)):
        fooled = "fooled" if seen != report.truth[i] else ""
        difference = "" if result is clean else _difference(clean.pictures[i], image)
        name = html.escape(_name(report, seen))
        cells.append(
            f'<td class="{fooled}"><img src="data:image/png;base64,{html.escape(image)}" alt="">'
            f"{difference}<br>{name}</td>"
        )
    return f"<tr><th>{title}</th>{''.join(cells)}</tr>"


def _difference(clean: str, image: str) -> str:
    return f'<img src="data:image/png;base64,{enlarged(clean, image)}" alt="difference">'


def enlarged(clean: str, image: str) -> str:
    """The difference of two pictures, ten times as large, around grey.

    Example:
        >>> import torch
        >>> black = to_png(torch.zeros(1, 8, 8))
        >>> enlarged(black, black) == to_png(torch.full((1, 8, 8), 0.5))
        True
    """
    return to_png(0.5 + 10 * (from_png(image) - from_png(clean)))


def _name(report: Report, index: int) -> str:
    names: Iterable[str] = report.classes or ()
    return dict(enumerate(names)).get(index, str(index))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1.5em 0 }}
td, th {{ padding: .25em .8em; text-align: left; vertical-align: middle }}
td:nth-child(n+3) {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
td.source {{ text-align: left; color: #666; font-size: 13px; white-space: normal }}
tr.part td {{ font-weight: 600; padding-top: 1em; border-bottom: 1px solid #999 }}
tr.strong td {{ font-weight: 600 }}
tr[style] td:nth-child(4) {{
  background: linear-gradient(90deg, #9cc9f0 var(--share), transparent 0) }}
.warning {{
  background: #fff3cd; color: #553f00; border-left: 4px solid #e0a800; padding: .6em 1em }}
.grid td, .grid tr:first-child th {{
  text-align: center; font-size: 13px; white-space: nowrap; padding: .25em }}
.grid img {{ width: 72px; image-rendering: pixelated; margin: 1px }}
.grid .fooled {{ color: #c00; font-weight: 600 }}
footer {{ color: #666; font-size: 13px; overflow-wrap: anywhere }}
</style></head><body>
<h1>{title}</h1>
{warnings}
{table}
<h2>What the model saw</h2>
<p>Beside each image its difference from the clean one, ten times as large; below, what the model
took it for, in red where that is wrong.</p>
{pictures}
<footer>{settings}</footer>
</body></html>
"""
