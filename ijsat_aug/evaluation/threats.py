"""Threats: what may be done to an image, and how far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attack.ascent import Landscape, ascend, select
from ..attack.balls import Norm, unit_ball
from ..attack.objectives import cross_entropy
from ..flows.calibration import recommended_eta
from ..flows.manifold import Manifold, needs_labels, on_device
from ..flows.pyramid import at_size
from ..transforms.checks import check_channels
from ..transforms.functional import joint_space_adv
from ..words import is_between, number
from .autoattack import auto_attack
from .draws import Draws
from .report import ATTACKS, Entry
from .spaces import SPACES, Space
from .victim import Found, Victim

__all__ = ["GROUPS", "Threat", "make_threat", "select_threats"]

_FOOLED = 1000.0


Attack = Callable[[Victim, Tensor, Tensor, Draws], Found]


@dataclass(frozen=True, repr=False)
class Threat(Entry):
    """A threat: a line of the table, of kind ``"lp"``, ``"manifold"`` or ``"unseen"``.

    A folder of results knows it by name, budget, steps and reference: whoever changes the attack of
    a threat of their own changes one of them too, else what the old one left is read again.

    Attributes:
        attack: ``(victim, pixels, labels, draws) -> Found``, of images that the model gets right.

    Example:
        >>> make_threat("linf=4/255@20")
        Threat('linf', budget='4/255', steps=20)
    """

    attack: Attack = field(compare=False)

    def __post_init__(self) -> None:
        if self.kind not in ATTACKS:
            raise ValueError(
                f"kind of the threat {self.name!r} is one of {', '.join(ATTACKS)}, got "
                f"{self.kind!r}."
            )
        if not isinstance(self.budget, str):
            raise TypeError(f"budget of the threat {self.name!r} is text, got {self.budget!r}.")

    def __repr__(self) -> str:
        return f"Threat({self.name!r}, budget={self.budget!r}, steps={self.steps})"


STUCK = "could not be attacked"


def fooling(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, and a constant more where the model is wrong: what an attack should keep.

    Its gradient is that of the cross-entropy, but no image that fools the model is given up for one
    of larger loss that does not.

    Example:
        >>> fooling(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])).round()
        tensor([   0., 1002.])
    """
    # An infinite loss would be taken for a failure, and the image for one that withstood it.
    loss = cross_entropy(logits, labels).clamp(max=_FOOLED)
    return loss + _FOOLED * (logits.argmax(1) != labels)


def pgd(norm: Norm, eps: float, steps: int) -> Attack:
    """PGD in pixels, from a random start."""
    return joint(None, norm, eps, 0.0, steps)


def joint(flow: Manifold | None, norm: Norm, eps: float, eta: float, steps: int) -> Attack:
    """The joint-space attack, from a random start."""

    def attack(victim: Victim, x: Tensor, y: Tensor, draws: Draws) -> Found:
        manifold: Any = None
        latent_start = None
        if flow is not None:
            manifold = at_size(on_device(flow, x.device), (x.shape[2], x.shape[3]))
            if needs_labels(manifold):
                manifold = manifold.of_labels(y)
            latent_start = eta * (2 * draws.uniform((len(x), manifold.latent_dim)) - 1)
        pixel_start = eps * unit_ball(norm, tuple(x.shape), draws.uniform, draws.normal)
        images = joint_space_adv(
            x, y, victim, manifold, eps=eps, eta=eta, norm=norm, steps=steps, objective=fooling,
            best=True, pixel_start=pixel_start if eps else None, latent_start=latent_start,
            check_values=False,
        )  # fmt: skip
        # All begin elsewhere: what comes back as it was met no number on its way.
        stuck = (images == x).flatten(1).all(1)
        return Found(images, {STUCK: stuck} if (eps or eta) and stuck.any() else {})

    attack.flow = flow  # type: ignore[attr-defined]
    return attack


def unseen(space: Space, budget: float, steps: int) -> Attack:
    """Ascent in another space than that of pixels."""

    def attack(victim: Victim, x: Tensor, y: Tensor, draws: Draws) -> Found:
        picture, variables = space(x, budget, steps, draws.uniform)
        found = ascend(Landscape(picture, victim, fooling, y), variables, best=True)
        return Found(select(found.finite, found.image, x))

    return attack


