"""The transforms as pure functions: ``from ijsat_aug.functional import robust_mixup``."""

from .transforms.functional import joint_space_adv, robust_mixup

__all__ = ["joint_space_adv", "robust_mixup"]
