"""The augmentations that the accuracy studies compare, by the names of their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.training import LOW, Labelled
from ijsat_aug import JointSpaceAdv, RobustMixup
from ijsat_aug.flows.calibration import recommended_eta
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.training import convert_split_batchnorm

CLASSES = 10
PARTS = 20  # of a training: the "epochs" in which an attack begins and ends


@dataclass
class Augmentation:
    """What becomes of the batches of a training.

    Attributes:
        transform: That of the :class:`~ijsat_aug.training.AugmentedLoader`.
        loading: Its options.
        before: What becomes of batches on the host, before the loader gets them.
    """

    transform: Callable[[Any], Any]
    loading: dict[str, Any]
    before: Callable[[Tensor, Tensor], Labelled] | None = None


Make = Callable[[nn.Module, FrozenGlow], Augmentation]


def _plain(network: nn.Module, flow: FrozenGlow) -> Augmentation:
    return Augmentation(lambda batch: batch, {})


def _ours(transform: Callable[[Any], Any], begin: int = 0) -> Augmentation:
    return Augmentation(transform, {"epochs": (begin, None)})


def _torchvision(kind: type[v2.MixUp | v2.CutMix], *_: object) -> Augmentation:
    return Augmentation(lambda batch: batch, {}, kind(alpha=1.0, num_classes=CLASSES))


def _noise(network: nn.Module, flow: FrozenGlow) -> Augmentation:
    """Random moves in the latent space; an attack of the same radius moves five times as far."""
    eta = 5 * recommended_eta(flow, "linf")
    return _ours(JointSpaceAdv(network, flow, eps=0, eta=eta, steps=0, **LOW))


def _attack(
    network: nn.Module, flow: FrozenGlow, split: bool = False, begin: int = 0, **options: Any
) -> Augmentation:
    """``JointSpaceAdv`` alone; split: beside the clean images, with a BatchNorm of its own."""
    return _ours(JointSpaceAdv(network, flow, **_routed(network, split), **LOW, **options), begin)


def _blend(
    network: nn.Module,
    flow: FrozenGlow,
    split: bool = False,
    begin: int = 0,
    eps: float = 1 / 255,
    **options: Any,
) -> Augmentation:
    """``RobustMixup`` around ``JointSpaceAdv``, in pixels alone with ``eta=0``."""
    attack = JointSpaceAdv(network, flow, eps=eps, **LOW, **options)
    routed = _routed(network, split)
    return _ours(RobustMixup(network, num_classes=CLASSES, attack=attack, **routed), begin)


def _mixup_of_each(network: nn.Module, flow: FrozenGlow) -> Augmentation:
    """The blends that ours begin with: every image has a weight of its own, not every batch."""
    return _ours(RobustMixup(network, num_classes=CLASSES, eps=0))


def _after_cutmix(network: nn.Module, flow: FrozenGlow, **options: Any) -> Augmentation:
    cutmix = v2.CutMix(alpha=1.0, num_classes=CLASSES)
    return replace(_attack(network, flow, **options), before=cutmix)


def _routed(network: nn.Module, split: bool) -> dict[str, Any]:
    if split:
        convert_split_batchnorm(network)
    return {"mode": "append"} if split else {}


def _replay(network: nn.Module, flow: FrozenGlow, **loading: Any) -> Augmentation:
    """A latent step along the gradient of the training step, in every other step."""
    latent = JointSpaceAdv(None, flow, eps=0)
    transform = RobustMixup(network, num_classes=CLASSES, attack=latent)
    return Augmentation(transform, {"replay": 2, **loading})


# A latent step away from the model's own prediction, which may be wrong.
_own: dict[str, Any] = {"eps": 0, "target": "prediction"}
_joint = partial(_attack, target="prediction")
_half = PARTS // 2

LATENT, MIXED = "latent step, second half", "mixup + latent step, second half"
EACH = "mixup, a weight an image"
LONG = "{}, for as long as {}"
NOT_OURS = ("plain", "mixup", EACH, "CutMix")
ROWS: dict[str, Make] = {
    "plain": _plain,
    "mixup": partial(_torchvision, v2.MixUp),
    EACH: _mixup_of_each,
    "CutMix": partial(_torchvision, v2.CutMix),
    "latent noise": _noise,
    "OM": partial(_attack, eps=0),
    "pixel step": partial(_attack, eta=0),
    "JointSpaceAdv": _attack,
    "RobustMixup": partial(_blend, eta=0),
    "IJSAT": _blend,
    "OM, split BatchNorm": partial(_attack, eps=0, split=True),
    "pixel step, split BatchNorm": partial(_attack, eta=0, split=True),
    "JointSpaceAdv, split BatchNorm": partial(_attack, split=True),
    "RobustMixup, split BatchNorm": partial(_blend, eta=0, split=True),
    "IJSAT, split BatchNorm": partial(_blend, split=True),
    "OM, second half": partial(_attack, eps=0, begin=_half),
    "mixup + OM": partial(_blend, eps=0),
    "mixup + OM, second half": partial(_blend, eps=0, begin=_half),
    "latent step": partial(_attack, **_own),
    LATENT: partial(_attack, begin=_half, **_own),
    "joint step": _joint,
    "joint step, second half": partial(_joint, begin=_half),
    "joint step, half of each batch": partial(_joint, fraction=0.5),
    "joint step from the image, half of each batch": partial(
        _joint, fraction=0.5, random_start=False
    ),
    "joint step, third of each batch": partial(_joint, fraction=1 / 3),
    "joint step, quarter of each batch": partial(_joint, fraction=0.25),
    "joint step of 1.5 levels, half of each batch": partial(_joint, eps=1.5 / 255, fraction=0.5),
    "joint step of 2 levels": partial(_joint, eps=2 / 255),
    "joint step of 2 levels, half of each batch": partial(_joint, eps=2 / 255, fraction=0.5),
    "joint step of 1 level, split BatchNorm": partial(_joint, split=True),
    "joint step of 2 levels, split BatchNorm": partial(_joint, eps=2 / 255, split=True),
    "joint step of 4 levels, split BatchNorm": partial(_joint, eps=4 / 255, split=True),
    "JointSpaceAdv of 2 levels, third of each batch": partial(_attack, eps=2 / 255, fraction=1 / 3),
    "pixel step, second half": partial(_attack, eta=0, begin=_half),
    "pixel step, half of each batch": partial(_attack, eta=0, fraction=0.5),
    "pixel step of 4 levels, third of each batch": partial(
        _attack, eta=0, eps=4 / 255, fraction=1 / 3
    ),
    "pixel step in L2": partial(_attack, eta=0, norm="l2", eps=0.25),
    "mixup + latent step": partial(_blend, **_own),
    MIXED: partial(_blend, begin=_half, **_own),
    "mixup + latent step, half of each batch": partial(_blend, fraction=0.5, **_own),
    "mixup + latent step, replay": _replay,
    "mixup + latent step, replay, not in the last 30 %": partial(_replay, epochs=(0, 14)),
    "CutMix + latent step, second half": partial(_after_cutmix, begin=_half, **_own),
    "mixup + joint step, half of each batch": partial(_blend, target="prediction", fraction=0.5),
}
# Who trains for as long as another row took, with the same seed.
AS_LONG = {
    LONG.format(who, whom): (who, whom) for who in NOT_OURS for whom in ROWS if whom not in NOT_OURS
}
