"""Helpers of the outer loop, each usable alone."""

from .awp import AdversarialWeightPerturbation
from .batchnorm import auxiliary_batchnorm, convert_split_batchnorm
from .captured import CapturedStep
from .captured_transform import CapturedTransform
from .loader import AugmentedLoader, collate
from .losses import IATLoss, MARTLoss, TRADESLoss

__all__ = [
    "AdversarialWeightPerturbation",
    "AugmentedLoader",
    "CapturedStep",
    "CapturedTransform",
    "IATLoss",
    "MARTLoss",
    "TRADESLoss",
    "auxiliary_batchnorm",
    "collate",
    "convert_split_batchnorm",
]
