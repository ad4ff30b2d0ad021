"""Adversarial data augmentation on the manifold of a normalizing flow."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import attack, evaluation, flows, functional, training, transforms
    from .flows.checkpoint import load_flow, save_flow
    from .flows.frozen import FrozenGlow
    from .flows.glow import GlowConfig
    from .flows.recipe import Recipe
    from .flows.registry import CheckpointError, list_flows
    from .flows.trainer import train_flow
    from .training.loader import AugmentedLoader
    from .transforms.batch import BatchTransform
    from .transforms.joint_space import JointSpaceAdv
    from .transforms.robust_mixup import RobustMixup

__version__ = "0.1.0.dev0"

# Loaded on first use, so that the import costs no more than torch.
_HOMES = {
    "AugmentedLoader": "training.loader",
    "BatchTransform": "transforms.batch",
    "CheckpointError": "flows.registry",
    "FrozenGlow": "flows.frozen",
    "GlowConfig": "flows.glow",
    "JointSpaceAdv": "transforms.joint_space",
    "Recipe": "flows.recipe",
    "RobustMixup": "transforms.robust_mixup",
    "list_flows": "flows.registry",
    "load_flow": "flows.checkpoint",
    "save_flow": "flows.checkpoint",
    "train_flow": "flows.trainer",
}

_ROOMS = ("attack", "evaluation", "flows", "functional", "training", "transforms")

__all__ = [
    "AugmentedLoader",
    "BatchTransform",
    "CheckpointError",
    "FrozenGlow",
    "GlowConfig",
    "JointSpaceAdv",
    "Recipe",
    "RobustMixup",
    "attack",
    "evaluation",
    "flows",
    "functional",
    "list_flows",
    "load_flow",
    "save_flow",
    "train_flow",
    "training",
    "transforms",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
