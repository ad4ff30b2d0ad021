"""What a user puts into a pipeline: batch transforms, and their functional twins."""

from . import functional
from .batch import BatchTransform
from .joint_space import JointSpaceAdv
from .robust_mixup import RobustMixup

__all__ = ["BatchTransform", "JointSpaceAdv", "RobustMixup", "functional"]
