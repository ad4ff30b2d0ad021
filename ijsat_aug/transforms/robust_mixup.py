"""RobustMixup: blends of pairs, moved to where the model likes them least."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from os import PathLike
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from ..attack.balls import Norm
from ..attack.behind import Shared
from ..attack.model import Mode, Model
from ..attack.objectives import Objective
from ..flows.manifold import Manifold, on_device
from ..words import check_count, is_between
from .batch import BatchTransform, of_some
from .blend import Space
from .checks import (
    check_blendable,
    check_flow,
    check_manifold,
    check_one_weight,
    check_space,
    find_flow,
)
from .joint_space import JointSpaceAdv
from .labels import Rows, soft_labels
from .mixing import Attack, Mix, check_labels_left, guarded, mix_batch
from .scale import Scale
from .structure import LabelsGetter, Parts, geometry_in

__all__ = ["RobustMixup"]

AnyAttack = BatchTransform | Callable[[Tensor, Tensor], Any]
_BUILT_IN = ("eps", "norm", "steps", "step_size", "objective", "random_start")


class RobustMixup(BatchTransform):
    r"""Mixup whose blends are adversarial.

    .. math:: x_m = \lambda x + (1 - \lambda) x', \quad t_m = \lambda t + (1 - \lambda) t', \quad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    with the neighbour ``roll(1)`` as partner; then the blend climbs the loss under its mixed
    label: by a few pixel steps, or by ``attack``. With ``attack=JointSpaceAdv(...)`` this is IJSAT,
    where every blend has an exact latent of its own. Labels come out as float32 rows ``(B, C)``,
    also where nothing was mixed: probabilities, or of ``objective="bce"`` several labels an image.

    Args:
        model: The model that is trained, left exactly as it was; it may come later, by ``bind``.
        num_classes: Needed when the labels are class numbers.
        alpha: Of the Beta distribution; 1 is uniform.
        per_sample: One weight a sample; otherwise one a batch.
        attack: What climbs on the blend: any transform or callable ``(images, targets)``. Without
            one, PGD in pixel space with the next six settings. A ``BatchTransform`` is copied; what
            it lacks of model, generator, ``mean`` and ``std``, ``amp_dtype`` and ``memory_format``
            it takes from this one, and ``mean`` and ``std`` this one from it. A callable gets
            images in the units of the batch, and the model frozen, in ``model_mode``.
        eps: Radius of the built-in attack, in [0, 1] pixels; 0 is plain mixup. The default is for
            L-inf.
        norm: Of its ball.
        steps: Its forward and backward passes.
        step_size: By default 2.5 ``eps`` / steps, 1.25 ``eps`` at most.
        objective: What it climbs; see :class:`JointSpaceAdv`.
        random_start: Whether it starts at a random point of the ball.
        lam_steps: Ascent steps of the mixing weight itself, before the attack.
        rho: How far they may take a weight from its draw.
        lam_step_size: By default 2.5 ``rho`` / steps, 1.25 ``rho`` at most.
        lam_objective: ``"kl"``, or ``"ce"``, which pulls every weight to 1/2.
        draws: Take the worst of so many draws of the weight, at a forward pass each.
        order: ``"mix-attack"``, or ``"attack-mix"`` (IAT): attacked images are mixed.
        space: Where images are mixed: ``"pixel"``, or with ``flow`` ``"latent"`` and
            ``"spherical"``.
        flow: For mixing in latent space: as of :class:`JointSpaceAdv`, of the images' size.
        label: ``"linear"`` in the weight, or ``"geometric"``: where the attacked blend lies.
        p: Probability that a batch is mixed.
        fraction: Share of the samples that is mixed, among themselves.
        mode: ``"replace"`` the batch, or ``"append"`` the blends behind the clean one.
        mean: Of the normalisation of the batches; without it they are in [0, 1].
        std: Of the normalisation of the batches.
        labels_getter: Where the labels are; see :class:`BatchTransform`.
        model_mode: ``"eval"`` freezes BatchNorm and dropout while the built-in attack or a callable
            runs, or the mixing weights climb; a ``BatchTransform`` has its own.
        amp_dtype: Autocast of the model in the attack; by default the caller's.
        memory_format: Of the images inside the attack.
        generator: A generator or a seed; the global random state is then left alone. A seed begins
            anew in a training that is resumed, and is the same in all processes: add their numbers.

    Attributes:
        last: Of the last batch: ``lam``, the weight of the own image, and what the attack tells.

    Example:
        >>> from ijsat_aug import JointSpaceAdv
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> ijsat = RobustMixup(model, num_classes=10, attack=JointSpaceAdv(model, "digits"))
        >>> x, y = ijsat(torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1]))
        >>> x.shape, y.shape, bool((y.sum(1) - 1).abs().max() < 1e-6)
        (torch.Size([4, 1, 8, 8]), torch.Size([4, 10]), True)
        >>> sorted(ijsat.last)
        ['fallback', 'lam', 'latent_norm', 'loss', 'loss_start', 'pixel_norm']
    """

    _lies_in: ClassVar = {field.name: "mix" for field in fields(Mix)} | {
        name: "attack.threat" for name in _BUILT_IN if name != "random_start"
    }
    _fixed: ClassVar = BatchTransform._fixed | {"random_start", "flow"}

    def __init__(
        self,
        model: Model | None = None,
        *,
        num_classes: int | None = None,
        alpha: float = 1.0,
        per_sample: bool = True,
        attack: AnyAttack | None = None,
        eps: float = 1 / 255,
        norm: Norm = "linf",
        steps: int = 1,
        step_size: float | None = None,
        objective: str | Objective = "ce",
        random_start: bool = True,
        lam_steps: int = 0,
        rho: float = 0.25,
        lam_step_size: float | None = None,
        lam_objective: Literal["kl", "ce"] = "kl",
        draws: int = 1,
        order: Literal["mix-attack", "attack-mix"] = "mix-attack",
        space: Space = "pixel",
        flow: Manifold | str | PathLike[str] | None = None,
        label: Literal["linear", "geometric"] = "linear",
        p: float = 1.0,
        fraction: float = 1.0,
        mode: Literal["replace", "append"] = "replace",
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        labels_getter: LabelsGetter = "default",
        model_mode: Mode = "eval",
        amp_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        generator: torch.Generator | int | None = None,
    ) -> None:
        super().__init__(
            model, p=p, fraction=fraction, mode=mode, mean=mean, std=std,
            labels_getter=labels_getter, model_mode=model_mode, amp_dtype=amp_dtype,
            memory_format=memory_format, generator=generator,
        )  # fmt: skip
        self.mix = Mix(
            lam_steps=lam_steps, rho=rho, lam_step_size=lam_step_size,
            lam_objective=lam_objective, order=order, space=space, label=label,
        )  # fmt: skip
        check_space(space, flow)
        self._flow = (find_flow(flow),)
        if space != "pixel":
            check_manifold(self._flow[0])
        self.num_classes = num_classes
        if num_classes is not None:
            self.num_classes = int(num_classes)  # NumPy's are none for torch
        self.alpha, self.per_sample, self.draws = alpha, per_sample, draws
        if not per_sample:
            check_one_weight(draws, lam_steps)
        own: dict[str, Any] = {
            "eps": eps, "norm": norm, "steps": steps, "step_size": step_size,
            "objective": objective, "random_start": random_start,
        }  # fmt: skip
        if attack is None:
            built_in = JointSpaceAdv(model, eta=0, model_mode=model_mode, **own)
            attack = built_in if eps > 0 else None
        else:
            _check_attack(attack, own)
            if isinstance(attack, BatchTransform):
                attack = copy.copy(attack)  # the caller's own stays as it is
                attack.random = attack.random.again()
        # Only ours is a submodule: any other may hold the model itself.
        self.climb = attack if isinstance(attack, BatchTransform) else None
        self._other_attack = Shared(None if isinstance(attack, BatchTransform) else attack)
        if self.climb is not None:
            self._adopt(self.climb)

    @classmethod
    def preset(
        cls,
        name: str,
        model: Model | None = None,
        flow: Manifold | str | PathLike[str] = "cifar10-fast",
        **options: Any,
    ) -> RobustMixup:
        """IJSAT as it is set for a purpose; docs/methods.md tells what that was worth.

        The attack on the blends is that of :meth:`JointSpaceAdv.preset`. With few labels
        ``"accuracy"`` did best in the second half of a training:
        ``AugmentedLoader(..., epochs=(n // 2, None))``.

        Args:
            name: ``"accuracy"``, ``"fast"``, ``"corruptions"`` or ``"robust"``.
            model: The model that is trained; or later, by ``bind``.
            flow: As of :class:`JointSpaceAdv`.
            **options: Of :class:`RobustMixup`, or of :class:`JointSpaceAdv` for the attack, which
                gets those that both have as its built-in attack would; those of every
                :class:`BatchTransform` (``p``, ``fraction``, ``mode``, ...) are the mixing's.

        Example:
            >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
            >>> mix = RobustMixup.preset("accuracy", model, "digits", num_classes=10)
            >>> mix.attack
            JointSpaceAdv(model=Sequential, flow=1x8x8, eps=0, eta=0.0464, steps=1, method=linear,
                target=prediction)
        """
        if "attack" in options:
            raise ValueError("a preset brings its attack; RobustMixup(..., attack=) takes another.")
        ours = inspect.signature(RobustMixup.__init__).parameters
        attacks = inspect.signature(JointSpaceAdv.__init__).parameters
        for unknown in options.keys() - ours.keys() - attacks.keys():
            close = difflib.get_close_matches(unknown, [*ours, *attacks], 1)
            meant = f"; did you mean {close[0]!r}?" if close else "."
            raise TypeError(
                f"neither RobustMixup nor JointSpaceAdv has an option {unknown!r}{meant}"
            )
        theirs = {n: v for n, v in options.items() if n in _BUILT_IN or n not in ours}
        options = {n: v for n, v in options.items() if n not in theirs}
        mode = options.get("model_mode", "eval")
        attack = JointSpaceAdv.preset(name, model, flow, model_mode=mode, **theirs)
        if options.get("space", "pixel") != "pixel":
            options["flow"] = attack.flow
        return cls(model, attack=attack, **options)

    def _check_setting(self, name: str, value: Any) -> None:
        super()._check_setting(name, value)
        if name == "alpha" and not (is_between(value, 0) and value > 0):
            raise ValueError(f"alpha must be a number > 0, got {value!r}; p=0 mixes nothing.")
        if name == "draws" or (name == "num_classes" and value is not None):
            check_count(name, value, 1 if name == "draws" else 2)

    @property
    def attack(self) -> AnyAttack | None:
        """What climbs on the blend."""
        return self._other_attack.thing if self.climb is None else self.climb

    @property
    def needs_model(self) -> bool:
        """Whether there is anything to ask of a model."""
        return self._weighs or (self.climb is not None and self.climb.model is None)

    @property
    def _weighs(self) -> bool:
        """Whether a model chooses the mixing weights."""
        return self.mix.lam_steps > 0 or self.draws > 1

    def bind(self, model: Model) -> RobustMixup:
        """Set the model, also of an attack that has none or shares this one's."""
        old = self.model
        if self.climb is not None and self.climb.model in (None, old):
            self.climb.bind(model)
        return super().bind(model)

    def parts_of(self, batch: tuple[Any, ...]) -> Parts:
        """The images and labels in a batch, where nothing stands beside them that cannot blend."""
        check_blendable(geometry_in(batch))
        return super().parts_of(batch)

    def check(self, images: Tensor, labels: Any) -> None:
        """Refuse a bad batch before anything runs."""
        if self.climb is None:
            super().check(images, labels)
        else:  # it has the same scale, and looks at a batch as this does
            self.climb.check(images, labels)
        if self.mix.space != "pixel":
            check_flow(self._flow[0], images)

    def as_labels(self, images: Tensor, labels: Any) -> Tensor:
        """Labels as rows."""
        attack = self.climb
        rows: Rows = attack.threat.rows if isinstance(attack, JointSpaceAdv) else "any"
        return soft_labels(
            labels, len(images), self.num_classes, values=self.careful(images), rows=rows,
            weighed=self._weighs,
        ).detach()  # fmt: skip

    def calm(self, images: Tensor, labels: Any) -> tuple[Tensor, Any, Tensor | None]:
        """The mixed batch, whose blends nothing has attacked, and which they are."""
        self._ask(self._weighs)
        plain, targets = self._admitted(images, labels)
        params = self._draw(plain, targets, self._mixing)
        if params is None:
            none = torch.empty(0, dtype=torch.long, device=images.device)
            return images.detach(), targets, none
        mixed, targets = self.replay(plain, targets, params | {"attack": None})
        return mixed.as_subclass(type(images)), targets, params.get("index")

    def check_replay(self) -> None:
        """Refuse what is not a plain blend, or does not move as it comes."""
        if self.climb is None or self.mode == "append" or self.mix != Mix(space=self.mix.space):
            raise ValueError(
                "a replay of RobustMixup moves plain blends along a gradient: it needs an attack "
                'of ours, mode="replace", order="mix-attack", label="linear" and lam_steps=0.'
            )
        self.climb.check_replay()

    def follow(
        self, images: Tensor, labels: Any, gradient: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """The mixed batch, whose blends move along a gradient as the attack moves them."""
        self.check_replay()
        attack = cast(BatchTransform, self.climb)
        if not attack.training:
            return images.detach()

        def move(*some: Any) -> tuple[Tensor, dict[str, Tensor]]:
            return attack.follow(*some), attack.last

        moved, facts = of_some(index, move, images, labels, gradient)
        self.last |= facts
        return moved

    def make_params(self, images: Tensor, labels: Any) -> dict[str, Any]:
        """The mixing weights, and what the attack draws.

        Example:
            >>> mix = RobustMixup(num_classes=3, eps=0, alpha=0.4, generator=0)
            >>> lam = mix.make_params(torch.rand(4, 3, 2, 2), None)["lam"]
            >>> lam.shape, bool((0 <= lam).all() and (lam <= 1).all())
            (torch.Size([4]), True)
        """
        params = self._mixing(images, labels)
        if self.climb is not None and self.climb.training:
            params["attack"] = self.climb.draw(images, labels)
        return params

    def _mixing(self, images: Tensor, labels: Any) -> dict[str, Any]:
        """What is random in blends that nothing attacks."""
        count = len(images)
        shape = (self.draws, count if self.per_sample else 1)
        lam = self.random.beta(self.alpha, shape, images.device).expand(-1, count)
        params: dict[str, Any] = {"lam": lam[0] if self.draws == 1 else lam}
        if self.handle.mode == "train":
            params["seed"] = self.random.seed()
        return params

    def transform(
        self, images: Tensor, labels: Any, params: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The attacked blends and their labels."""
        if self.mix.space != "pixel":
            self._flow = (on_device(check_manifold(self._flow[0]), images.device),)
        mixed, targets, facts = mix_batch(
            images, labels, params["lam"], self.mix,
            attack=self._call(params), handle=self.handle, flow=self._flow[0],
            scale=self.scale, seed=params.get("seed"),
        )  # fmt: skip
        seen = {} if self.climb is None else self.climb.last
        self.last = {**seen, **facts}
        if "fallback" in seen and "fallback" in facts:
            self.last["fallback"] = seen["fallback"] | facts["fallback"]
        return mixed, targets

    def _adopt(self, attack: BatchTransform) -> None:
        """Give the attack what it shares with this transform."""
        if attack.mode == "append":
            raise ValueError('the attack must return as many images as it gets: mode="replace".')
        model = self.model if attack.model is None else attack.model
        handle = attack.handle.to(model, "auxiliary" if self.mode == "append" else None)
        handle.amp_dtype = handle.amp_dtype or self.handle.amp_dtype
        handle.memory_format = handle.memory_format or self.handle.memory_format
        attack.handle = handle
        if not self.scale.agrees(attack.scale):
            raise ValueError(
                "the transform and its attack have different mean and std, and a batch has one "
                "normalisation: give it to either."
            )
        self.scale = attack.scale = attack.scale if self.scale == Scale() else self.scale
        if attack.random.is_global:
            attack.random = self.random
        attack._seen = self._seen  # looks at values as often as this transform: once on a device

    def __copy__(self) -> RobustMixup:
        twin = super().__copy__()
        if twin.climb is not None:
            twin.climb._seen = twin._seen
        return twin

    def _call(self, params: dict[str, Any]) -> Attack | None:
        """The attack with what it drew; nothing where it is told to rest."""
        climb, drawn = self.climb, params.get("attack")
        if climb is not None:
            if drawn is None:
                return None
            return partial(_replayed, climb, drawn)
        attack = self._other_attack.thing
        if attack is None or "attack" in params:
            return None
        return guarded(attack, self.handle, params.get("seed"))

    def extra_repr(self) -> str:
        """The settings that differ from their defaults."""
        usual = Mix()
        shown: dict[str, Any] = {"num_classes": self.num_classes, "alpha": self.alpha}
        shown |= {} if self.draws == 1 else {"draws": self.draws}
        shown |= {} if self.per_sample else {"per_sample": False}
        shown |= {n: v for n, v in vars(self.mix).items() if v != getattr(usual, n)}
        words = [f"{name}={value}" for name, value in shown.items()]
        return ", ".join([super().extra_repr(), *words])


def _replayed(
    climb: BatchTransform, drawn: dict[str, Any], images: Tensor, targets: Tensor
) -> Tensor:
    moved, labels = climb.replay(images, targets, drawn)
    check_labels_left(labels, targets)
    return moved


def _check_attack(attack: AnyAttack, own: dict[str, Any]) -> None:
    if not callable(attack) or isinstance(attack, type):
        got = attack.__name__ if isinstance(attack, type) else repr(attack)
        raise TypeError(f"attack must be a transform or a callable (images, targets), got {got}.")
    usual = inspect.signature(RobustMixup.__init__).parameters
    ignored = [name for name, value in own.items() if value != usual[name].default]
    if ignored:
        raise ValueError(
            f"{', '.join(ignored)}: of the built-in attack alone; give it to the one that you pass "
            "as attack=, as in attack=JointSpaceAdv(model, flow, ...)."
        )