def make_threat(
    text: str, flow: Manifold | None = None, shape: Sequence[int] = (3, 32, 32)
) -> Threat:
    """A threat from its name, as in ``"linf"``, ``"l2=0.5"``, ``"jsa=4/255@20"``.

    Args:
        text: ``name[=budget][@steps]``. The budget of ``om`` is eta, that of ``jsa`` eps, or both
            as in ``"jsa=8/255:0.1"``.
        flow: For ``om`` and ``jsa``; its calibration tells the eta that is not given.
        shape: ``(C, H, W)`` of the images: an L2 budget that is not given is 1 for 3x32x32, and
            grows with the root of the number of values.

    Example:
        >>> make_threat("stadv").budget, make_threat("l2", shape=(3, 224, 224)).budget
        ('0.05', '7')
    """
    name, budget_text, steps_text = _taken_apart(text)
    if name not in NAMES:
        raise ValueError(
            f"there is no threat {name!r}; there are {', '.join(NAMES)}, and the groups "
            f"{', '.join(GROUPS)}."
        )
    eta_text = ""
    if name == "jsa":
        budget_text, _, eta_text = budget_text.partition(":")
    budget, eta = (_budget(part) if part else None for part in (budget_text, eta_text))
    if steps_text and not (steps_text.isdecimal() and int(steps_text) > 0):
        raise ValueError(f"steps after '@' must be a number > 0, got {steps_text!r}.")
    steps = int(steps_text) if steps_text else None
    if name in ("linf", "l2", "autoattack", "autoattack_l2"):
        return _lp(name, budget, steps, shape)
    if name in ("om", "jsa"):
        return _manifold(name, budget, eta if name == "jsa" else budget, steps, flow, shape)
    info = SPACES[name]
    budget, steps = budget if budget is not None else info.usual(shape), steps or info.steps
    # Whether it can be made of such images shows now, not after the threats before it.
    info.space(torch.zeros(1, *shape, device="cpu"), budget, steps, Draws(0, name, [0]).uniform)
    attack = unseen(info.space, budget, steps)
    return Threat(name, info.title, "unseen", f"{budget:g}", steps, info.reference, attack)


def select_threats(
    names: Sequence[str | Threat], flow: Manifold | None = None, shape: Sequence[int] = (3, 32, 32)
) -> list[Threat]:
    """Threats by name or by group; a group leaves out what needs a flow where there is none.

    A threat of your own stays what it is, and what is asked for by name takes the place of what a
    group has of that name.

    Example:
        >>> [threat.name for threat in select_threats(["quick"])]
        ['linf', 'l2']
        >>> select_threats(["quick", "linf=2/255@10"])
        [Threat('linf', budget='2/255', steps=10), Threat('l2', budget='1', steps=50)]
    """
    if isinstance(names, str):
        raise TypeError(f"threats must be a list, as in [{names!r}].")
    asked: dict[str, Threat] = {}
    for name in names:
        if isinstance(name, Threat) or name not in GROUPS:
            threat = name if isinstance(name, Threat) else make_threat(name, flow, shape)
            first = asked.setdefault(threat.name, threat)
            if threat.name == "clean":
                raise ValueError("'clean' is the row without a threat: give yours another name.")
            own = isinstance(name, Threat) or first in names
            if first != threat or (own and first.attack is not threat.attack):
                raise ValueError(
                    f"{first!r} and {threat!r} have one name, and a report has room for one of "
                    "them: evaluate twice."
                )
    found: dict[str, Threat] = {}
    for name in names:
        for member in _members(name, with_flow=flow is not None):
            if member not in found:
                found[member] = asked.get(member) or make_threat(member, flow, shape)
    return list(found.values())


def _members(name: str | Threat, with_flow: bool) -> list[str]:
    """The names of the threats that are meant."""
    if isinstance(name, Threat):
        return [name.name]
    members = GROUPS.get(name)
    if members is None:
        return [_taken_apart(name)[0]]
    return [m for m in members if with_flow or m not in ("om", "jsa")]


def _taken_apart(text: str) -> tuple[str, str, str]:
    """Name, budget and steps."""
    head, _, steps = text.partition("@")
    name, _, budget = head.partition("=")
    return name, budget, steps


