"""Train a flow: maximum likelihood on normflows' Glow, with accelerate as the engine."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.optim.swa_utils import AveragedModel

from ..precision import warn_if_emulated
from .checkpoint import TRAINING
from .data import ImageData
from .display import Display, Progress
from .files import check_target, write_atomically
from .fold import freeze
from .glow import ClampedNet, GlowConfig, bits_per_dim, build_glow, dequantize
from .publish import evaluate, publish, save_pictures
from .recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["train_flow"]

_HELD_OUT = 64


def train_flow(
    data: ImageData,
    config: GlowConfig,
    out: str | Path,
    recipe: Recipe,
    *,
    test: ImageData | None = None,
    resume: bool = False,
    overwrite: bool = False,
    name: str | None = None,
    license: str = "unspecified",
    quiet: bool = False,
) -> Path:
    """Train a flow and write a finished checkpoint folder with its card.

    Runs on whatever accelerate finds: a CPU, a GPU, or several through ``accelerate launch``.

    Args:
        data: Training images; a share of them is held out to choose the best weights.
        config: The network.
        out: The checkpoint folder, with its pictures; those on the way and the state of a training
            that can be resumed lie in ``out/training``.
        recipe: How long and how.
        test: Images of a test split, measured once, at the end.
        resume: Go on from ``out/training`` when an interrupted training is there.
        overwrite: Start anew even so, and replace what is there.
        name: Of the flow, for its card; the folder's name by default.
        license: Of the weights, for the card.
        quiet: No progress bar.

    Example:
        >>> import tempfile
        >>> from ijsat_aug.flows.data import load_images
        >>> digits = load_images("digits")
        >>> config = GlowConfig(shape=(1, 8, 8), levels=2, steps=2, hidden=8, bins=17)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = train_flow(digits, config, folder + "/flow", Recipe(epochs=0.1), quiet=True)
        ...     sorted(p.name for p in path.iterdir() if p.is_file())
        ['README.md', 'config.json', 'model.safetensors',
         'reconstructions.png', 'samples.png', 'walk.png']
    """
    out = Path(out).expanduser()
    _check(data, config, test)
    if test is not None and test.labels is not None:
        test = dataclasses.replace(test, labels=test.labels.long())
    _check_place(out, resume, overwrite)
    with (
        _accelerator(out, recipe) as accelerator,
        torch.inference_mode(False),
        torch.enable_grad(),
        _no_default_device(),
    ):
        run = _Run(data, config, out, recipe, accelerator, resume)
        with Display(recipe.batch_size, accelerator.is_main_process and not quiet) as display:
            run.train(display)
            display.say("measuring the flow, and drawing its pictures ...")
        if accelerator.is_main_process:
            publish(
                run.best_state(), config, out, train=run.train_data, held_out=run.held_out,
                test=test, name=name, license=license, training=run.summary(),
                device=accelerator.device,
            )  # fmt: skip
        accelerator.wait_for_everyone()  # the checkpoint is there when any process returns
    return out


def _no_default_device() -> AbstractContextManager[Any]:
    """A training says where its tensors are; those that normflows makes begin on the CPU."""
    there = torch.get_default_device().type
    return nullcontext() if there == "cpu" else torch.device("cpu")  # which costs time


@contextmanager
def _accelerator(out: Path, recipe: Recipe) -> Iterator[Accelerator]:
    """That of accelerate, whose state is afterwards as it was."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState
    except ImportError as error:
        raise ImportError(
            'training a flow needs accelerate: pip install "ijsat-aug[train]".'
        ) from error
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    known = AcceleratorState._shared_state
    ours = not known
    if known and known.get("_mixed_precision", "no") != "no":
        raise ValueError(
            f"accelerate is set up with mixed_precision={known['_mixed_precision']!r} in this "
            "process, which ruins a flow: train it in a process of its own, with "
            'Recipe(precision="bf16").'
        )
    launched = "LOCAL_RANK" in os.environ  # by torchrun or accelerate launch
    processes = int(os.environ.get("WORLD_SIZE", "1")) if launched else 1
    options: dict[str, Any] = {}
    if processes > 1 and not PartialState._shared_state and not torch.accelerator.is_available():
        options["cpu"] = True  # else it takes every process for the only one
    accelerator = Accelerator(
        mixed_precision="no",  # autocast over a whole flow ruins it; see Recipe.precision
        log_with="tensorboard" if recipe.tensorboard else None,
        project_dir=out / "training",
        **options,
    )
    try:
        if accelerator.num_processes < processes:
            raise RuntimeError(
                f"there are {processes} processes (WORLD_SIZE), and accelerate knows of "
                f"{accelerator.num_processes}: start them with torchrun or accelerate launch, and "
                "let all of them train the flow."
            )
        yield accelerator
        for tracker in accelerator.trackers:
            tracker.finish()
    finally:
        # A process group stays for the next training: torch makes no second one reliably.
        alone = accelerator.num_processes == 1
        if not (alone or grouped):
            atexit.register(_end_group)
        if ours:
            AcceleratorState._reset_state(reset_partial_state=alone)


