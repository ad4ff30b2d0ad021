"""The README of a checkpoint: what it is, how good it is, how far eta moves a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .registry import is_ours

__all__ = ["render"]


def render(card: Mapping[str, Any]) -> str:
    """The card of a ``config.json`` as Markdown.

    Example:
        >>> from ijsat_aug.flows.checkpoint import load_flow
        >>> render(load_flow("digits").info).splitlines()[0]
        '# Flow `digits`'
    """
    net = card["architecture"]
    size = "x".join(map(str, net["shape"]))
    sections = [
        f"# Flow `{card['name']}`",
        f"A Glow for {size} images: {net['levels']} levels of {net['steps']} steps, hidden width "
        f"{net['hidden']}, {card['weights']['bytes'] / 1e6:.1f} MB.",
        "```python\nfrom ijsat_aug import load_flow\n\n"
        f"flow = {_call(card)}\n"
        "z = flow.encode(x)  # exact, standardised latents (B, D)\n"
        "x = flow.decode(z)  # differentiable once\n```",
        f"* Data: {card['data']}\n* Licence of the weights: {card['license']}\n"
        f"* sha256 of `model.safetensors`: `{card['weights']['sha256']}`",
    ]
    if card["metrics"]:
        sections += ["## Quality", _metrics(card["metrics"])]
    if {"linf", "l2", "recommended", "images"} <= card["calibration"].keys():
        sections += ["## How far eta moves a picture", *_calibration(card["calibration"])]
    if card["training"]:
        lines = [
            f"* {k.replace('_', ' ')}: {v}" for k, v in card["training"].items() if v is not None
        ]
        sections += ["## Training", "\n".join(lines)]
    return "\n\n".join(sections) + "\n"


def _call(card: Mapping[str, Any]) -> str:
    name = card["name"]
    if is_ours(name, card["weights"]["sha256"]):  # not another flow of the same name
        return f'load_flow("{name}")  # or the path of this folder'
    return f'load_flow("path/to/{name}")  # this folder'


def _metrics(metrics: Mapping[str, Any]) -> str:
    known, lines = dict(metrics), []
    counts = known.pop("images", {})
    if isinstance(known.get("bits_per_dim"), Mapping):
        for split, value in known.pop("bits_per_dim").items():
            count = counts.get(split)
            on = f" ({count:,} images)" if count else ""
            lines.append(f"* {value:.3f} bits/dim on the {split.replace('_', '-')} split{on}")
    if isinstance(known.get("round_trip"), Mapping):
        trip = known.pop("round_trip")
        parts = ", ".join(f"{v:.1e} on {k}" for k, v in trip.items())
        lines.append(f"* Largest round-trip error in float32: {parts} images")
    lines += [f"* {name.replace('_', ' ')}: {value}" for name, value in known.items()]
    return "\n".join(lines)


def _calibration(table: Mapping[str, Any]) -> list[str]:
    blocks = [
        f"Measured on {table['images']} images: medians of |G(z + λ) − x| over the images, in "
        "units of 1/255. "
        "`random`: a random corner (L-inf) or point of the sphere (L2); `gradient`: one step along "
        "the loss gradient of a small network; `worst`: ascent of the displacement itself. "
        "`outside`: pixels beyond [0, 1] by more than half a grey level."
    ]
    for norm, title in (("linf", "L-inf"), ("l2", "L2")):
        rows = [
            f"| η ({title}) | random: max / RMS | gradient: max / RMS | worst: max / RMS | "
            "outside, worst | not finite, worst |",
            "|---|---|---|---|---|---|",
        ]
        for row in table[norm]:
            cells = [_moves(row[kind]) for kind in ("random", "gradient", "worst")]
            outside, lost = row["worst"]["out_of_range"], row["worst"]["non_finite"]
            outside = "–" if outside is None else f"{outside:.1%}"
            rows.append(f"| {row['eta']:.4g} | {' | '.join(cells)} | {outside} | {lost:.1%} |")
        blocks.append("\n".join(rows))
    wanted = table["recommended"]
    blocks.append(
        f"Recommended η: {wanted['linf']:.3g} (L-inf) or {wanted['l2']:.3g} (L2), where a gradient "
        "step moves pixels by an RMS of 8/255."
    )
    return blocks


def _moves(cell: Mapping[str, float | None]) -> str:
    largest, rms = cell["pixel_linf"], cell["pixel_rms"]
    if largest is None or rms is None:
        return "–"
    return f"{255 * largest:.1f} / {255 * rms:.1f}"
