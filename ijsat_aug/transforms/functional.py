"""The functional twins of the transforms: pure, all randomness passed in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attack.balls import Norm
from ..attack.model import Mode, Model, ModelHandle
from ..attack.objectives import Objective
from ..flows.manifold import Manifold
from .checks import check_flow, check_images, check_place, check_start
from .climb import climb
from .labels import as_target
from .scale import Scale
from .threat import Method, Threat, Update

__all__ = ["joint_space_adv"]


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
    no flow; ``eps=0`` is the on-manifold attack; without both, x comes back.

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
        latent_steps: In how many steps lambda moves; the flow rests in the others.
        method: ``"exact"``, or ``"linear"`` for one latent step without a decode before it.
        objective: ``"ce"``, ``"kl"`` (from the clean prediction), ``"margin"``, or a callable
            ``(logits, labels) -> (B,)`` that gets the labels unchanged.
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
        labels = as_target(labels, len(images), values=check_values)
    if threat.moves_latent:
        check_flow(flow, images)
    check_start("pixel_start", pixel_start, images.shape)
    if flow is not None:
        check_start("latent_start", latent_start, (len(images), flow.latent_dim))
    return climb(
        images, labels, handle, flow, threat, scale,
        pixel_start=pixel_start, latent_start=latent_start, seed=seed, careful=check_values,
    ).images  # fmt: skip
