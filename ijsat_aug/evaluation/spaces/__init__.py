"""Unseen threats: each a space of images around the clean one, that ``ascend`` searches."""

from .colour import recolor
from .gabor import gabor
from .jpeg import jpeg_l1, jpeg_linf
from .l1 import L1Ball
from .perceptual import (
    PerceptualBall,
    alexnet_distance,
    feature_distance,
    lpips,
    perceptual,
)
from .space import Space, SpaceInfo
from .table import SPACES
from .warp import elastic, stadv
from .weather import fog, snow

__all__ = [
    "SPACES",
    "L1Ball",
    "PerceptualBall",
    "Space",
    "SpaceInfo",
    "alexnet_distance",
    "elastic",
    "feature_distance",
    "fog",
    "gabor",
    "jpeg_l1",
    "jpeg_linf",
    "lpips",
    "perceptual",
    "recolor",
    "snow",
    "stadv",
]
