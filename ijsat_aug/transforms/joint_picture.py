"""The image of a latent and a pixel perturbation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attack.ascent import Values
from ..attack.clip import clip
from ..flows.manifold import Manifold, TapedManifold, has_tape, of_samples
from ..flows.pyramid import Pyramid
from ..precision import full_precision

__all__ = ["JointPicture", "exact", "linear"]

Decode = Callable[[Tensor], Tensor]


class JointPicture:
    """``clip(clip(G(latent) + r) + pixel)``; the flow is called once for each latent.

    ``r`` is what the flow's round trip loses of the clean image. Without it, the first latent must
    be the clean image's, which then tells it. ``first`` stands for the flow's decode at the first
    latent.
    """

    def __init__(
        self,
        clean: Tensor,
        flow: Manifold,
        residual: Tensor | None = None,
        first: Decode | None = None,
    ) -> None:
        self._clean = clean
        self._flow = flow
        self._residual = residual
        self._decode = first or flow.decode
        self._latent: Tensor | None = None
        self._base = clean

    def __call__(self, values: Values) -> Tensor:
        """``(B, C, H, W)``."""
        latent = values["latent"]
        if latent is not self._latent:
            with full_precision(latent.device):
                decoded = self._decode(latent).to(self._clean.dtype)
            if self._residual is None:
                self._residual = (self._clean - decoded).detach()
            self._base = clip(decoded + self._residual)
            self._latent = latent
            self._decode = self._flow.decode
        return clip(self._base + values["pixel"]) if "pixel" in values else self._base

    def take(self, index: Tensor) -> JointPicture:
        """The same for some samples."""
        residual = None if self._residual is None else self._residual[index]
        return JointPicture(self._clean[index], of_samples(self._flow, index), residual)


def exact(flow: Manifold, clean: Tensor, *, zero_start: bool) -> tuple[Tensor, JointPicture]:
    """Latents, and a picture whose gradient goes through the decoder at every latent."""
    with full_precision(clean.device):
        z = flow.encode(clean).to(clean.dtype)
    if zero_start:
        return z, JointPicture(clean, flow)
    with torch.no_grad(), full_precision(clean.device):
        residual = clean - flow.decode(z).to(clean.dtype)
    return z, JointPicture(clean, flow, residual)


def linear(flow: Manifold, clean: Tensor) -> tuple[Tensor, JointPicture]:
    """Latents, and a picture whose first gradient is that at the clean image, before any decode.

    Where the flow has a tape, the residual is what it says itself that it leaves out. The error of
    its round trip, below 1e-5 in float32, would cost a decode of its own.
    """
    if not has_tape(flow):
        return exact(flow, clean, zero_start=True)
    with full_precision(clean.device):
        z, tape = flow.encode_with_tape(clean)
        rest = flow.rest(clean) if isinstance(flow, Pyramid) else torch.zeros_like(clean)
    low = clean - rest
    return z.to(clean.dtype), JointPicture(
        clean, flow, rest, first=lambda latent: _CleanImage.apply(latent, low, flow, tape)
    )


class _CleanImage(torch.autograd.Function):
    """What the clean latent decodes to, with the gradient of the decoder there."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, clean: Tensor, flow: TapedManifold, tape: Any) -> Tensor:
        ctx.flow, ctx.tape = flow, tape
        return clean.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        tape, ctx.tape = ctx.tape, None
        with full_precision(g.device):
            return ctx.flow.vjp(tape, g).to(g.dtype), None, None, None
