"""The image of a latent and a pixel perturbation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..attack.ascent import Values
from ..attack.clip import clip
from ..flows.manifold import Manifold, TapedManifold
from ..flows.pyramid import Pyramid

__all__ = ["JointPicture", "exact", "linear"]

Decode = Callable[[Tensor], Tensor]


class JointPicture:
    """``clip(clip(G(latent) + r) + pixel)``; the flow is called once for each latent.

    ``r`` is what the flow's round trip loses of the clean image. Without it, the first latent must
    be the clean image's, which then tells it.
    """

    def __init__(self, clean: Tensor, decode: Decode, residual: Tensor | None = None) -> None:
        self._clean = clean
        self._decode = decode
        self._residual = residual
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
        return clip(self._base + values["pixel"]) if "pixel" in values else self._base

    def take(self, index: Tensor) -> JointPicture:
        """The same for some samples."""
        residual = None if self._residual is None else self._residual[index]
        return JointPicture(self._clean[index], self._decode, residual)


def exact(flow: Manifold, clean: Tensor, *, zero_start: bool) -> tuple[Tensor, JointPicture]:
    """Latents, and a picture whose gradient goes through the decoder at every latent."""
    with full_precision(clean.device):
        z = flow.encode(clean).to(clean.dtype)
    if zero_start:
        return z, JointPicture(clean, flow.decode)
    with torch.no_grad(), full_precision(clean.device):
        residual = clean - flow.decode(z).to(clean.dtype)
    return z, JointPicture(clean, flow.decode, residual)


def linear(flow: Manifold, clean: Tensor) -> tuple[Tensor, JointPicture]:
    """Latents, and a picture whose first gradient is that at the clean image, before any decode.

    Where the flow has a tape, the residual is what it says itself that it leaves out. The error of
    its round trip, below 1e-5 in float32, would cost a decode of its own.
    """
    if isinstance(flow, TapedManifold):
        z, tape = flow.encode_with_tape(clean)
        rest = flow.rest(clean) if isinstance(flow, Pyramid) else torch.zeros_like(clean)
        first = clean - rest
        decode = _Once(lambda latent: _CleanImage.apply(latent, first, flow, tape), flow.decode)
        return z.to(clean.dtype), JointPicture(clean, decode, rest)
    with full_precision(clean.device):
        return flow.encode(clean).to(clean.dtype), JointPicture(clean, flow.decode)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast: rounding a flow's state to bfloat16 would move pixels by 4/255."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _Once:
    """One function for the first call, another for all later ones."""

    def __init__(self, first: Decode, later: Decode) -> None:
        self._first: Decode | None = first
        self._later = later

    def __call__(self, latent: Tensor) -> Tensor:
        call, self._first = self._first or self._later, None
        return call(latent)


class _CleanImage(torch.autograd.Function):
    """What the clean latent decodes to, with the gradient of the decoder there."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, clean: Tensor, flow: TapedManifold, tape: Any) -> Tensor:
        ctx.flow, ctx.tape = flow, tape
        return clean.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        tape, ctx.tape = ctx.tape, None
        return ctx.flow.vjp(tape, g).to(g.dtype), None, None, None
