"""What a user puts into a pipeline: batch transforms, and their functional twins."""

from . import functional
from .batch import BatchTransform
from .joint_space import JointSpaceAdv

__all__ = ["BatchTransform", "JointSpaceAdv", "functional"]
