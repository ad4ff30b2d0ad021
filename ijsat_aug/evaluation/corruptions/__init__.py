"""Common corruptions at five severities: made on any device, or read from files of CIFAR-10-C."""

from .apply import CORRUPTIONS, Corruption, corrupt
from .files import CorruptionFiles
from .ice import ice_pictures, load_pictures
from .scores import CorruptionScore, corruption_score
from .severities import EXTRA, LARGE, SEVERITIES, SMALL, STANDARD

__all__ = [
    "CORRUPTIONS",
    "EXTRA",
    "LARGE",
    "SEVERITIES",
    "SMALL",
    "STANDARD",
    "Corruption",
    "CorruptionFiles",
    "CorruptionScore",
    "corrupt",
    "corruption_score",
    "ice_pictures",
    "load_pictures",
]
