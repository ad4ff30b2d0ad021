"""The command line: demo, show, evaluate, inspect, train-flow, convert."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .words import number

app = typer.Typer(
    name="ijsat-aug",
    help="Adversarial data augmentation on the manifold of a normalizing flow.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)


class Optimizer(str, Enum):
    """Optimizers of ``train-flow``."""

    adamax = "adamax"
    adamw = "adamw"


class Precision(str, Enum):
    """Precisions of the coupling networks in ``train-flow``."""

    fp32 = "fp32"
    bf16 = "bf16"


Normalisation = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Normalisation of the model.")
]
Root = Annotated[Path | None, typer.Option(help="Where torchvision data lie.")]
Size = Annotated[int | None, typer.Option(min=1, help="Resize and crop images to this.")]
Weights = Annotated[
    str | None, typer.Option(help="State dict: a file, file.pt:key, or torchvision's own: DEFAULT.")
]


@contextmanager
def _plain_errors(stopped: str = "Stopped.") -> Iterator[None]:
    """The user's mistakes are one sentence; ours keep their traceback."""
    try:
        yield
    except Exception as error:
        if not _is_plain(error):
            raise
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as stop:
        typer.secho(str(stop) or stopped, fg="yellow", err=True)
        raise typer.Exit(130) from None


def _is_plain(error: Exception) -> bool:
    """Whether the message was written for the user: by us, or by the file system."""
    from .flows.registry import CheckpointError

    if isinstance(error, (CheckpointError, OSError)):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = None if trace is None else trace.tb_frame.f_globals.get("__package__")
    ours = package is not None and package.startswith("ijsat_aug")  # a script has none
    return ours and isinstance(error, (ValueError, TypeError, ImportError))


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Adversarial data augmentation on the manifold of a normalizing flow."""
    for stream in (sys.stdout, sys.stderr):  # which may know no more than the letters of Latin
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if version:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


def _words(text: str) -> list[str]:
    """Names with commas between them, or none."""
    return [] if text == "none" else [part.strip() for part in text.split(",")]


def _numbers(text: str | None) -> tuple[float, ...] | None:
    """Numbers with commas between them."""
    return None if text is None else tuple(number(part) for part in text.split(","))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo"),
    flow: Annotated[str, typer.Option(help="Flow of 8x8 digits.")] = "digits",
    epochs: Annotated[int, typer.Option(min=1, help="Of each of the four trainings.")] = 12,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train on real digits plainly, with mixup, RobustMixup and IJSAT: a table and a picture."""
    from .demo import run

    with _plain_errors():
        run(out, flow, epochs, seed)


