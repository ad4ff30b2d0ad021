"""The spaces by name, with their usual budgets and steps.

Fog, Snow and Gabor have no budgets for CIFAR-10 in their sources. Theirs bring an undefended ResNet
from 86.5 % to 10 %, which is chance (``benchmarks/robustness/calibrate.py``, 2026-11-21). L-inf
8/255 leaves it 0 %; as hard as that are fog 0.31 and gabor 0.30, whose waves hide small things,
while snow ends at 1.4 % from 0.77, where streaks cover the image.
"""

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

_PAT = "Laidlaw et al., Perceptual Adversarial Robustness (PAT), ICLR 2021"
_UAR = "Kang et al., Testing Robustness Against Unforeseen Adversaries (UAR), 2019"
_OURS = f"{_UAR}; budget: undefended network at chance"

SPACES: Mapping[str, SpaceInfo] = MappingProxyType(
    {
        "stadv": SpaceInfo(stadv, 0.05, 50, _PAT),
        "recolor": SpaceInfo(recolor, 0.06, 50, _PAT),
        "elastic": SpaceInfo(elastic, 1.0, 50, _UAR, (0.125, 0.25, 0.5, 1.0, 2.0, 8.0)),
        "jpeg_linf": SpaceInfo(jpeg_linf, 0.25, 50, _UAR, (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)),
        "jpeg_l1": SpaceInfo(jpeg_l1, 256.0, 50, _UAR, (2.0, 8.0, 64.0, 256.0, 512.0, 1024.0)),
        "fog": SpaceInfo(fog, 0.19, 50, _OURS),
        "snow": SpaceInfo(snow, 0.42, 50, _OURS),
        "gabor": SpaceInfo(gabor, 0.16, 50, _OURS),
        "lpips": SpaceInfo(lpips, 0.5, 40, _PAT),
    }
)
