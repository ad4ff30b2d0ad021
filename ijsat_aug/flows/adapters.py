"""Other manifolds: any normflows model, a generator with known latents, an autoencoder."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..precision import exact

__all__ = ["Decoder", "NormflowsManifold"]

Function = Callable[[Tensor], Tensor]
A = TypeVar("A", bound="_Adapter")
F = TypeVar("F")


class _Adapter:
    """What holds modules and tensors, and is never changed itself."""

    def to(self: A, device: torch.device | str) -> A:
        """The same on another device; itself where all is already there."""
        place = torch.empty(0, device=device).device
        moved = {name: _moved(value, place) for name, value in vars(self).items()}
        same = all(moved[name] is value for name, value in vars(self).items())
        return self if same else self._changed(**moved)

    def _changed(self: A, **values: Any) -> A:
        twin = copy.copy(self)
        vars(twin).update(values)
        return twin


class NormflowsManifold(_Adapter):
    """A model of the user's own normflows.

    The model is copied, frozen and put into eval mode. Its latents are used as they are: a radius
    counts in their units, which are standard deviations where the base is a standard normal; with
    :meth:`standardised` they are for any base.

    A ``ConditionalNormalizingFlow`` needs its context, by :meth:`given` or ``from_labels``. The
    classes of a ``MultiscaleFlow`` or ``ClassCondFlow`` shape its base density alone: its latents
    are the same for all of them, and no context is used.

    Args:
        model: ``NormalizingFlow``, ``ConditionalNormalizingFlow``, ``ClassCondFlow``,
            ``MultiscaleFlow``, or another with ``inverse_and_log_det`` and ``forward_and_log_det``.
        shape: ``(channels, height, width)`` of the images.
        flat: Whether the model works on vectors instead of images.
        to_model: From [0, 1] pixels to what the model was trained on, such as ``x - 0.5``.
        from_model: The way back.
        context: Of a conditional model, for the whole batch; see :meth:`given`.
        from_labels: From labels to the context of a conditional model, such as
            ``lambda y: y if y.ndim == 2 else one_hot(y, 10).float()``:
            :class:`ijsat_aug.JointSpaceAdv` then gives it those of every batch, on the blends of
            :class:`ijsat_aug.RobustMixup` their probabilities ``(B, C)``.

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
        from_labels: Function | None = None,
    ) -> None:
        import normflows as nf

        of_classes = isinstance(model, nf.ClassCondFlow) or getattr(model, "class_cond", False)
        if isinstance(model, nf.ClassCondFlow):
            model = nf.NormalizingFlow(model.q0, model.flows)
        inverse = getattr(model, "inverse_and_log_det", None)
        if not callable(inverse):
            raise TypeError(
                f"model must be one of normflows, with inverse_and_log_det; got "
                f"{type(model).__name__}."
            )
        if (to_model is None) != (from_model is None):
            raise ValueError("to_model and from_model belong together: pass both, or none.")
        waits = (name for name, part in model.named_modules() if _waits_for_data(part))
        new = next(waits, None)
        if new is not None:
            raise ValueError(
                f"{new or 'the model'} was never initialised, and its first batch would decide "
                "what the flow is: train it first, or run a batch of images through it."
            )
        self.model = _frozen(model)
        self.shape = shape
        self.latent_dim = math.prod(shape)
        # Of the levels of a multiscale model.
        bases = model.q0 if isinstance(model, nf.MultiscaleFlow) else ()
        self._levels = [tuple(base.shape) for base in bases]
        self._flat = flat
        self._to_model, self._from_model = to_model, from_model
        self._loc: Tensor | None = None
        self._scale: Tensor | None = None
        self._uses_context = len(inspect.signature(inverse).parameters) > 1
        self._is_conditional = self._uses_context or of_classes
        self._context, self._from_labels = context, from_labels
        if context is not None or from_labels is not None:
            self._check_conditional()

    @property
    def needs_labels(self) -> bool:
        """Whether it finds its context in labels."""
        return self._uses_context and self._from_labels is not None

    @property
    def is_of_each_sample(self) -> bool:
        """Whether every image has a context of its own."""
        return self.needs_labels or (self._uses_context and self._context is not None)

    def given(self, context: Tensor) -> NormflowsManifold:
        """The same for a batch of images with this context ``(B, ...)``."""
        self._check_conditional()
        return self._changed(_context=context)

    def of_labels(self, labels: Tensor) -> NormflowsManifold:
        """The same for a batch of images with these labels."""
        return self if self._from_labels is None else self.given(self._from_labels(labels))

    def of_samples(self, index: Tensor) -> NormflowsManifold:
        """The same for some samples of the batch."""
        return self if self._context is None else self.given(self._context[index])

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
        if len(images) < 2:
            raise ValueError(f"{len(images)} images have no variance; give some hundreds.")
        with torch.inference_mode(False):  # its tensors would stay without gradients
            z = self._changed(_loc=None, _scale=None).encode(images)
            loc, scale = z.mean(0), z.std(0).clamp(min=1e-6)
        if not z.isfinite().all():
            raise ValueError(
                "the latents of some images are no finite numbers, such as the logit of a black "
                "pixel: keep to_model away from its ends, or leave these images out."
            )
        return self._changed(_loc=loc, _scale=scale)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The model's latents, all levels one behind the other."""
        u = x if self._to_model is None else self._to_model(x)
        # A clone: some of normflows' transforms work in place.
        u = _cast(u.flatten(1) if self._flat else u, self.model).clone()
        z = self._call("inverse", u, len(x))
        flat = torch.cat([part.flatten(1) for part in z], 1) if self._levels else z.flatten(1)
        if self._loc is not None and self._scale is not None:
            flat = (flat - self._loc) / self._scale
        return flat.to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents, differentiable."""
        raw = z if self._loc is None or self._scale is None else z * self._scale + self._loc
        shaped = self._shaped(_cast(raw, self.model).clone())
        u = self._call("forward", shaped, len(z)).to(z.dtype)
        u = u.reshape(-1, *self.shape)
        return u if self._from_model is None else self._from_model(u)

    def _call(self, way: str, value: Any, count: int) -> Any:
        method = getattr(self.model, f"{way}_and_log_det")
        context = self._context if self._uses_context else None
        if context is None and self._uses_context:
            raise ValueError("the flow is conditional: give the batch's context, .given(...).")
        if context is not None and len(context) != count:
            raise ValueError(f"{count} images and {len(context)} contexts do not go together.")
        device = (value[0] if isinstance(value, list) else value).device
        with exact(device):  # whose rounding no inverse would undo
            return (method(value) if context is None else method(value, context))[0]

    def _shaped(self, z: Tensor) -> Any:
        if not self._levels:
            return z if self._flat else z.reshape(-1, *self.shape)
        parts = z.split([math.prod(level) for level in self._levels], 1)
        return [p.reshape(-1, *s) for p, s in zip(parts, self._levels, strict=True)]

    def _check_conditional(self) -> None:
        if not self._is_conditional:
            raise ValueError("the model is not conditional: it takes no context.")


class Decoder(_Adapter):
    """A generator whose latents are known, or an autoencoder.

    Images of a generator have the latents that made them, which come with the data: give those of
    a batch by :meth:`at`. An autoencoder finds its own, and misses the image by more than a flow
    does; the transforms re-add what it misses, so that no move is no change all the same.

    Modules are copied, frozen and put into eval mode, as those of :class:`NormflowsManifold`; any
    other callable is used as it is.

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
        self._decode, self._encode = _frozen(decode), _frozen(encode)
        self._latents: Tensor | None = None

    def at(self, latents: Tensor) -> Decoder:
        """The same for a batch of images with these latents ``(B, *latent_shape)``.

        They belong to that very batch: attack it by :func:`ijsat_aug.functional.joint_space_adv`. A
        transform would ask them about other batches, and with ``fraction`` about a part of one.
        """
        if tuple(latents.shape[1:]) != tuple(self.latent_shape):
            raise ValueError(
                f"latents must have shape (B, {', '.join(map(str, self.latent_shape))}), got "
                f"{tuple(latents.shape)}."
            )
        return self._changed(_latents=latents)

    def of_samples(self, index: Tensor) -> Decoder:
        """The same for some samples of the batch."""
        return self if self._latents is None else self.at(self._latents[index])

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The latents of images."""
        if self._latents is not None:
            if len(x) != len(self._latents):
                raise ValueError(
                    f"{len(x)} images and {len(self._latents)} latents do not go together."
                )
            return self._latents.flatten(1).detach()
        if self._encode is None:
            raise ValueError("a generator knows no latents of images: give them, .at(latents).")
        return self._encode(_cast(x, self._encode)).flatten(1).detach().to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents, differentiable."""
        return self._decode(_cast(z, self._decode).reshape(-1, *self.latent_shape)).to(z.dtype)


def _frozen(function: F) -> F:
    """A copy of a module that nobody trains; any other callable as it is."""
    if not isinstance(function, nn.Module):
        return function
    with torch.inference_mode(False):
        return copy.deepcopy(function).eval().requires_grad_(False)


def _waits_for_data(part: nn.Module) -> bool:
    """Whether it is an ActNorm that takes its scales from the first batch."""
    done = part._buffers.get("data_dep_init_done")
    return done is not None and not bool(done)


def _moved(value: Any, device: torch.device) -> Any:
    with torch.inference_mode(False):
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, nn.Module) and any(t.device != device for t in _tensors(value)):
            return copy.deepcopy(value).to(device)
    return value


def _cast(value: Tensor, function: Any) -> Tensor:
    """The value in the precision of a module."""
    if not isinstance(function, nn.Module):
        return value
    kinds = (t.dtype for t in _tensors(function) if t.is_floating_point())
    return value.to(next(kinds, value.dtype))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
