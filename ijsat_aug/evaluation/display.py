"""What an evaluation shows: a bar for each threat with images per second and the time left."""

from __future__ import annotations

from typing import Any

from .report import Entry, Result

__all__ = ["Display"]


class Display:
    """Progress bars, if wanted.

    Example:
        >>> with Display(False) as display:
        ...     display.advance(3)
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._bars: Any = None
        self._task: Any = None

    def __enter__(self) -> Display:
        if self.enabled:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description:<28}"), BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(elapsed_when_finished=True), refresh_per_second=4,
            )  # fmt: skip
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def start(self, entry: Entry, count: int) -> None:
        """A threat begins on so many images."""
        if self._bars is not None:
            from rich.markup import escape

            self._task = self._bars.add_task(escape(entry.label), total=count, text="")

    def advance(self, count: int) -> None:
        """So many images are done."""
        if self._bars is not None:
            self._bars.advance(self._task, count)
            speed = self._bars.tasks[self._task].speed
            text = "" if speed is None else f"{speed:.0f} images/s"
            self._bars.update(self._task, text=text)

    def finish(self, result: Result) -> None:
        """A threat is done."""
        if self._bars is not None:
            total = self._bars.tasks[self._task].total
            rate = (total or 0) / max(result.seconds, 1e-9)
            text = f"{result.accuracy.value:6.1%} right · {rate:.0f} images/s"
            self._bars.update(self._task, completed=total, text=text)
            if result.kind == "corruption" and not result.name.endswith("/5"):
                self._bars.update(self._task, visible=False)

    def reuse(self, result: Result) -> None:
        """A result was there already."""
        if self._bars is not None and result.kind != "corruption":
            self._bars.console.print(
                f"{result.label:<28} {result.accuracy.value:6.1%} right, from an earlier run",
                markup=False,
            )
