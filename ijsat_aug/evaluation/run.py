"""The evaluation: each threat on each batch, kept as it finishes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..attack.behind import roots
from ..attack.model import Model, seeded
from ..flows.data import evenly_spaced
from ..flows.manifold import Manifold, on_device
from ..flows.pyramid import Pyramid, Tiles
from ..models import first_logits
from ..transforms.checks import check_images, find_flow
from ..transforms.labels import as_target, check_logits
from ..words import check_count
from .corruptions import EXTRA, SEVERITIES, STANDARD, CorruptionFiles, corrupt
from .corruptions.apply import check_choice
from .credibility import black_box_wins, doubts
from .display import Display
from .draws import Draws
from .pictures import to_png
from .report import Entry, Report, Result
from .store import Store, fingerprint
from .threats import STUCK, Threat, select_threats
from .victim import Found, Victim

__all__ = ["checked", "evaluate"]

_SHOWN_SEVERITY = 3
_SHOWN = 6
_DOUBTED = 128
_ROUNDING = 1e-4
_KNOWN_BY = 64  # of the images in a file of corrupted ones


def evaluate(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    threats: Sequence[str | Threat] = ("all",),
    flow: Manifold | str | PathLike[str] | None = None,
    corruptions: Sequence[str] = ("standard",),
    corruption_files: str | Path | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 250,
    seed: int = 0,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    name: str = "model",
) -> Report:
    """What is left of a model's accuracy under attacks, unseen threats and corruptions.

    An attack is shown what the model gets right; the others count as lost. The model is frozen, in
    eval mode and without autocast, and afterwards as it was.

    Args:
        model: Classifier; where it is, the evaluation runs.
        images: ``(N, C, H, W)``: uint8, or floating in [0, 1] whatever the model's normalisation.
        labels: Classes ``(N,)``.
        threats: Names as :func:`make_threat` takes them, groups (``"quick"`` is without AutoAttack,
            ``"standard"``, ``"unseen"``, ``"all"``), or :class:`Threat` objects. All,
            as by default, want AutoAttack: ``pip install "ijsat-aug[eval]"``.
        flow: For the threats along a manifold, also by its name or folder; without it the groups
            leave them out.
        corruptions: Names, ``"standard"`` (15) or ``"all"`` (19); none with ``()``.
        corruption_files: A folder in the layout of CIFAR-10-C: the official one is read, another is
            written at first and read from then on.
        mean: Of the normalisation that the model expects.
        std: Of the normalisation that the model expects.
        classes: Their names, for the pictures.
        batch_size: Halved where the memory does not suffice.
        seed: Of random starts and corruptions.
        folder: Keeps each finished result there and goes on from there.
        overwrite: Replaces what is in the folder, of whatever model and settings.
        progress: Shows bars with images per second and the time left.
        name: Of the model, in tables.

    Example:
        >>> from ijsat_aug.evaluation import evaluate
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
        >>> report = evaluate(model, x, y, threats=["linf@5"], corruptions=["contrast"])
        >>> report.accuracy("linf") <= report.accuracy("clean")
        True
    """
    check_count("seed", seed, 0)
    seed = int(seed)  # one of NumPy's is no JSON
    x, y = checked(images, labels)
    victim = Victim(model, mean, std)
    victim.scale.check(x[:1], values=False)
    flow = find_flow(flow)
    flow = None if flow is None else on_device(flow, victim.device)
    chosen = select_threats(threats, flow, x.shape[1:])
    flows = [flow, *(getattr(threat.attack, "flow", None) for threat in chosen)]
    known = {id(one): one for one in flows if one is not None}.values()
    behind = " and ".join(dict.fromkeys(fingerprint(_weights(one)) for one in known)) or None
    corrupted = _corruptions(corruptions)
    if corrupted and x.shape[1] not in (1, 3):
        raise ValueError(
            f"corruptions are made of images of 1 or 3 channels, these have {x.shape[1]}: leave "
            "them out with corruptions=()."
        )
    # A model is known by its answer, also one that draws random numbers.
    with victim.frozen(), seeded(victim.device, seed):
        logits = first_logits(victim, x[:1].to(victim.device)).detach()
    if logits.shape[1:] == (1,):
        raise ValueError(
            "the model has one output, and accuracy wants one for each class: give one that "
            "returns torch.cat((torch.zeros_like(out), out), 1)."
        )
    check_logits(logits, 1, y, values=True)
    if logits.isnan().any() and _answers_nothing(victim, x):
        raise ValueError(
            "the model's answers are no numbers (NaN): its weights are damaged or have diverged."
        )
    if classes is not None and len(classes) != logits.shape[1]:
        raise ValueError(
            f"there are {len(classes)} classes of images, and the model tells {logits.shape[1]} "
            "apart: the labels would mean others; give a folder for each class of the model, with "
            "an image at least."
        )
    settings = {
        "name": name, "model": victim.fingerprint(), "data": fingerprint(x, y),
        "images": len(x), "mean": victim.scale.mean, "std": victim.scale.std, "seed": seed,
        "flow": behind, "version": __version__,
    }  # fmt: skip
    batches = Batches(batch_size)
    of_these = {key: value for key, value in settings.items() if key != "name"}
    # A function has no weights to tell it from another, and a layer may have other gradients.
    of_these["logits"] = logits.flatten()[:32].nan_to_num().tolist()
    of_these["parts"] = victim.parts
    store = Store(folder, of_these, overwrite=overwrite)
    work = Work(victim, x, y, seed, batches, store, Display(progress))
    results: dict[str, Result] = {}
    warnings: list[str] = []
    source, origins = _source(x, y, corruption_files, corrupted, seed, victim.device)
    with work.display:
        warnings += work.doubts(attacked=len(chosen) > 0)
        clean = work.clean()
        work = replace(work, shown=_one_of_each(y, clean.correct))
        results["clean"] = replace(clean, **work.drawn({}, {}))
        for threat in chosen:
            result = results[threat.name] = work.threat(threat, clean)
            parts = {k: int(v) for k, v in result.notes.items()}
            warning = black_box_wins(parts, len(x))
            warnings += [] if warning is None else [warning]
            warnings += _stuck(threat, parts.get(STUCK, 0))
        for result in work.corruptions(corrupted, source, origins):
            results[result.name] = result
    truth = tuple(int(y[i]) for i in work.shown)
    names = None if classes is None else tuple(classes)
    return Report(settings, results, tuple(warnings), truth, names)


class Batches:
    """Runs work in batches, and halves them for good where the memory does not suffice.

    Example:
        >>> Batches(4).run(10, print)
        0 4
        4 8
        8 10
    """

    def __init__(self, size: int) -> None:
        check_count("batch_size", size, 1)
        self.size = size

    def run(self, count: int, work: Callable[[int, int], None]) -> None:
        """Do the work on every batch, again in smaller ones where it did not fit."""
        done = 0
        while done < count:
            end = min(done + self.size, count)
            if self.fit(end - done, partial(work, done, end)):
                done = end

    def fit(self, size: int, work: Callable[[], object]) -> bool:
        """Do the work of a batch of a size; where it did not fit, batches have half of it."""
        try:
            work()
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        else:
            return True
        self.size = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # now that the error holds nothing any more
        return False


@dataclass(frozen=True)
class Work:
    """A model and the images that it is asked about, of which some are shown."""

    victim: Victim
    x: Tensor
    y: Tensor
    seed: int
    batches: Batches
    store: Store
    display: Display
    shown: tuple[int, ...] = ()

    def doubts(self, attacked: bool) -> list[str]:
        """Warnings, from as many images as fit."""
        found: list[str] = []

        def look() -> None:
            # Not the first ones: data may be sorted by class.
            some = evenly_spaced(len(self.x), min(_DOUBTED, self.batches.size))
            x, y = self.x[some], self.y[some]
            place = self.victim.device
            x, y = x.to(place), y.to(place)
            found.extend(doubts(self.victim, x, y, self.seed, attacked=attacked))

        while not self.batches.fit(min(_DOUBTED, self.batches.size), look):
            pass
        return found

    def clean(self) -> Result:
        """The accuracy without any threat."""
        nothing = Entry("clean", "clean", "clean", "", 0, "")
        kept = self._kept(nothing)
        if kept is not None:
            return kept
        every = range(len(self.x))
        return self._keep(nothing, lambda begin, end: (self.x[begin:end], {}), every)

    def threat(self, threat: Threat, clean: Result) -> Result:
        """What an attack leaves of what was right."""
        kept = self._kept(threat)
        if kept is not None:
            return kept
        right = [i for i, c in enumerate(clean.correct) if c == "1"]

        def attack(begin: int, end: int) -> tuple[Tensor, dict[str, Tensor]]:
            places = right[begin:end]
            x, y = (t[places].to(self.victim.device) for t in (self.x, self.y))
            draws = Draws(self.seed, threat.name, places, x.device)
            found = threat.attack(self.victim, x, y, draws)
            _check_found(found, x, threat.name)
            return found.images, dict(found.right)

        return self._keep(threat, attack, right)

    def corruptions(
        self, names: Sequence[str], source: Source, origins: Mapping[str, str]
    ) -> Iterator[Result]:
        """The accuracy under each corruption at each severity."""
        for name in names:
            for severity in SEVERITIES:
                title, budget = name.replace("_", " "), f"severity {severity}"
                origin = origins.get(name, "")
                entry = Entry(f"{name}/{severity}", title, "corruption", budget, 0, origin)
                kept = self._kept(entry)
                if kept is None:

                    def look(
                        begin: int, end: int, name: str = name, severity: int = severity
                    ) -> tuple[Tensor, dict[str, Tensor]]:
                        pixels = source(name, severity, begin, end)
                        return pixels.to(self.victim.device).float() / 255, {}

                    kept = self._keep(
                        entry, look, range(len(self.x)), draw=severity == _SHOWN_SEVERITY
                    )
                yield kept

    def _kept(self, entry: Entry) -> Result | None:
        kept = self.store.get(entry)
        if kept is not None:
            self.display.reuse(kept)
        return kept

    def _keep(
        self,
        entry: Entry,
        make: Callable[[int, int], tuple[Tensor, dict[str, Tensor]]],
        places: Sequence[int],
        draw: bool = True,
    ) -> Result:
        """Ask the model for the images that ``make`` makes, at ``places`` of the data."""
        correct = ["0"] * len(self.x)
        notes: dict[str, float] = {}
        pictures: dict[int, Tensor] = {}
        seen: dict[int, int] = {}
        started = time.perf_counter()
        wanted = set(self.shown)

        def step(begin: int, end: int) -> None:
            with self.victim.frozen():
                images, parts = make(begin, end)
                predictions = self.victim.predict(images.to(self.victim.device)).cpu()
            here = list(places[begin:end])
            for row, right in enumerate((predictions == self.y[here]).tolist()):
                correct[here[row]] = "1" if right else "0"
                if here[row] in wanted:
                    pictures[here[row]] = images[row].to("cpu", copy=True)  # not the whole batch
                    seen[here[row]] = int(predictions[row])
            for name, withstood in parts.items():
                notes[name] = notes.get(name, 0) + int(withstood.sum())
            self.display.advance(end - begin)

        self.display.start(entry, len(places))
        self.batches.run(len(places), step)
        result = Result.of(
            entry, "".join(correct), seconds=round(time.perf_counter() - started, 2), notes=notes,
            **(self.drawn(pictures, seen) if draw else {}),
        )  # fmt: skip
        self.store.put(result)
        self.display.finish(result)
        return result

    def drawn(self, pictures: dict[int, Tensor], seen: dict[int, int]) -> dict[str, Any]:
        """The images to show and what they were taken for; clean ones where nothing was done."""
        missing = [i for i in self.shown if i not in seen]
        if missing:
            with self.victim.frozen():
                parts = self.x[missing].to(self.victim.device).split(self.batches.size)
                guesses = [int(c) for part in parts for c in self.victim.predict(part)]
            seen = seen | dict(zip(missing, guesses, strict=True))
        return {
            "pictures": tuple(to_png(pictures.get(i, self.x[i])) for i in self.shown),
            "seen": tuple(seen[i] for i in self.shown),
        }


def _check_found(found: Any, x: Tensor, name: str) -> None:
    """Refuse what an attack of the user's own may not return."""
    images = found.images if isinstance(found, Found) else None
    if images is None or images.shape != x.shape:
        got = type(found).__name__ if images is None else tuple(images.shape)
        raise TypeError(
            f"the threat {name!r} must return Found(images) of shape {tuple(x.shape)}, got {got}."
        )
    if not bool(((images >= -_ROUNDING) & (images <= 1 + _ROUNDING)).all()):
        raise ValueError(f"the threat {name!r} returned images that are not in [0, 1], or NaN.")


