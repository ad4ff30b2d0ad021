"""The manifold: build, train, freeze, save, load and calibrate normalizing flows."""

from .adapters import Decoder, NormflowsManifold
from .calibration import calibrate, matching_eta, recommended_eta, round_trip
from .checkpoint import convert_checkpoint, load_flow, load_state, save_flow
from .data import ImageData, load_images
from .fold import freeze
from .frozen import FrozenGlow, Tape
from .glow import GlowConfig, build_glow
from .manifold import Manifold
from .pyramid import Pyramid, Tiles
from .recipe import Recipe
from .registry import CheckpointError, list_flows
from .trainer import train_flow

__all__ = [
    "CheckpointError",
    "Decoder",
    "FrozenGlow",
    "GlowConfig",
    "ImageData",
    "Manifold",
    "NormflowsManifold",
    "Pyramid",
    "Recipe",
    "Tape",
    "Tiles",
    "build_glow",
    "calibrate",
    "convert_checkpoint",
    "freeze",
    "list_flows",
    "load_flow",
    "load_images",
    "load_state",
    "matching_eta",
    "recommended_eta",
    "round_trip",
    "save_flow",
    "train_flow",
]
