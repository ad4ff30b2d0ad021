"""What a training shows: a progress bar with bits/dim, images per second and the time left."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Progress:
    """The part of the training state that is not tensors."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best: float = math.inf
    best_step: int = 0
    validated: float = math.nan


class Display:
    """A progress bar with bits/dim, images per second and the time left."""

    def __init__(self, batch_size: int, enabled: bool) -> None:
        self.enabled = enabled
        self.batch_size = batch_size
        self.first: tuple[int, float] | None = None

    def __enter__(self) -> Display:
        if self.enabled:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self.bar = Progress(
                TextColumn("step {task.fields[step]}"), BarColumn(),
                TextColumn("{task.fields[text]}"), TimeElapsedColumn(), refresh_per_second=2,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task("train", total=1.0, step=0, text="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self.enabled:
            self.bar.stop()

    def update(self, progress: Progress, done: float, loss: Tensor) -> None:
        """Move the bar, every tenth step."""
        if not self.enabled:
            return
        if self.first is None:
            self.first = (progress.step, progress.seconds)
        if progress.step % 10:
            return
        steps, seconds = progress.step - self.first[0], progress.seconds - self.first[1]
        rate = self.batch_size * steps / max(seconds, 1e-9)
        left = progress.seconds * (1 - done) / max(done, 1e-9) / 60
        text = f"{float(loss):.3f} bits/dim · {rate:.0f} images/s · {left:.1f} min left"
        self.bar.update(self.task, completed=done, step=progress.step, text=text)

    def say(self, what: str) -> None:
        """Print what happens when the bar has come to its end."""
        if self.enabled:
            self.bar.console.print(what)

    def report(self, progress: Progress) -> None:
        """Print a line for a validation."""
        if self.enabled:
            skipped = f", {progress.skipped} steps skipped" if progress.skipped else ""
            self.bar.console.print(
                f"step {progress.step} · {progress.seconds / 60:.1f} min · held-out "
                f"{progress.validated:.4f} bits/dim (best {progress.best:.4f}{skipped})"
            )
