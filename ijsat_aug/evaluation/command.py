"""``ijsat-aug evaluate``: a model and data from the few words of a command line, to a report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ..flows.checkpoint import load_flow
from ..flows.data import (
    ImageData,
    evenly_spaced,
    is_folder,
    load_images,
    outside_classes,
    tell_order,
)
from ..flows.files import check_target, write_atomically
from ..models import load_model
from .corruptions.files import CorruptionFiles
from .render import to_html, to_markdown
from .report import Report
from .run import checked, evaluate
from .store import fingerprint
from .table import check_same_images

__all__ = ["run"]


def run(
    source: str,
    *,
    model: str,
    weights: str | None = None,
    name: str | None = None,
    flow: str | None = None,
    threats: Sequence[str] = ("all",),
    corruptions: Sequence[str] = ("standard",),
    corruption_files: Path | None = None,
    limit: int | None = None,
    root: Path | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 250,
    device: str | None = None,
    seed: int = 0,
    against: Path | None = None,
    folder: Path | None = None,
    overwrite: bool = False,
    json: Path | None = None,
    markdown: Path | None = None,
    html: Path | None = None,
    progress: bool = False,
) -> tuple[Report, Report | None]:
    """Evaluate, and write what was asked for; the arguments are those of ``ijsat-aug evaluate``.

    Returns:
        The report, and the one that it is compared with.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     report, _ = run("digits", model="ijsat_aug.demo:network", threats=["linf@2"],
        ...                     corruptions=[], limit=20, html=Path(place, "a.html"))
        ...     Path(place, "a.html").stat().st_size > 0, report.settings["images"]
        (True, 20)
    """
    json, markdown, html = (t and t.expanduser() for t in (json, markdown, html))
    targets = [target for target in (json, markdown, html) if target is not None]
    for target in targets:
        check_target(target)
    if len({target.absolute() for target in targets}) < len(targets):
        raise ValueError("two reports would be written to one file: name one for each.")
    place = _device(device)
    before = None if against is None else Report.load(against)
    manifold = None if flow is None else load_flow(flow)
    network = load_model(model, weights)
    few = None if limit is None or not is_folder(source) else partial(evenly_spaced, count=limit)
    data = load_images(source, size=size, root=root, train=False, pick=few)
    theirs = corruption_files is not None and CorruptionFiles(corruption_files).foreign
    data = _some(data, limit, first=theirs)
    if data.labels is None:
        stray = outside_classes(source)
        at = "" if stray is None else f" ({stray} lies in none)"
        raise ValueError(
            f"{source} has no labels, and accuracy needs them: sort the images into a folder for "
            f"each class{at}, or save an array 'labels' beside 'images'."
        )
    tell_order(data.classes or ())
    if before is not None:
        check_same_images(fingerprint(*checked(data.pixels, data.labels)), before)
    report = evaluate(
        network.to(place), data.pixels, data.labels, threats=threats,
        flow=manifold, corruptions=corruptions, corruption_files=corruption_files, mean=mean,
        std=std, classes=data.classes, batch_size=batch_size, seed=seed, folder=folder,
        overwrite=overwrite, progress=progress, name=name or _name(model, weights),
    )  # fmt: skip
    if json is not None:
        report.save(json)
    if markdown is not None:
        write_atomically(markdown, to_markdown(report, before).encode())
    if html is not None:
        write_atomically(html, to_html(report, before).encode())
    return report, before


def _device(name: str | None) -> torch.device:
    """A GPU if there is one, or what was asked for."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        first, *_ = str(error).split("\n")
        raise ValueError(f"there is no device {name!r} here ({first}): cpu is one.") from error


def _some(data: ImageData, limit: int | None, first: bool) -> ImageData:
    """The first images; of those that are sorted by class, as a folder, evenly spaced ones.

    Files of corruptions that others wrote hold the images in their order: there the ``first``.
    """
    count = len(data.images)
    if limit is None or limit >= count:
        return data
    by_class = data.labels is not None and bool((data.labels.diff() >= 0).all())
    if data.classes is None and (first or not by_class):
        return data.first(limit)
    return data.spaced(limit)


def _name(model: str, weights: str | None) -> str:
    if weights is None:
        return model
    return model if weights == "DEFAULT" else Path(weights).stem
