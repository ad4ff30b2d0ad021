"""The spaces by name, with their usual budgets and steps."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .colour import recolor
from .gabor import gabor
from .jpeg import jpeg_l1, jpeg_linf
from .perceptual import lpips
from .space import SpaceInfo
from .warp import elastic, stadv
from .weather import fog, snow

__all__ = ["SPACES"]

_PAT = "Laidlaw et al. (PAT), 2021"
_UAR = "Kang et al. (UAR), 2019; budget as L∞ 8/255"
_OURS = "Kang et al. (UAR), 2019; budget calibrated here, at 32 pixels"

SPACES: Mapping[str, SpaceInfo] = MappingProxyType(
    {
        "stadv": SpaceInfo("StAdv", stadv, 0.05, 50, _PAT),
        "recolor": SpaceInfo("ReColor", recolor, 0.06, 50, _PAT),
        "elastic": SpaceInfo(
            "Elastic", elastic, 1.0, 50, _UAR, (0.125, 0.25, 0.5, 1.0, 2.0, 8.0), 4.0
        ),
        "jpeg_linf": SpaceInfo(
            "JPEG L∞", jpeg_linf, 0.25, 50, _UAR, (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0), 0.5
        ),
        "jpeg_l1": SpaceInfo(
            "JPEG L1", jpeg_l1, 256.0, 50, _UAR, (2.0, 8.0, 64.0, 256.0, 512.0, 1024.0), 16384.0
        ),
        "fog": SpaceInfo("Fog", fog, 0.193, 50, _OURS),
        "snow": SpaceInfo("Snow", snow, 0.42, 50, _OURS),
        "gabor": SpaceInfo("Gabor", gabor, 0.162, 50, _OURS),
        "lpips": SpaceInfo("LPIPS", lpips, 0.5, 40, _PAT),
    }
)
"""Name -> space, with the budgets of images of about 32 pixels and, of UAR's, of 224.

Steps: sources take 100 or 200. Of an adversarially trained ResNet these leave at 50 steps what they
leave at 100, to 2 % of the images.

Budgets of fog, snow and gabor (benchmarks/robustness/calibrate.py, 2026-11-21): the smallest that
bring an ordinary ResNet for CIFAR-10, right on 87 %, down to chance. To reach the 0 % (+ 1) that
L-inf 8/255 leaves it, fog needs 0.31 and gabor 0.297; snow stays above, at 2 % from 0.77 on. There
snow and gabor begin to hide what is seen, and at the default budgets they do not.
"""