@app.command()
def show(
    images: Annotated[
        str, typer.Argument(help="A folder of images, an .npy or .npz file, or 'digits'.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="'module:function' or 'file.py:function' that returns the model, or the name of "
            "a torchvision classifier; by default a small network, trained on the images."
        ),
    ] = None,
    weights: Weights = None,
    flow: Annotated[
        str | None, typer.Option(help="Name, folder, or 'owner/name' on the hub.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("gallery.png"),
    rows: Annotated[int, typer.Option(min=1, help="How many images.")] = 6,
    size: Annotated[
        int | None, typer.Option(min=1, help="Resize and crop to this; by default the flow's size.")
    ] = None,
    eps: Annotated[str, typer.Option(help="Pixel radius, in [0, 1] pixels.")] = "8/255",
    eta: Annotated[
        float | None, typer.Option(help="Latent radius; by default the calibrated one.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of every attack.")] = 5,
    mean: Normalisation = None,
    std: Normalisation = None,
    seed: Annotated[int, typer.Option(help="Which images.")] = 0,
) -> None:
    """Draw what the attacks do to your images, with your model and your flow."""
    from .show import run

    with _plain_errors():
        run(
            images, out, model=model, weights=weights, flow=flow, rows=rows, size=size,
            eps=number(eps), eta=eta, steps=steps, mean=_numbers(mean), std=_numbers(std),
            seed=seed,
        )  # fmt: skip
    typer.echo(f"Wrote {out}.")


@app.command()
def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            help="Test images: a folder with one folder for each class, an .npz file, 'digits', or "
            "the name of a torchvision dataset such as CIFAR10."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="'module:function' or 'file.py:function' that returns the model, or the name of "
            "a torchvision classifier."
        ),
    ],
    weights: Weights = None,
    flow: Annotated[
        str | None,
        typer.Option(help="For threats along its manifold: name, folder, or 'owner/name'."),
    ] = None,
    threats: Annotated[
        str,
        typer.Option(
            help="'quick' (no AutoAttack), 'standard', 'unseen', 'all', 'none', or names such as "
            "'linf=4/255@20,autoattack=4/255,jsa,fog', as name=budget@steps."
        ),
    ] = "all",
    corruptions: Annotated[
        str, typer.Option(help="'standard' (15), 'all' (19), 'none', or names with commas.")
    ] = "standard",
    corruption_files: Annotated[
        Path | None,
        typer.Option(help="Folder in the layout of CIFAR-10-C: read, or written at first."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many images; AutoAttack is slow.")] = 1000,
    root: Root = None,
    size: Size = None,
    mean: Normalisation = None,
    std: Normalisation = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Halved where the memory does not suffice.")
    ] = 250,
    device: Annotated[str | None, typer.Option(help="By default a GPU, if there is one.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in tables.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="JSON of another model on the same images, to compare.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps each finished threat; run again to go on there."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a table in Markdown.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with pictures.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Measure what a model withstands: attacks, unseen threats and corruptions, in one table."""
    from .evaluation.command import run

    kept = "nothing was kept, as it is with --out FOLDER"
    if out is not None:
        kept = f"what is finished lies in {out}, and the same command goes on there"
    with _plain_errors(f"Stopped: {kept}."):
        report, other = run(
            data, model=model, weights=weights, name=name, flow=flow, threats=_words(threats),
            corruptions=_words(corruptions), corruption_files=corruption_files, limit=limit,
            root=root, size=size, mean=_numbers(mean), std=_numbers(std), batch_size=batch_size,
            device=device, seed=seed, against=against, folder=out, overwrite=overwrite,
            json=json_file, markdown=markdown, html=html, progress=not quiet,
        )  # fmt: skip
        from rich.console import Console

        from .evaluation.render import to_table

        Console().print(to_table(report, other))
    for path in (json_file, markdown, html):
        if path is not None:
            typer.echo(f"Wrote {path}.")


@app.command()
def inspect(
    flow: Annotated[str, typer.Argument(help="Name, folder, or 'owner/name' on the hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print config.json.")] = False,
) -> None:
    """Verify a flow checkpoint and show what is in it."""
    from .flows.checkpoint import load_flow

    with _plain_errors():
        loaded = load_flow(flow)
        if as_json:
            typer.echo(json.dumps(dict(loaded.info), indent=1))
            return
        from rich.console import Console
        from rich.markdown import Markdown

        from .flows.card import render

        try:
            card = render(loaded.info)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the card of {flow} has lost parts, though its weights are whole: see what is "
                "there with --json."
            ) from error
        Console().print(Markdown(card))


@app.command("train-flow")
def train_flow(
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of images, an .npy or .npz file, 'digits', or the name of a "
            "torchvision dataset such as CIFAR10."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    minutes: Annotated[float | None, typer.Option(help="Time budget.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    test: Annotated[
        str | None, typer.Option(help="Test images, measured once at the end; like DATA.")
    ] = None,
    root: Root = None,
    size: Size = None,
    name: Annotated[str | None, typer.Option(help="Name for the card.")] = None,
    data_name: Annotated[str | None, typer.Option(help="What the card calls the data.")] = None,
    license: Annotated[str, typer.Option(help="Licence of the weights.")] = "unspecified",
    levels: Annotated[int, typer.Option(help="Scales of the flow.")] = 3,
    steps: Annotated[int, typer.Option(help="Glow blocks per level.")] = 16,
    hidden: Annotated[int, typer.Option(help="Width of the coupling networks.")] = 64,
    patch: Annotated[int, typer.Option(help="Pixels become channels by patches of this edge.")] = 2,
    logit: Annotated[
        float | None, typer.Option(help="Logit transform of the pixels, e.g. 0.05.")
    ] = None,
    class_conditional: Annotated[
        bool, typer.Option("--class-conditional", help="One base density per class.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images per step, over all processes.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    optimizer: Annotated[Optimizer, typer.Option(help="Optimizer.")] = Optimizer.adamax,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.0,
    warmup: Annotated[int, typer.Option(help="Warm-up steps.")] = 200,
    ema: Annotated[float, typer.Option(help="Decay of the weight average.")] = 0.999,
    clip: Annotated[float, typer.Option(help="Largest gradient norm (bits/dim).")] = 20.0,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images at random.")] = False,
    precision: Annotated[
        Precision, typer.Option(help="Of the coupling networks.")
    ] = Precision.fp32,
    held_out: Annotated[float, typer.Option(help="Share that chooses the weights.")] = 0.02,
    every: Annotated[int, typer.Option(help="Steps between validations and pictures.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write logs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a flow on your images. Runs alone, or under `accelerate launch` and `torchrun`."""
    from .flows.checkpoint import TRAINING, WEIGHTS
    from .flows.data import load_images
    from .flows.glow import GlowConfig
    from .flows.recipe import Recipe
    from .flows.registry import list_flows
    from .flows.trainer import train_flow as train

    with _plain_errors("Stopped: the same command goes on with --resume."):
        recipe = Recipe(
            minutes=minutes, epochs=epochs, batch_size=batch_size, lr=lr,
            optimizer=optimizer.value, weight_decay=weight_decay, warmup=warmup, ema=ema,
            clip=clip, flip=flip, precision=precision.value, held_out=held_out, every=every,
            seed=seed, tensorboard=tensorboard,
        )  # fmt: skip
        images = load_images(data, size=size, root=root)
        images = replace(images, name=data_name or images.name)
        test_images = load_images(test, size=size, root=root, train=False) if test else None
        config = GlowConfig(
            shape=_shape(images.images), levels=levels, steps=steps, hidden=hidden,
            patch=patch, bins=images.bins, logit=logit,
            num_classes=_classes(images.labels) if class_conditional else None,
        )  # fmt: skip
        if resume and not any((out / file).exists() for file in (TRAINING, WEIGHTS)):
            typer.secho(f"Nothing to go on with in {out}: a new training.", fg="yellow", err=True)
        train(
            images, config, out, recipe, test=test_images, resume=resume, overwrite=overwrite,
            name=name, license=license, quiet=quiet,
        )  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0:
        place = f"./{out}" if str(out) in list_flows() else str(out)  # a name is that of ours
        typer.echo(f"Wrote {out}; look at {out / 'samples.png'}, use load_flow({place!r}).")


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="Legacy .pt state dict of build_glow's network.")],
    config: Annotated[
        Path, typer.Argument(help="JSON file of the GlowConfig, or a config.json of ours.")
    ],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    data: Annotated[str, typer.Option(help="What it was trained on.")] = "unspecified",
    license: Annotated[str, typer.Option(help="Licence of the weights.")] = "unspecified",
) -> None:
    """Convert a legacy .pt file into a checkpoint folder, without unpickling any object."""
    from .flows.checkpoint import convert_checkpoint
    from .flows.glow import GlowConfig

    with _plain_errors():
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config} is no JSON file: {error}.") from None
        if isinstance(values, dict):
            values = values.get("architecture", values)  # of a flow's own config.json
        convert_checkpoint(file, GlowConfig.from_dict(values), out, data=data, license=license)
    typer.echo(f"Wrote {out}.")


def _shape(images: Any) -> tuple[int, int, int]:
    _, channels, height, width = images.shape
    return channels, height, width


def _classes(labels: Any) -> int:
    if labels is None:
        raise ValueError("--class-conditional needs labels, and these data have none.")
    return int(labels.max()) + 1
