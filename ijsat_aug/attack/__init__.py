"""The inner maximisation: climb a model's loss over a few variables, inside small balls."""

from .ascent import Ascent, Deferred, Landscape, Picture, Pixels, Variable, ascend
from .balls import Ball, L2Ball, LinfBall, unit_ball
from .clip import clip
from .friendly import ascend_friendly
from .model import ModelHandle
from .objectives import binary_cross_entropy, cross_entropy, kl_divergence, margin

__all__ = [
    "Ascent",
    "Ball",
    "Deferred",
    "L2Ball",
    "Landscape",
    "LinfBall",
    "ModelHandle",
    "Picture",
    "Pixels",
    "Variable",
    "ascend",
    "ascend_friendly",
    "binary_cross_entropy",
    "clip",
    "cross_entropy",
    "kl_divergence",
    "margin",
    "unit_ball",
]
