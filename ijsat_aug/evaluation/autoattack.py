"""AutoAttack, through the original authors' code as RobustBench installs it (pyautoattack)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..attack.balls import Norm
from .draws import Draws
from .victim import Found, Victim

__all__ = ["auto_attack"]

_LOG = logging.getLogger(__name__)
_TARGETS = 9
_QUERIES = 5000
Perturb = Callable[[Tensor, Tensor], Tensor]


def auto_attack(
    norm: Norm, eps: float, *, queries: int = _QUERIES
) -> Callable[[Victim, Tensor, Tensor, Draws], Found]:
    """The standard version: APGD-CE, targeted APGD-DLR, targeted FAB, Square; in that order.

    Each part sees what the parts before it could not change. The targeted parts take the 9 most
    likely other classes, or all others where there are fewer; below 4 classes there is no targeted
    DLR loss, and that part is left out, as the original advises.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: Radius.
        queries: Of Square; the standard has 5000.

    Example:
        >>> from ijsat_aug.evaluation import Victim
        >>> victim = Victim(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
        >>> x = torch.rand(4, 1, 8, 8)
        >>> attack = auto_attack("linf", 0.3, queries=10)
        >>> with victim.frozen():
        ...     found = attack(victim, x, victim.predict(x), Draws(0, "example", range(4)))
        >>> list(found.right), bool((found.images - x).abs().max() < 0.301)
        (['APGD-CE', 'APGD-T', 'FAB-T', 'Square'], True)
    """
    _imported()

    def attack(victim: Victim, x: Tensor, y: Tensor, draws: Draws) -> Found:
        seed = int(float(draws.uniform((len(x), 1))[0, 0]) * 2**24) if len(x) else 0
        x, found = x.contiguous(), x.clone()
        standing, right = torch.ones_like(y, dtype=torch.bool), {}
        cuda = [x.device] if x.is_cuda else []
        for name, perturb in _parts(victim, norm, eps, queries, seed, x).items():
            left = standing.nonzero().flatten()
            if len(left):
                with torch.random.fork_rng(cuda):
                    new = perturb(x[left], y[left]).detach()
                fooled = victim.predict(new) != y[left]
                found[left[fooled]] = new[fooled]
                standing[left[fooled]] = False
            right[name] = standing.clone()
        return Found(found, right)

    return attack


def _parts(
    victim: Victim, norm: Norm, eps: float, queries: int, seed: int, x: Tensor
) -> Mapping[str, Perturb]:
    package = _imported()
    with torch.no_grad():
        classes = victim(x[:1]).shape[1] if len(x) else 2
    targets = min(_TARGETS, classes - 1)
    shared: dict[str, Any] = {
        "norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": seed, "n_restarts": 1,
        "device": x.device,
    }  # fmt: skip

    def model(images: Tensor) -> Tensor:
        return victim(images).float()  # FAB takes no others

    apgd = package.autopgd_base.APGDAttack(model, n_iter=100, logger=_LOG, **shared)
    targeted = package.autopgd_base.APGDAttack_targeted(model, n_iter=100, logger=_LOG, **shared)
    targeted.n_target_classes = targets
    fab = package.fab_pt.FABAttack_PT(model, n_iter=100, targeted=True, **shared)
    fab.n_target_classes = targets
    square = package.square.SquareAttack(
        model, p_init=0.8, n_queries=queries, resc_schedule=False, **shared
    )
    attacks = {"APGD-CE": apgd, "APGD-T": targeted, "FAB-T": fab, "Square": square}
    if classes < 4:
        del attacks["APGD-T"]
    return {name: attack.perturb for name, attack in attacks.items()}


def _imported() -> Any:
    try:
        import pyautoattack
        import pyautoattack.autopgd_base
        import pyautoattack.fab_pt
        import pyautoattack.square
    except ImportError as error:
        raise ImportError(
            'AutoAttack needs pip install "ijsat-aug[eval]"; the threats "quick" and "unseen" do '
            "without it."
        ) from error
    return pyautoattack