Source = Callable[[str, int, int, int], Tensor]


def _source(
    x: Tensor, y: Tensor, folder: str | Path | None, names: Sequence[str], seed: int,
    device: torch.device,
) -> tuple[Source, dict[str, str]]:  # fmt: skip
    """What gives corrupted images, and of those from files a word that knows them again."""
    pixels = (x * 255).round().byte() if names else x
    if folder is None or not names:

        def make(name: str, severity: int, begin: int, end: int) -> Tensor:
            return corrupt(pixels[begin:end], name, severity, seed=seed, first=begin, device=device)

        return make, {}
    files = CorruptionFiles(folder)
    files.write(pixels, y, names, seed=seed, device=device)

    def read(name: str, severity: int, begin: int, end: int) -> Tensor:
        images, truth = files.read(name, severity, begin, end)
        if not torch.equal(truth, y[begin:end].to(truth)):
            raise ValueError(
                f"the labels in {folder} are not those of these images: it belongs to other data."
            )
        return images

    some = evenly_spaced(len(x), _KNOWN_BY).tolist()
    known = {
        name: [read(name, severity, i, i + 1) for severity in SEVERITIES for i in some]
        for name in names
    }
    return read, {name: f"files {fingerprint(*images)}" for name, images in known.items()}


def checked(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] and classes, on the CPU.

    Example:
        >>> x, _ = checked(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([3]))
        >>> x.max()
        tensor(1.)
    """
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        images = images.float() / 255
    check_images(images)
    target = as_target(labels, len(images), values=True)
    if target.ndim != 1:
        raise ValueError("labels must be classes (N,): probabilities have no right or wrong.")
    if len(images) == 0:
        raise ValueError("there are no images to evaluate on.")
    low, high = (float(v) for v in images.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("the images hold NaN or infinite values: look where they come from.")
    if low < 0 or high > 1:
        raise ValueError(
            f"the images have values from {low:.3g} to {high:.3g}: pass pixels in [0, 1] or uint8, "
            "and the model's normalisation as mean= and std=."
        )
    return images.detach().float().cpu(), target.cpu()


def _corruptions(names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"corruptions must be a list, as in [{names!r}].")
    groups = {"standard": STANDARD, "all": (*STANDARD, *EXTRA)}
    found = [member for name in names for member in groups.get(name, (name,))]
    for name in found:
        check_choice(name)
    return list(dict.fromkeys(found))


def _answers_nothing(victim: Victim, x: Tensor) -> bool:
    """Whether some images, one after the other, all get no number."""
    with victim.frozen():
        some = x[evenly_spaced(len(x), 16)].to(victim.device).split(1)
        return all(int(victim.predict(image)) < 0 for image in some)


def _one_of_each(y: Tensor, correct: str) -> tuple[int, ...]:
    """An image of some classes, where possible one that the model gets right."""
    found: dict[int, int] = {}
    for right in ("1", "0"):
        for place, label in enumerate(y.tolist()):
            if correct[place] == right:
                found.setdefault(label, place)
    return tuple(found[label] for label in sorted(found))[:_SHOWN]


def _stuck(threat: Threat, count: int) -> list[str]:
    if count == 0:
        return []
    return [
        f"{threat.title}: {count} images met no numbers (NaN) on their way, of the flow or of the "
        "gradient, and count as right: the accuracy is an upper bound."
    ]


def _weights(flow: object) -> object:
    """What tells a flow from others; of one at another size, the flow inside and how it is."""
    if isinstance(flow, Pyramid | Tiles):
        return type(flow).__name__, flow.size, getattr(flow, "overlap", None), _weights(flow.flow)
    behind = [list(roots(held)) for held in getattr(flow, "__dict__", {}).values() if _calls(held)]
    return (flow, behind) if behind else flow


def _calls(held: object) -> bool:
    """Whether it is a function or a method, whose modules are not seen otherwise."""
    return callable(held) and not isinstance(held, nn.Module)
