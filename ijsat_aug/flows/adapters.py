"""Other manifolds: any normflows model, a generator with known latents, an autoencoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Decoder", "NormflowsManifold"]

Function = Callable[[Tensor], Tensor]


class NormflowsManifold:
    """A model of the user's own normflows: ``NormalizingFlow``, ``MultiscaleFlow`` or conditional.

    The model is copied, frozen and put into eval mode. Its latents are used as they are: a radius
    counts in their units, which are standard deviations where the base is a standard normal; with
    :meth:`standardised` they are for any base.

    Args:
        model: With ``inverse`` and ``forward`` (``*_and_log_det`` of a ``MultiscaleFlow``).
        shape: ``(channels, height, width)`` of the images.
        flat: Whether the model works on vectors instead of images.
        to_model: From [0, 1] pixels to what the model was trained on, such as ``x - 0.5``.
        from_model: The way back.
        context: Of a conditional model, for the whole batch; see :meth:`given`.

    Example:
        >>> import normflows as nf
        >>> parts = [nf.flows.Permute(64), nf.flows.AffineConstFlow(64)]
        >>> model = nf.NormalizingFlow(nf.distributions.DiagGaussian(64), parts)
        >>> manifold = NormflowsManifold(model, (1, 8, 8), flat=True)
        >>> x = torch.rand(2, 1, 8, 8)
        >>> torch.allclose(manifold.decode(manifold.encode(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        *,
        flat: bool = False,
        to_model: Function | None = None,
        from_model: Function | None = None,
        context: Tensor | None = None,
    ) -> None:
        if not hasattr(model, "inverse_and_log_det"):
            raise TypeError(
                f"model must be one of normflows, with inverse_and_log_det; got "
                f"{type(model).__name__}."
            )
        if (to_model is None) != (from_model is None):
            raise ValueError("to_model and from_model belong together: pass both, or none.")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.shape = shape
        self.latent_dim = math.prod(shape)
        self._flat = flat
        self._to_model, self._from_model = to_model, from_model
        self._context = context
        self._parts: list[torch.Size] | None = None
        self._loc: Tensor | None = None
        self._scale: Tensor | None = None

    def given(self, context: Tensor) -> NormflowsManifold:
        """The same for images of this context, such as their classes ``(B, ...)``."""
        return self._changed(_context=context)

    def standardised(self, images: Tensor) -> NormflowsManifold:
        """The same with latents of mean 0 and variance 1 on these images.

        Example:
            >>> import normflows as nf
            >>> model = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [nf.flows.Permute(4)])
            >>> images = torch.rand(50, 1, 2, 2)
            >>> manifold = NormflowsManifold(model, (1, 2, 2), flat=True).standardised(images)
            >>> z = manifold.encode(images)
            >>> bool(z.mean().abs() < 1e-5), bool((z.std(0) - 1).abs().max() < 1e-5)
            (True, True)
        """
        z = self._changed(_loc=None, _scale=None).encode(images)
        return self._changed(_loc=z.mean(0), _scale=z.std(0).clamp(min=1e-6))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The model's latents, all levels one behind the other."""
        u = x if self._to_model is None else self._to_model(x)
        z = self._call("inverse", u.flatten(1) if self._flat else u)
        parts = z if isinstance(z, (list, tuple)) else [z]
        self._parts = [part.shape[1:] for part in parts] if isinstance(z, (list, tuple)) else None
        flat = torch.cat([part.flatten(1) for part in parts], 1)
        if self._loc is None or self._scale is None:
            return flat
        return (flat - self._loc) / self._scale

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents, differentiable."""
        if self._loc is not None and self._scale is not None:
            z = z * self._scale + self._loc
        u = self._call("forward", self._shaped(z))
        u = u.reshape(-1, *self.shape)
        return u if self._from_model is None else self._from_model(u)

    def to(self, device: torch.device | str) -> NormflowsManifold:
        """The same on another device; itself where it is already there."""
        if all(p.device == torch.device(device) for p in self.model.parameters()):
            return self
        moved = {
            name: None if value is None else value.to(device)
            for name, value in vars(self).items()
            if name in ("_loc", "_scale", "_context")
        }
        return self._changed(model=copy.deepcopy(self.model).to(device), **moved)

    def _call(self, way: str, value: Any) -> Any:
        context = () if self._context is None else (self._context,)
        return getattr(self.model, f"{way}_and_log_det")(value, *context)[0]

    def _shaped(self, z: Tensor) -> Any:
        if self._parts is None:
            return z if self._flat else z.reshape(-1, *self.shape)
        sizes = [part.numel() for part in self._parts]
        return [p.reshape(-1, *s) for p, s in zip(z.split(sizes, 1), self._parts, strict=True)]

    def _changed(self, **values: Any) -> NormflowsManifold:
        twin = copy.copy(self)
        vars(twin).update(values)
        return twin


class Decoder:
    """A generator whose latents are known, or an autoencoder.

    Images of a generator have the latents that made them, which come with the data: give those of
    a batch by :meth:`at`. An autoencoder finds its own, and misses the image by more than a flow
    does; the transforms re-add what it misses, so that no move is no change all the same.

    Args:
        decode: Latents ``(B, *latent_shape)`` to images in [0, 1].
        shape: ``(channels, height, width)`` of the images.
        latent_shape: Of one latent, such as ``(18, 512)``.
        encode: Of an autoencoder: images to latents.

    Example:
        >>> generator = nn.Sequential(nn.Linear(5, 64), nn.Unflatten(1, (1, 8, 8)), nn.Sigmoid())
        >>> z = torch.randn(3, 5)
        >>> manifold = Decoder(generator, (1, 8, 8), (5,)).at(z)
        >>> torch.equal(manifold.encode(generator(z)), z)
        True
    """

    def __init__(
        self,
        decode: Function,
        shape: tuple[int, int, int],
        latent_shape: tuple[int, ...],
        encode: Function | None = None,
    ) -> None:
        self.shape = shape
        self.latent_shape = latent_shape
        self.latent_dim = math.prod(latent_shape)
        self._decode, self._encode = decode, encode

    def at(self, latents: Tensor) -> Decoder:
        """The same for a batch of images with these latents ``(B, *latent_shape)``."""
        if tuple(latents.shape[1:]) != tuple(self.latent_shape):
            raise ValueError(
                f"latents must have shape (B, {', '.join(map(str, self.latent_shape))}), got "
                f"{tuple(latents.shape)}."
            )

        def known(x: Tensor) -> Tensor:
            if len(x) != len(latents):
                raise ValueError(f"{len(x)} images and {len(latents)} latents do not go together.")
            return latents

        return Decoder(self._decode, self.shape, self.latent_shape, known)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The latents of images."""
        if self._encode is None:
            raise ValueError("a generator knows no latents of images: give them, .at(latents).")
        return self._encode(x).flatten(1).detach()

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents, differentiable."""
        return self._decode(z.reshape(-1, *self.latent_shape))
