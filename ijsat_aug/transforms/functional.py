"""The functional twins of the transforms: pure, all randomness passed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..attack.balls import Norm
from ..attack.model import Mode, Model, ModelHandle
from ..attack.objectives import Objective
from ..flows.manifold import Manifold
from .blend import Space
from .checks import (
    check_flow,
    check_images,
    check_manifold,
    check_place,
    check_space,
    check_start,
    check_weights,
)
from .climb import climb
from .labels import as_target, soft_labels
from .mixing import Attack, Mix, guarded, images_of, mix_batch
from .scale import Scale
from .threat import Method, Threat, Update

__all__ = ["joint_space_adv", "robust_mixup"]


def joint_space_adv(
    images: Tensor,
    labels: Tensor | None,
    model: Model,
    flow: Manifold | None = None,
    *,
    eps: float = 0.0,
    eta: float = 0.0,
    norm: Norm = "linf",
    latent_norm: Norm = "linf",
    steps: int = 1,
    step_size: float | None = None,
    latent_step_size: float | None = None,
    update: Update = "joint",
    latent_steps: int | None = None,
    method: Method = "exact",
    objective: str | Objective = "ce",
    targeted: bool = False,
    best: bool = False,
    tau: int | None = None,
    pixel_start: Tensor | None = None,
    latent_start: Tensor | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    model_mode: Mode = "eval",
    amp_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    seed: int | None = None,
    check_values: bool = True,
) -> Tensor:
    r"""Images moved jointly in pixel and latent space to where the model likes them least.

    .. math:: x' = \mathrm{clip}(\mathrm{clip}(G(z + \lambda) + r) + \delta), \quad
        \|\lambda\| \le \eta, \; \|\delta\| \le \epsilon

    with z the flow's exact latent of x and r what its round trip loses. ``eta=0`` is PGD and needs
    no flow; ``eps=0`` is the on-manifold attack; without both, as by default, x comes back.

    Args:
        images: ``(B, C, H, W)``, in [0, 1] or normalised by ``mean`` and ``std``.
        labels: Classes ``(B,)`` or probabilities ``(B, C)``; None: the model's own prediction.
        model: Classifier; left exactly as it was.
        flow: From :func:`ijsat_aug.load_flow`, on the images' device.
        eps: Radius of the pixel perturbation delta, in [0, 1] pixels.
        eta: Radius of the latent move lambda, in standard deviations of the latents.
        norm: ``"linf"`` or ``"l2"``, of delta.
        latent_norm: The same of lambda.
        steps: Forward and backward passes of the model.
        step_size: Of delta; by default 2.5 ``eps`` / its moves, at most 1.25 ``eps``.
        latent_step_size: Of lambda; by default the same with ``eta``.
        update: ``"joint"``, ``"alternating"`` or ``"sequential"`` (first lambda, then delta).
        latent_steps: In how many of the steps lambda moves, and the flow does not rest: by default
            in all of a joint ascent, in half of the others, in one with ``method="linear"``.
        method: ``"exact"``, or ``"linear"`` for one latent step without a decode before it.
        objective: ``"ce"``; ``"bce"`` of several labels an image, ``(B, C)`` from 0 to 1; ``"kl"``
            (from the clean prediction); ``"margin"``; or a callable ``(logits, labels) -> (B,)``
            that gets the labels unchanged.
        targeted: Approach the labels instead of leaving them.
        best: Keep the worst image of each sample, at one more forward pass.
        tau: Stop moving a sample once it was wrong more than ``tau`` times.
        pixel_start: Where delta starts, such as uniform noise; by default at zero.
        latent_start: Where lambda starts ``(B, D)``.
        mean: Of the normalisation of ``images``.
        std: Of the normalisation of ``images``.
        model_mode: ``"eval"`` freezes BatchNorm and dropout during the attack.
        amp_dtype: Autocast of the model during the attack; by default the caller's.
        memory_format: Of the images inside the attack.
        seed: Of dropout in ``model_mode="train"``.
        check_values: Look at the values of images and labels too, which costs host syncs on a GPU.

    Returns:
        A detached batch of the images' dtype, device and layout. A sample whose gradient or decode
        was not finite is returned as it came.

    Example:
        >>> import ijsat_aug
        >>> flow = ijsat_aug.load_flow("digits")
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> x, y = torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> worse = joint_space_adv(x, y, model, flow, eps=1 / 255, eta=0.05, steps=3)
        >>> loss = torch.nn.functional.cross_entropy
        >>> bool(loss(model(worse), y) > loss(model(x), y))
        True
    """
    threat = Threat(
        eps=eps, eta=eta, norm=norm, latent_norm=latent_norm, steps=steps, step_size=step_size,
        latent_step_size=latent_step_size, update=update, latent_steps=latent_steps, method=method,
        objective=objective, targeted=targeted, best=best, tau=tau,
    )  # fmt: skip
    handle = ModelHandle(model, mode=model_mode, amp_dtype=amp_dtype, memory_format=memory_format)
    scale = Scale.of(mean, std)
    check_place()
    check_images(images)
    if model is None:
        raise ValueError("joint_space_adv needs a model.")
    scale.check(images, values=check_values)
    if labels is not None and not callable(objective):
        labels = as_target(labels, len(images), values=check_values, rows=threat.rows)
    if targeted and labels is None:
        raise ValueError("targeted=True approaches the labels, and there are none.")
    if threat.moves_latent:
        check_flow(flow, images)
    check_start("pixel_start", pixel_start, images.shape)
    if latent_start is not None:
        wanted = (len(images), check_manifold(flow).latent_dim)
        check_start("latent_start", latent_start, wanted)
    return climb(
        images, labels, handle, flow, threat, scale,
        pixel_start=pixel_start, latent_start=latent_start, seed=seed, careful=check_values,
    )[0]  # fmt: skip


def robust_mixup(
    images: Tensor,
    labels: Tensor,
    model: Model | None = None,
    *,
    lam: Tensor | float,
    num_classes: int | None = None,
    attack: Callable[[Tensor, Tensor], Any] | None = None,
    eps: float = 0.0,
    norm: Norm = "linf",
    steps: int = 1,
    step_size: float | None = None,
    objective: str | Objective = "ce",
    pixel_start: Tensor | None = None,
    lam_steps: int = 0,
    rho: float = 0.25,
    lam_step_size: float | None = None,
    lam_objective: Literal["kl", "ce"] = "kl",
    order: Literal["mix-attack", "attack-mix"] = "mix-attack",
    space: Space = "pixel",
    flow: Manifold | None = None,
    label: Literal["linear", "geometric"] = "linear",
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    model_mode: Mode = "eval",
    amp_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    seed: int | None = None,
    check_values: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Images mixed with their neighbours, moved to where the model likes the blends least.

    .. math:: x_m = \lambda x + (1 - \lambda) x', \quad t_m = \lambda t + (1 - \lambda) t'

    with ``roll(1)`` as x'. ``lam_steps=0, eps=0`` without an ``attack`` is plain mixup and needs no
    model.

    Args:
        images: ``(B, C, H, W)``, in [0, 1] or normalised by ``mean`` and ``std``.
        labels: Classes ``(B,)`` or probabilities ``(B, C)``.
        model: Classifier; left exactly as it was.
        lam: Weight of the own image: one, or ``(B,)``, or ``(M, B)`` of which the worst is taken.
        num_classes: Needed when the labels are class numbers.
        attack: What climbs on the blend, ``(images, targets) -> images`` or a transform; without
            one, PGD with the next six settings.
        eps: Radius of the pixel perturbation, in [0, 1] pixels.
        norm: Of its ball.
        steps: Its forward and backward passes.
        step_size: By default 2.5 ``eps`` / steps, 1.25 ``eps`` at most.
        objective: What it climbs; see :func:`joint_space_adv`.
        pixel_start: Where it starts.
        lam_steps: Ascent steps of the mixing weight itself, before the attack.
        rho: How far they may take a weight.
        lam_step_size: By default 2.5 ``rho`` / steps, 1.25 ``rho`` at most.
        lam_objective: ``"kl"``, or ``"ce"``, which pulls every weight to 1/2.
        order: ``"mix-attack"``, or ``"attack-mix"`` (IAT).
        space: Where images are mixed: ``"pixel"``, ``"latent"`` or ``"spherical"``.
        flow: For mixing in latent space, on the images' device.
        label: ``"linear"`` in the weight, or ``"geometric"``.
        mean: Of the normalisation of ``images``.
        std: Of the normalisation of ``images``.
        model_mode: ``"eval"`` freezes BatchNorm and dropout while the model is asked.
        amp_dtype: Autocast of the model; by default the caller's.
        memory_format: Of the images that the model gets.
        seed: Of dropout in ``model_mode="train"``.
        check_values: Look at the values of images and labels too, which costs host syncs on a GPU.

    Returns:
        Detached images and their float32 probabilities.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> x, y = torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> mixed, t = robust_mixup(x, y, lam=0.75, num_classes=10)  # plain mixup
        >>> t[0].unique(), bool(torch.allclose(mixed[0], 0.75 * x[0] + 0.25 * x[3]))
        (tensor([0.0000, 0.2500, 0.7500]), True)
        >>> worse, same = robust_mixup(x, y, model, lam=0.75, num_classes=10, eps=4 / 255)
        >>> loss = torch.nn.functional.cross_entropy
        >>> bool((same == t).all()), bool(loss(model(worse), t) > loss(model(mixed), t))
        (True, True)
    """
    mix = Mix(
        lam_steps=lam_steps, rho=rho, lam_step_size=lam_step_size, lam_objective=lam_objective,
        order=order, space=space, label=label,
    )  # fmt: skip
    handle = ModelHandle(model, mode=model_mode, amp_dtype=amp_dtype, memory_format=memory_format)
    scale = Scale.of(mean, std)
    check_place()
    check_images(images)
    scale.check(images, values=check_values)
    weights = check_weights(lam, images, values=check_values)
    threat = Threat(eps=eps, norm=norm, steps=steps, step_size=step_size, objective=objective)
    climbs, weighed = attack is None and eps > 0, lam_steps > 0 or len(weights) > 1
    targets = soft_labels(
        labels, len(images), num_classes, values=check_values,
        rows=threat.rows if climbs else "any", weighed=weighed,
    )  # fmt: skip
    check_space(space, flow)
    if space != "pixel":
        check_flow(flow, images)
    if model is None and (weighed or climbs):
        raise ValueError("robust_mixup asks a model here: pass one, or lam_steps=0 and eps=0.")
    if attack is not None and (threat != Threat(eps=0.0) or pixel_start is not None):
        raise ValueError(
            "eps, norm, steps, step_size, objective and pixel_start belong to the built-in attack."
        )
    check_start("pixel_start", pixel_start, images.shape)
    move: Attack | None = None
    if climbs:
        assert model is not None
        ours = partial(
            joint_space_adv, model=model, eps=eps, norm=norm, steps=steps, step_size=step_size,
            objective=objective, pixel_start=pixel_start, mean=mean, std=std, seed=seed,
            check_values=False, model_mode=model_mode, amp_dtype=amp_dtype,
            memory_format=memory_format,
        )  # fmt: skip
        move = images_of(ours)
    elif attack is not None:
        move = guarded(attack, handle, seed)
    mixed, targets, _ = mix_batch(
        images, targets, weights, mix, attack=move, handle=handle, flow=flow, scale=scale, seed=seed
    )
    return mixed, targets