def _check_place(out: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("resume goes on and overwrite starts anew: choose one of them.")
    check_target(out / TRAINING)
    if overwrite or (resume and (out / TRAINING).exists()):
        return
    if resume and (out / "model.safetensors").exists():
        raise FileNotFoundError(
            f"nothing to go on with: {out / TRAINING} is missing; start anew with overwrite "
            "(--overwrite), or choose another folder."
        )
    for file in (out / TRAINING, out / "model.safetensors"):
        if file.exists():
            raise FileExistsError(
                f"{out} already holds a flow; start anew with overwrite (--overwrite), choose "
                "another folder, or go on with resume (--resume) where training/ is still there."
            )


def _check(data: ImageData, config: GlowConfig, test: ImageData | None) -> None:
    for part in (data, test):
        if part is None:
            continue
        if len(part.images) < 2:
            raise ValueError(
                f"{part.name} holds {len(part.images)} images; a flow needs at least 2."
            )
        if part.images.is_floating_point() or int(part.images.min()) < 0:
            raise TypeError(
                f"{part.name} holds {part.images.dtype} from {float(part.images.min()):.3g}; a "
                "flow is trained on grey levels, integers from 0."
            )
        if tuple(part.images.shape[1:]) != config.shape:
            raise ValueError(
                f"{part.name} holds images of shape {tuple(part.images.shape[1:])}, but the flow "
                f"is built for {config.shape}."
            )
        if config.num_classes is not None and part.labels is None:
            raise ValueError(f"num_classes is set, but {part.name} has no labels.")
        if part.bins != config.bins or int(part.images.max()) >= config.bins:
            raise ValueError(
                f"{part.name} has {part.bins} grey levels, up to {int(part.images.max())}, but the "
                f"flow bins={config.bins}; build it with bins=images.bins."
            )
        if part.labels is not None and not _are_labels(part.labels, len(part.images)):
            raise TypeError(
                f"{part.name} has labels {part.labels.dtype} of shape {tuple(part.labels.shape)}; "
                f"they are integers, one for each of the {len(part.images)} images."
            )
        if config.num_classes is not None and part.labels is not None:
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < 0 or high >= config.num_classes:
                raise ValueError(
                    f"{part.name} has labels {low} to {high}, but num_classes={config.num_classes}."
                )
    if test is None or data.classes == test.classes:
        return
    if config.num_classes is not None or None not in (data.classes, test.classes):
        raise ValueError(
            f"the class folders of {data.name} and {test.name} differ: {data.classes} and "
            f"{test.classes}."
        )


def _are_labels(labels: Tensor, count: int) -> bool:
    whole = not (labels.is_floating_point() or labels.is_complex())
    return whole and labels.shape == (count,)


def _end_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Run:
    """One training: the model, its average, the optimizer, and where it stands."""

    def __init__(
        self,
        data: ImageData,
        config: GlowConfig,
        out: Path,
        recipe: Recipe,
        accelerator: Accelerator,
        resume: bool,
    ) -> None:
        self.config, self.out, self.recipe, self.accelerator = config, out, recipe, accelerator
        self.device = accelerator.device
        self.images = _sum(data.images)
        self.labels = _sum(data.labels if config.num_classes is not None else None)
        count = len(data.images)
        enough = min(_HELD_OUT, count // 5) / count  # to choose by, and to tell a radius
        if data.labels is not None:
            data = dataclasses.replace(data, labels=data.labels.long())
        self.train_data, self.held_out = data.split(max(recipe.held_out, enough), recipe.seed)
        processes = accelerator.num_processes
        if min(recipe.batch_size, self._count) < processes:
            raise ValueError(
                f"{processes} processes share a step of {min(recipe.batch_size, self._count)} "
                "images: some would get none; take a larger batch_size (--batch-size counts those "
                "of all), or fewer processes."
            )
        self.progress = Progress()
        self.state_file = out / TRAINING
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)
            model = build_glow(config).to(self.device)
        resume = resume and self.state_file.is_file()
        if not resume:  # a state brings its own, flags included
            self._initialise(model)
        self.average = AveragedModel(model, multi_avg_fn=_Warming(recipe.ema))
        self.best = {k: v.clone() for k, v in self.average.module.state_dict().items()}
        kinds = {"adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW}
        self.optimizer: Any = kinds[recipe.optimizer](
            model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        if resume:
            self._load(model)
        low = torch.bfloat16 if recipe.precision == "bf16" else None
        warn_if_emulated(low, self.device.type, 'take precision="fp32"')
        _set_compute_dtype(model, low)
        self.model = accelerator.prepare_model(model)
        if recipe.tensorboard:
            accelerator.init_trackers("flow")

    def train(self, display: Display) -> None:
        started = time.monotonic() - self.progress.seconds
        with _patient(self.accelerator.num_processes == 1) as asked_to_stop:
            for u, labels in self._batches():
                self._clock(started)
                done = self._done()
                if done >= 1:
                    break
                loss = self._step(u, labels, done)
                self.progress.step += 1
                display.update(self.progress, done, loss)
                if self.progress.step % self.recipe.every == 0:
                    self._milestone(display, loss)
                elif self.progress.step == 1 and self.accelerator.is_main_process:
                    self._save()  # resume must not find a training that this one has replaced
                if asked_to_stop():
                    self._save()
                    raise KeyboardInterrupt(
                        f"Stopped after {self.progress.step} steps; go on with resume (--resume)."
                    )
        self._clock(started)
        if self.progress.step % self.recipe.every or self.progress.step == 0:
            self._milestone(display, None)

    def best_state(self) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in self.best.items()}

    def summary(self) -> dict[str, Any]:
        return dataclasses.asdict(self.recipe) | {
            "steps": self.progress.step,
            "best_step": self.progress.best_step,
            "skipped_steps": self.progress.skipped,
            "minutes_taken": round(self.progress.seconds / 60, 1),
            "hardware": self._hardware(),
        }

    def _hardware(self) -> str:
        if self.device.type == "cuda":
            return f"{self.accelerator.num_processes} x {torch.cuda.get_device_name(self.device)}"
        return f"{self.accelerator.num_processes} x CPU with {torch.get_num_threads()} threads"

    def _initialise(self, model: nn.Module) -> None:
        """ActNorm takes its scales from the first batch that it sees."""
        first = self.train_data.first(self.recipe.init_images)
        _, height, width = self.config.latent_shapes[0]
        if len(first.images) * height * width < 2:
            raise ValueError(
                f"{len(first.images)} image to begin with is too few for a flow of one place: give "
                "more (init_images), or take fewer levels (--levels)."
            )
        generator = torch.Generator(self.device).manual_seed(self.recipe.seed)
        with torch.no_grad():
            u = dequantize(first.images.to(self.device), self.config.bins, generator)
            model(u, None if first.labels is None else first.labels.to(self.device))
        model.to(self.device)  # normflows replaces a buffer by one on the CPU

    @property
    def _count(self) -> int:
        return len(self.train_data.images)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Endless batches; a pure function of the seed and the step, so that a run can resume."""
        recipe, world = self.recipe, self.accelerator.num_processes
        size = min(recipe.batch_size, self._count)
        per_epoch = self._count // size
        images = self.train_data.images.to(self.device)
        labels = self.train_data.labels
        labels = labels.to(self.device) if labels is not None else None
        while True:
            epoch, position = divmod(self.progress.step, per_epoch)
            shuffler = _generator("cpu", recipe.seed, epoch)
            order = torch.randperm(self._count, generator=shuffler, device="cpu")
            for i in range(position, per_epoch):
                index = order[i * size : (i + 1) * size][self.accelerator.process_index :: world]
                batch, noise = images[index.to(self.device)], self._noise()
                if recipe.flip:
                    mirror = torch.rand(len(batch), generator=noise, device=self.device) < 0.5
                    batch = torch.where(mirror[:, None, None, None], batch.flip(3), batch)
                u = dequantize(batch, self.config.bins, noise)
                yield u, None if labels is None else labels[index.to(self.device)]

    def _noise(self) -> torch.Generator:
        rank = self.accelerator.process_index
        return _generator(self.device, self.recipe.seed, self.progress.step, rank)

    def _clock(self, started: float) -> None:
        seconds = time.monotonic() - started
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            seconds = float(broadcast(torch.tensor(seconds, device=self.device)))
        self.progress.seconds = seconds

    def _done(self) -> float:
        """Share of the budget that is used up."""
        shares = [0.0]
        if self.recipe.minutes is not None:
            shares.append(self.progress.seconds / (60 * self.recipe.minutes))
        if self.recipe.epochs is not None:
            size = min(self.recipe.batch_size, self._count)
            total = max(1, round(self.recipe.epochs * (self._count // size)))
            shares.append(self.progress.step / total)
        return max(shares)

    def _step(self, u: Tensor, labels: Tensor | None, done: float) -> Tensor:
        recipe, parameters = self.recipe, list(self.model.parameters())
        for group in self.optimizer.param_groups:
            # A short training is warm after a tenth of it.
            warm = min(1.0, max((self.progress.step + 1) / max(1, recipe.warmup), 10 * done))
            group["lr"] = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        loss = bits_per_dim(self.model(u, labels).mean(), self.config)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        norm = nn.utils.clip_grad_norm_(parameters, recipe.clip)
        if bool(norm.isfinite()):
            self.optimizer.step()
            self.average.update_parameters(self.accelerator.unwrap_model(self.model))
        else:
            self.progress.skipped += 1
        return loss.detach()

    def _milestone(self, display: Display, loss: Tensor | None) -> None:
        progress = self.progress
        progress.validated = evaluate(self.average.module, self.config, self.held_out)
        if progress.validated < progress.best:
            progress.best, progress.best_step = progress.validated, progress.step
            self.best = {k: v.clone() for k, v in self.average.module.state_dict().items()}
        values = {"held-out bits/dim": progress.validated}
        if loss is not None:
            values["bits/dim"] = float(loss)
        self.accelerator.log(values, step=progress.step)
        if self.accelerator.is_main_process:
            self._save()
            self._draw()
        display.report(progress)
        self.accelerator.wait_for_everyone()

    def _draw(self) -> None:
        try:
            flow = freeze(self.config, self.average.module.state_dict(), device=self.device)
        except (ValueError, LinAlgError) as error:
            raise ValueError(
                "the training diverged, and its flow has no inverse: begin again with a smaller "
                "lr (--lr)."
            ) from error
        save_pictures(flow, self.held_out, self.out / "training")

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        groups = {
            "model": model.state_dict(),
            "average": self.average.state_dict(),
            "best": self.best,
            "optimizer": {
                f"{i}.{key}": value
                for i, slots in self.optimizer.state_dict()["state"].items()
                for key, value in slots.items()
            },
        }
        return {
            f"{group}/{key}": value.detach().cpu().contiguous()
            for group, values in groups.items()
            for key, value in values.items()
        }

    def _identity(self) -> dict[str, Any]:
        """What must not change when a training goes on: else held-out images were trained on.

        Nor what its card says of it.
        """
        settings = (
            "seed", "held_out", "batch_size", "optimizer", "lr", "weight_decay", "warmup", "ema",
            "clip", "flip",
        )  # fmt: skip
        return {name: getattr(self.recipe, name) for name in settings} | {
            "network": self.config.to_dict(),
            "images": self.images,
            "labels": self.labels,
        }

    def _save(self) -> None:
        from safetensors.torch import save

        state = self._identity() | {"progress": dataclasses.asdict(self.progress)}
        tensors = self._tensors(self.accelerator.unwrap_model(self.model))
        write_atomically(self.state_file, save(tensors, metadata={"state": json.dumps(state)}))

    def _load(self, model: nn.Module) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.state_file, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.state_file} is damaged ({error}); start anew with overwrite."
            ) from error
        for key, value in self._identity().items():
            before = state.get(key)
            if isinstance(before, dict) and isinstance(value, dict):  # what differs alone
                names = [name for name in value if before.get(name) != value[name]]
                before, value = ({name: one.get(name) for name in names} for one in (before, value))
            if before != value:
                raise ValueError(
                    f"{self.state_file} belongs to another training: its {key} was {before}, now "
                    f"it is {value}; resume with its settings or choose another output folder."
                )

        def group(name: str) -> dict[str, Tensor]:
            return {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{name}/")}

        model.load_state_dict(group("model"))
        self.average.load_state_dict(group("average"))
        self.best = {k: v.to(self.device) for k, v in group("best").items()}
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in group("optimizer").items():
            index, slot = key.split(".", 1)
            slots.setdefault(int(index), {})[slot] = value
        known = self.optimizer.state_dict()
        self.optimizer.load_state_dict(known | {"state": slots})
        self.progress = Progress(**state["progress"])


@contextmanager
def _patient(alone: bool) -> Iterator[Callable[[], bool]]:
    """Whether somebody asked to stop (Ctrl-C, or a scheduler): a step ends before that is done.

    A second Ctrl-C does not wait, nor do several processes, which would wait for each other.
    """
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if not alone or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    # Not those that are ignored, as in a job behind a shell, or that are not Python's.
    kinds = [k for k in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(k))
             or signal.getsignal(k) is signal.SIG_DFL]  # fmt: skip
    before = [signal.signal(kind, note) for kind in kinds]
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _sum(tensor: Tensor | None) -> str | None:
    """The sha256 of its values."""
    return None if tensor is None else hashlib.sha256(tensor.contiguous().numpy().data).hexdigest()


def _generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator that a seed and a place in the training fix."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


class _Warming:
    """Exponential moving average whose decay grows from 0, so that the start is forgotten."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    @torch.no_grad()
    def __call__(self, averages: Any, currents: Any, count: Any) -> None:
        n = float(count)
        weight = 1 - min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(averages), list(currents), weight)


def _set_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    for module in model.modules():
        if isinstance(module, ClampedNet):
            module.compute_dtype = dtype
