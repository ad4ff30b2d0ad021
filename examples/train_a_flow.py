"""Train a flow on your own images, from Python; about two minutes on one core.

Run:  python examples/train_a_flow.py             (scikit-learn's digits, 2 minutes)
      python examples/train_a_flow.py FOLDER      (a folder of images, resized to 32 pixels)

It shows the three things that one needs: images, a config, a recipe. The result is a checkpoint
folder for `load_flow`, with samples to look at.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ijsat_aug.flows import GlowConfig, Recipe, load_flow, load_images, train_flow


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", nargs="?", default="digits")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("runs/flow"))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--resume", action="store_true", help="go on where it was stopped")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()

    if options.source == "digits":
        images, test = load_images("digits"), load_images("digits", train=False)
        config = GlowConfig(shape=(1, 8, 8), levels=2, steps=8, bins=images.bins, logit=0.05)
        recipe = Recipe(
            minutes=options.minutes, batch_size=128, lr=4e-3, optimizer="adamw", weight_decay=0.1,
            warmup=100, ema=0.99, held_out=0.08, every=100,
        )  # fmt: skip
    else:
        images, test = load_images(options.source, size=32), None
        config = GlowConfig(shape=(images.images.shape[1], 32, 32))
        recipe = Recipe(minutes=options.minutes, lr=3e-3, flip=True, precision=options.precision)

    folder = train_flow(
        images, config, options.out, recipe, test=test, resume=options.resume,
        overwrite=options.overwrite,
    )  # fmt: skip
    flow = load_flow(folder)
    print(flow)
    print("bits/dim:", flow.info["metrics"]["bits_per_dim"])
    print("eta for a pixel RMS of 8/255:", flow.info["calibration"]["recommended"])
    print("look at", folder / "samples.png")


if __name__ == "__main__":
    main()
