"""JointSpaceAdv: images moved along the manifold and off it, where the model likes them least."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from os import PathLike
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..attack.ascent import Deferred
from ..attack.balls import BALLS, Norm, unit_ball
from ..attack.model import Mode, Model
from ..attack.objectives import Objective
from ..flows.calibration import recommended_eta
from ..flows.manifold import Manifold, needs_labels, on_device
from ..flows.pyramid import Tiles, at_size
from ..precision import warn_if_emulated
from .batch import BatchTransform, of_some
from .checks import check_channels, check_manifold, find_flow
from .climb import climb, climb_along
from .labels import as_target
from .presets import find_preset
from .structure import LabelsGetter
from .threat import Method, Threat, Update

__all__ = ["JointSpaceAdv"]

Target = Literal["label", "prediction", "random"]
_TRAINED = ("ce", "bce")  # losses of trainings, whose gradient a replay follows
_UNLABELLED = (
    "the batch has no labels under a usual name, so that the attack leads away from the model's "
    "own prediction: tell where they are by labels_getter= (inside kornia, by the 'class' key), or "
    'say that it is meant by target="prediction".'
)


class JointSpaceAdv(BatchTransform):
    r"""Adversarial images of the joint space of pixels and of a flow's latents.

    .. math:: x' = \mathrm{clip}(\mathrm{clip}(G(z + \lambda) + r) + \delta)

    z is the exact latent of x under the normalizing flow G, and r what its round trip loses; the
    move lambda goes along the data, delta away from them, and both climb the model's loss
    together. Labels are returned as they came, twice with ``mode="append"``. ``eta=0`` is PGD and
    never touches the flow, ``eps=0`` the on-manifold attack.

    Args:
        model: The model that is trained; DDP, compiled and EMA wrappers are fine. It is left
            exactly as it was. It may come later, by ``bind``.
        flow: From :func:`ijsat_aug.load_flow`, or its argument. It follows the batch's device, and
            on images of another size it moves their low band: see :class:`ijsat_aug.flows.Pyramid`.
            One that needs labels gets those of the batch.
        eps: Radius of delta, in [0, 1] pixels; the default is for L-inf.
        eta: Radius of lambda, in standard deviations of the latents; by default what the flow's
            calibration recommends, a move of about 8/255 of every pixel (root mean square).
        norm: ``"linf"`` or ``"l2"``, of delta.
        latent_norm: The same of lambda.
        steps: Forward and backward passes of the model.
        step_size: Of delta; by default 2.5 ``eps`` / its moves, at most 1.25 ``eps``.
        latent_step_size: Of lambda; by default the same with ``eta``.
        update: ``"joint"`` moves both from one backward pass, ``"alternating"`` in turn,
            ``"sequential"`` first lambda, then delta.
        latent_steps: In how many of the steps lambda moves, and the flow does not rest: by default
            in all of a joint ascent, in half of the others, in one with ``method="linear"``.
        method: ``"exact"``, through the decoder in every step; or ``"linear"``: one latent step
            along the gradient at z, which needs no decode before it and leaves r out (as small as
            the flow's round trip, see its card). By default linear where there is one step, as long
            as it does not climb the KL: it is cheaper there, and no weaker.
        objective: ``"ce"``; ``"bce"`` of several labels an image, ``(B, C)`` from 0 to 1; ``"kl"``
            (from the clean prediction, as TRADES); ``"margin"``; or a callable
            ``(logits, labels) -> (B,)`` that gets the labels unchanged.
        target: What the loss is measured against: ``"label"`` of the batch (its own prediction when
            there is none), the model's own ``"prediction"``, or, with ``targeted``, a ``"random"``
            other class.
        targeted: Approach the target instead of leaving it.
        random_start: Start at a uniform point of the balls instead of the image; with
            ``method="linear"`` of the pixels alone.
        best: Keep the worst image of each sample, at one more forward pass.
        tau: Friendly stop: leave a sample alone once it was wrong more than ``tau`` times.
        p: Probability that a batch is attacked.
        fraction: Share of the samples of a batch that is attacked; the others cost nothing.
        choose: Which ones: ``"random"``, or, in a replay of
            :class:`~ijsat_aug.AugmentedLoader`, the ``"hardest"``, of the largest gradients.
        mode: ``"replace"`` the images, or ``"append"`` the attacked ones behind the clean batch.
        mean: Of the normalisation of the batches; without it they are in [0, 1].
        std: Of the normalisation of the batches.
        labels_getter: Where the labels are, as in torchvision's ``MixUp``; see
            :class:`BatchTransform`.
        model_mode: ``"eval"`` freezes BatchNorm and dropout while the attack runs.
        amp_dtype: Autocast of the model in the attack; by default the caller's. Images and bounds
            stay in float32.
        memory_format: Of the images inside the attack; ``torch.channels_last`` is often faster.
        generator: A generator or a seed; the global random state is then left alone. A seed begins
            anew in a training that is resumed, and is the same in all processes: add their numbers.

    Attributes:
        last: Of the last batch, ``(B,)`` each: ``loss_start``; ``loss`` of the last image that the
            model saw, NaN where a sample was left alone; ``pixel_norm`` and ``latent_norm`` of the
            moves; ``fallback``, where a gradient or a decode was not finite and the image came back
            as it was; with ``best`` a gradient does not matter, as the loss of what comes back is
            known.

    Example:
        >>> import ijsat_aug
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> adv = JointSpaceAdv(model, "digits", eps=4 / 255, steps=2, generator=0)
        >>> x, y = torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> worse, same = adv(x, y)
        >>> same is y, bool((adv.last["loss"] > adv.last["loss_start"]).all())
        (True, True)
        >>> adv
        JointSpaceAdv(model=Sequential, flow=1x8x8, eps=0.0157, eta=0.0464, steps=2)
    """

    _lies_in: ClassVar = {field.name: "threat" for field in fields(Threat)}

    def __init__(
        self,
        model: Model | None = None,
        flow: Manifold | str | PathLike[str] | None = None,
        *,
        eps: float = 1 / 255,
        eta: float | None = None,
        norm: Norm = "linf",
        latent_norm: Norm = "linf",
        steps: int = 1,
        step_size: float | None = None,
        latent_step_size: float | None = None,
        update: Update = "joint",
        latent_steps: int | None = None,
        method: Method | None = None,
        objective: str | Objective = "ce",
        target: Target = "label",
        targeted: bool = False,
        random_start: bool = True,
        best: bool = False,
        tau: int | None = None,
        p: float = 1.0,
        fraction: float = 1.0,
        choose: Literal["random", "hardest"] = "random",
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
        if target == "random" and not targeted:
            raise ValueError('target="random" is a class to approach: set targeted=True.')
        if target == "random" and objective == "bce":
            raise ValueError('target="random" is one of the classes: objective="bce" has labels.')
        # In a tuple, so that a flow that is a module is no submodule either.
        self._flow = (find_flow(flow),)
        self._fit: tuple[Any, Manifold | None] = (None, None)
        if method is None:  # linear starts at the clean latent, where the KL has no gradient
            method = "linear" if steps == 1 and objective != "kl" else "exact"
        self.threat = Threat(
            eps=eps, eta=_radius(eta, self.flow, latent_norm), norm=norm, latent_norm=latent_norm,
            steps=steps, step_size=step_size, latent_step_size=latent_step_size, update=update,
            latent_steps=latent_steps, method=method, objective=objective, targeted=targeted,
            best=best, tau=tau,
        )  # fmt: skip
        if self.threat.moves_latent:
            check_manifold(self.flow)
        if objective == "kl":
            self.threat.check_start(pixel=random_start, latent=random_start)
        self._usual_eta = self.threat.eta if eta is None else None
        self.target = target
        self.random_start = random_start
        self.choose = choose
        self._told: set[str] = set()
        self._asked: set[torch.device] = set()  # where the model's logits were looked at

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "threat" and "_fit" in vars(self):  # its usual radius may be of another norm
            self._fit = (None, None)

    def _check_setting(self, name: str, value: Any) -> None:
        super()._check_setting(name, value)
        if name == "target" and value not in ("label", "prediction", "random"):
            raise ValueError(f'target must be "label", "prediction" or "random", got {value!r}.')
        threat = vars(self).get("threat")
        if name == "target" and value == "random" and threat and not threat.targeted:
            raise ValueError('target="random" is approached: make the attack with targeted=True.')
        if name == "choose" and value not in ("random", "hardest"):
            raise ValueError(f'choose must be "random" or "hardest", got {value!r}.')

    @classmethod
    def preset(
        cls,
        name: str,
        model: Model | None = None,
        flow: Manifold | str | PathLike[str] = "cifar10-fast",
        **options: Any,
    ) -> JointSpaceAdv:
        """The attack as it is set for a purpose; docs/methods.md tells what that was worth.

        ``"accuracy"``
            One step along the manifold, away from the model's own prediction.
        ``"fast"``
            The same for half of the samples.
        ``"corruptions"``
            One joint step, of 1/255 and of the latents, away from the model's own prediction, for
            half of the samples.
        ``"robust"``
            Seven joint steps at 8/255, two of which move the latents.

        Args:
            name: One of these.
            model: The model that is trained; or later, by ``bind``.
            flow: As above.
            **options: As above; they take the place of what the preset says.

        Example:
            >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
            >>> JointSpaceAdv.preset("accuracy", model, "digits")
            JointSpaceAdv(model=Sequential, flow=1x8x8, eps=0, eta=0.0464, steps=1, method=linear,
                target=prediction)
        """
        return cls(model, flow, **{**find_preset(name), **options})

    def bind(self, model: Model) -> JointSpaceAdv:
        """Set the model, and return the transform."""
        self._asked.clear()
        return super().bind(model)

    @property
    def flow(self) -> Manifold | None:
        """The flow, on the device of the last batch."""
        return self._flow[0]

    def find_no_labels(self) -> None:
        """Say once what the attack climbs instead."""
        if self.target == "label" and self.threat.objective != "kl":
            self._tell_once("labels", lambda: _UNLABELLED)

    def check(self, images: Tensor, labels: Any) -> None:
        """Refuse a bad batch before anything runs."""
        super().check(images, labels)
        if self.threat.moves_latent:
            flow = check_channels(self.flow, images)
            if tuple(flow.shape[1:]) != tuple(images.shape[2:]):
                self._tell_once("size", partial(_of_another_size, flow, images))
            if needs_labels(flow):
                self._classes(images, labels)
            self._fitted(images)
        self._labels(images, labels)

    def draw(self, images: Tensor, labels: Any) -> dict[str, Any] | None:
        """All that is random for one batch; None when the batch is left as it is."""
        if self.choose == "hardest" and self.fraction < 1:
            raise ValueError(
                'choose="hardest" looks at gradients that only a replay has: '
                "AugmentedLoader(loader, transform, replay=2)."
            )
        return super().draw(images, labels)

    def make_params(self, images: Tensor, labels: Any) -> dict[str, Any]:
        """Where the ascent starts, and what else is random.

        Example:
            >>> adv = JointSpaceAdv(torch.nn.Identity(), eta=0, generator=0)
            >>> params = adv.make_params(torch.rand(2, 3, 4, 4), None)
            >>> {name: tuple(draw.shape) for name, draw in params.items()}
            {'pixel_start': (2, 3, 4, 4)}
        """
        threat = self.threat
        params: dict[str, Any] = {}
        if self.random_start and threat.moves_pixels:
            draw = self._ball(threat.norm, tuple(images.shape), images.device)
            params["pixel_start"] = threat.eps * draw
        starts_anywhere = self.random_start and threat.method == "exact"
        if starts_anywhere and threat.moves_latent:
            shape = (len(images), self._fitted(images).latent_dim)
            draw = self._ball(threat.latent_norm, shape, images.device)
            params["latent_start"] = threat.eta * draw
        if self.target == "random":
            params["other"] = self.random.uniform((len(images),), images.device)
        if self.handle.mode == "train":
            params["seed"] = self.random.seed()
        return params

    def transform(self, images: Tensor, labels: Any, params: dict[str, Any]) -> tuple[Tensor, Any]:
        """The attacked images; the labels as they are."""
        flow: Any = self._fitted(images) if self.threat.moves_latent else None
        if needs_labels(flow):
            flow = flow.of_labels(self._classes(images, labels))
        target = self._labels(images, labels)
        starts = {k: v for k, v in params.items() if k != "other"}
        new, self.last = climb(
            images, _other(target, params["other"]) if "other" in params else target,
            self.handle, flow, self.threat, self.scale,
            careful=self.careful(images) or images.device not in self._asked, **starts,
        )  # fmt: skip
        self._asked.add(images.device)
        return new, labels

    def _callables(self) -> list[Any]:
        return [*super()._callables(), self.threat.objective]

    def check_replay(self) -> None:
        """Refuse what is not one step of the batch itself, away from its labels."""
        if self.mode == "append":
            raise ValueError(
                'a replay moves the batch itself: it needs mode="replace", not "append".'
            )
        threat = self.threat
        asked = {
            "steps=1": threat.steps == 1, 'objective="ce" or "bce"': threat.objective in _TRAINED,
            'target="label"': self.target == "label", "targeted=False": not threat.targeted,
            "best=False": not threat.best, "tau=None": threat.tau is None,
        }  # fmt: skip
        wrong = [setting for setting, fits in asked.items() if not fits]
        if wrong:
            raise ValueError(
                "a replay moves batches once along the gradient of the training loss: it needs "
                f"{', '.join(wrong)}."
            )

    def follow(
        self, images: Tensor, labels: Any, gradient: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """The images, one linear step along a gradient that the training step found.

        Example:
            >>> adv = JointSpaceAdv(eta=0, eps=0.25, random_start=False)
            >>> x = torch.full((1, 1, 1, 2), 0.5)
            >>> adv.follow(x, None, torch.tensor([[[[3.0, -0.1]]]]))
            tensor([[[[0.7500, 0.2500]]]])
        """
        self.check_replay()
        step = replace(self.threat, method="linear", update="joint", latent_steps=None)
        self.last = {}
        scores = None
        if self.choose == "hardest":
            scores = gradient.flatten(1).float().norm(dim=1).nan_to_num(0)
        index = self.choose_samples(gradient, scores)  # a batch is calm as a whole
        move = partial(self._along, step)
        moved, self.last = of_some(index, move, images, labels, gradient)
        return moved

    def _along(
        self, step: Threat, images: Tensor, labels: Any, gradient: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The images, a step along their gradient, and facts about them."""
        flow: Any = self._fitted(images) if step.moves_latent else None
        if needs_labels(flow):
            flow = flow.of_labels(self._classes(images, labels))
        start = None
        if self.random_start and step.moves_pixels:
            start = step.eps * self._ball(step.norm, tuple(images.shape), images.device)
        return climb_along(images, gradient, flow, step, self.scale, pixel_start=start)

    def extra_repr(self) -> str:
        """The settings that differ from their defaults."""
        size = None if self.flow is None else "x".join(map(str, self.flow.shape))
        usual = Threat()
        changed = {
            name: value
            for name, value in vars(self.threat).items()
            if name in ("eps", "eta", "steps") or value != getattr(usual, name)
        }
        shown = {"flow": size, **changed}
        if self.target != "label":
            shown["target"] = self.target
        if not self.random_start:
            shown["random_start"] = False
        words = [f"{k}={v:.3g}" if type(v) is float else f"{k}={v}" for k, v in shown.items()]
        return ", ".join([super().extra_repr(), *words])

    def _fitted(self, images: Tensor) -> Manifold:
        """The flow on the batch's device, and at its size; the same while these stay."""
        place = (images.device, (images.shape[2], images.shape[3]))
        if self._fit[0] != place:
            flow = on_device(check_manifold(self.flow), images.device)
            low = getattr(getattr(flow, "flow", flow), "compute_dtype", None)
            warn_if_emulated(low, images.device.type, "leave compute_dtype of load_flow out")
            fitted = at_size(flow, place[1])
            self._suit(fitted)
            self._flow, self._fit = (flow,), (place, fitted)
        return check_manifold(self._fit[1])

    def _suit(self, flow: Manifold) -> None:
        """Take the usual radius of this flow, as in L2 it grows with the number of its tiles."""
        if self.threat.eta == self._usual_eta:
            self._usual_eta = recommended_eta(flow, self.threat.latent_norm)
            self.threat = replace(self.threat, eta=self._usual_eta)

    def _tell_once(self, subject: str, message: Callable[[], str]) -> None:
        if subject not in self._told:
            self._told.add(subject)
            warnings.warn(message(), stacklevel=2)

    def _classes(self, images: Tensor, labels: Any) -> Tensor:
        """What a conditional flow gets to know."""
        if labels is None:
            raise ValueError("the flow needs the labels of the batch, which has none.")
        return as_target(labels, len(images), values=self.careful(images))

    def _labels(self, images: Tensor, labels: Any) -> Tensor | None:
        """What the loss is measured against, of the labels that came."""
        if labels is None and self.threat.targeted and self.target == "label":
            raise ValueError("targeted=True approaches the labels, and the batch has none.")
        if labels is None or self.target == "prediction" or self.threat.objective == "kl":
            return None
        if callable(self.threat.objective):
            return labels  # type: ignore[no-any-return]
        return as_target(labels, len(images), values=self.careful(images), rows=self.threat.rows)

    def _ball(self, norm: Norm, shape: tuple[int, ...], device: torch.device) -> Tensor:
        uniform = partial(self.random.uniform, device=device)
        normal = partial(self.random.normal, device=device)
        return unit_ball(norm, shape, uniform, normal)


def _of_another_size(flow: Manifold, images: Tensor) -> str:
    one, two = ("x".join(map(str, s)) for s in (flow.shape[1:], images.shape[2:]))
    if isinstance(flow, Tiles):
        then = "as many tiles move as cover it (ijsat_aug.flows.Tiles)."
    elif all(own >= size for own, size in zip(flow.shape[1:], images.shape[2:], strict=True)):
        then = "they are enlarged on the way to its manifold (ijsat_aug.flows.Pyramid)."
    else:
        then = (
            "their low band moves on its manifold, finer detail stays "
            "(ijsat_aug.flows.Pyramid; Tiles moves it too)."
        )
    return f"the flow takes images of {one}, the batch has {two}: {then}"


def _other(labels: Tensor | None, draw: Tensor) -> Deferred:
    """A random class other than the label's, once the first logits tell how many there are."""

    def choose(logits: Tensor) -> Tensor:
        own = logits.argmax(1) if labels is None else labels
        own = own if own.ndim == 1 else own.argmax(1)
        others = logits.shape[1] - 1
        step = 1 + (draw * others).long().clamp(max=others - 1)
        return (own + step) % (others + 1)

    return Deferred(choose)


def _radius(eta: float | None, flow: Manifold | None, norm: Norm) -> float:
    if norm not in BALLS:
        return 0.0  # Threat tells what is wrong
    if eta is not None:
        return eta
    return recommended_eta(check_manifold(flow), norm)