def _lp(name: str, budget: float | None, steps: int | None, shape: Sequence[int]) -> Threat:
    norm: Norm = "l2" if name.endswith("l2") else "linf"
    usual = {"linf": 8 / 255, "l2": math.sqrt(math.prod(shape) / 3072)}
    eps = usual[norm] if budget is None else budget
    _check_range(eps, 1.0 if norm == "linf" else math.sqrt(math.prod(shape)))
    shown = _show(eps) if norm == "linf" else _rounded(eps, budget)
    title = "L2" if norm == "l2" else "L∞"
    if name.startswith("autoattack"):
        if steps is not None:
            raise ValueError("AutoAttack has fixed numbers of steps: leave '@...' out.")
        if norm == "l2":
            _check_square(*shape[1:])
        return Threat(
            name, f"AutoAttack {title}", "lp", shown, 100, "Croce and Hein, 2020 (standard)",
            auto_attack(norm, eps),
        )  # fmt: skip
    count = steps or 50
    return Threat(
        name, f"PGD {title}", "lp", shown, count, "Madry et al., 2018", pgd(norm, eps, count)
    )


def _manifold(
    name: str, budget: float | None, eta: float | None, steps: int | None, flow: Manifold | None,
    shape: Sequence[int],
) -> Threat:  # fmt: skip
    if flow is None:
        raise ValueError(f"{name!r} moves along a manifold: give a flow.")
    # Whether it takes such images shows now, not after the threats before it.
    at_size(check_channels(flow, torch.empty(1, *shape)), (shape[1], shape[2]))
    given = eta
    if eta is None:
        try:
            eta = recommended_eta(getattr(flow, "flow", flow), "linf")
        except ValueError as error:
            raise ValueError(
                "this flow has no calibrated radius: name the threats with their eta, as in "
                "om=0.1 and jsa=8/255:0.1."
            ) from error
    count = steps or 50
    if name == "om":
        return Threat(
            name, "on manifold (OM-PGD)", "manifold", f"η {_rounded(eta, given)}", count,
            "Lin et al., 2020", joint(flow, "linf", 0.0, eta, count),
        )  # fmt: skip
    eps = budget if budget is not None else 8 / 255
    _check_range(eps)
    return Threat(
        name, "joint space (JSA)", "manifold", f"{_show(eps)}, η {_rounded(eta, given)}", count,
        "Lau et al., 2023", joint(flow, "linf", eps, eta, count),
    )  # fmt: skip


def _show(eps: float) -> str:
    levels = eps * 255
    return f"{levels:g}/255" if abs(levels - round(levels)) < 1e-6 else f"{eps:g}"


def _rounded(radius: float, given: float | None) -> str:
    """As it was given: budgets that look alike count as the same."""
    return f"{radius:.3g}" if given is None else f"{radius:.6g}"


def _check_square(height: int, width: int) -> None:
    """Refuse sizes on which Square lays its tiles in L2 over the edge, after hours."""
    side = height // 5
    begin = (height - 5 * side) // 2
    over = side > 1 and any(begin + n // side * side > n for n in (height, width))
    if side == 0 or over:
        raise ValueError(
            f"autoattack_l2 takes no images of {height}x{width}, on which its part Square fails: "
            "resize them (28, 32, 64, 96 and 224 are fine), or take 'l2' and 'autoattack'."
        )


def _check_range(eps: float, whole: float = 1.0) -> None:
    if eps > whole:
        raise ValueError(
            f"a budget of {eps:g} is wider than the whole range of pixels, [0, 1]: did you mean "
            f"{eps:g}/255?"
        )


def _budget(text: str) -> float:
    value = number(text, "budget")
    if not is_between(value, 0):
        raise ValueError(f"a budget must be a number >= 0, got {text}.")
    return value


NAMES = ("linf", "l2", "autoattack", "autoattack_l2", "om", "jsa", *SPACES)
# LPIPS needs weights that it downloads, so that only who asks for it by name gets it.
UNSEEN = tuple(name for name in SPACES if name != "lpips")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "quick": ("linf", "l2", "om", "jsa"),
    "standard": ("linf", "l2", "autoattack", "om", "jsa"),
    "unseen": UNSEEN,
    "all": ("linf", "l2", "autoattack", "om", "jsa", *UNSEEN),
}
