"""Fair timing and honest records: contenders interleaved in one process, results as JSON."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("IJSAT_RESULTS") or Path(__file__).parent / "results")


def keep_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the system after every step.

    Otherwise each large activation is faulted in again, which costs all contenders up to 40 %, and
    whoever runs after the largest one most. A benchmark may set this for its process; a library
    may not.
    """
    trim_threshold, mmap_threshold = -1, -3
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_threshold, 2**30)


def start_peak() -> int:
    """Give freed memory back, start a new peak, and tell how many bytes are resident (Linux)."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 2**20)  # mmap_threshold: large blocks leave when they are freed
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name: str) -> int:
    """Bytes of the process: ``VmRSS`` now, ``VmHWM`` at most since :func:`start_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    warmup: int = 8,
    repeats: int = 1,
) -> dict[str, list[float]]:
    """Seconds of a call of each contender in each round; the order is reversed every other round.

    ``repeats`` calls in a row are timed together: a GPU that is asked for one call alone waits for
    its first kernels.
    """
    names = list(contenders)
    for _ in range(warmup):
        for name in names:
            contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            seconds[name].append(_time(contenders[name], repeats) / repeats)
    return seconds


def _time(run: Callable[[], object], repeats: int) -> float:
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - begin


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Median and quartiles of a / b over paired rounds."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)}


def verdict(value: float, target: float | None) -> str:
    """Whether a ratio stays below its target, if it has one."""
    return "" if target is None else f"target {target:g} " + "✗✓"[value <= target]


def spread(found: Mapping[str, float]) -> str:
    """The median of :func:`ratio` and, in brackets, its quartiles."""
    return f"{found['median']:.2f} [{found['q1']:.2f}–{found['q3']:.2f}]"


def median_ms(seconds: list[float]) -> float:
    """Median in milliseconds."""
    return round(1e3 * statistics.median(seconds), 2)


def environment() -> dict[str, Any]:
    """What a result depends on: command, commit, date, hardware and versions."""
    script = Path(sys.argv[0]).resolve().relative_to(Path(__file__).resolve().parents[1])
    command = shlex.join(["python", script.as_posix(), *sys.argv[1:]])
    return {"command": command, **made(), "hardware": hardware()}


def made() -> dict[str, str]:
    """Of what, when and with what something is made."""
    return {
        "commit": _COMMIT,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _commit() -> str:
    """What git says; a copy of the tree without its history is told IJSAT_COMMIT instead."""
    if told := os.environ.get("IJSAT_COMMIT"):
        return told
    places = ("--", ":/", ":!/benchmarks/results", ":!/docs")
    changes = _git("status", "--porcelain", "-uno", *places)
    return _git("rev-parse", "--short", "HEAD") + ("+changes" if changes else "")


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        return ""


_COMMIT = _commit()  # of what runs, not of what is there by the time that it has run


def hardware() -> str:
    """The GPU, or the processor and how many of its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {cores()} cores"


def machines(runs: Iterable[Mapping[str, Any]]) -> str:
    """Where runs were made; those that do not say were made here."""
    return " and ".join(_each(runs, "hardware", hardware()))


def makings(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of what, when and with what runs were made; those that do not say are made now."""
    now = made()
    found = {key: _each(runs, key, now[key]) for key in now}
    first, *others = found.pop("date")
    dates = " to ".join([first, *others[-1:]])
    return {key: " and ".join(told) for key, told in found.items()} | {"date": dates}


def _each(runs: Iterable[Mapping[str, Any]], key: str, usual: str) -> list[str]:
    return sorted({one.get(key, usual) for one in runs}) or [usual]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def where() -> str:
    """``"gpu"`` or ``"cpu"``, for the names of records."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def record(name: str, result: Mapping[str, Any]) -> Path:
    """Write ``<name>.json`` into ``benchmarks/results``, or where IJSAT_RESULTS says."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**environment(), **result}, indent=1) + "\n")
    return path
