"""A frozen Glow: the same function as normflows', with folded weights and its own gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import exact
from .blocks import Block, Conv, Kept, Mix, block_vjp, decode_block, encode_block
from .glow import GlowConfig, from_unit, to_unit

__all__ = ["FrozenGlow", "Memory", "Tape", "check_options"]

Memory = Literal["tape", "low"]


@dataclass(frozen=True)
class Tape:
    """The record of one encode or decode pass, for :meth:`FrozenGlow.vjp`.

    Example:
        >>> import ijsat_aug
        >>> flow = ijsat_aug.load_flow("digits")
        >>> _, tape = flow.encode_with_tape(torch.rand(2, 1, 8, 8))
        >>> len(tape), tape.nbytes()
        (2, 47616)
    """

    blocks: tuple[Kept, ...]
    squashed: Tensor | None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.blocks[0].scale)

    def tensors(self) -> list[Tensor]:
        """Everything that it keeps."""
        kept = [t for k in self.blocks for t in (k.scale, k.slope, *k.gates)]
        return kept if self.squashed is None else [*kept, self.squashed]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> Tape:
        """The inverse of :meth:`tensors`."""
        count = len(tensors) // 4
        quads = (tensors[4 * i : 4 * i + 4] for i in range(count))
        blocks = tuple(Kept(scale, slope, (one, two)) for scale, slope, one, two in quads)
        return cls(blocks, tensors[-1] if len(tensors) % 4 else None)

    def nbytes(self) -> int:
        """Bytes that the tape keeps alive."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())


@dataclass(frozen=True, eq=False)
class FrozenGlow:
    """A frozen flow: exact ``encode``, differentiable ``decode``, and nothing to train.

    Images are float tensors in [0, 1]; latents are flat ``(B, D)`` tensors with zero mean and unit
    variance under the base density. Both directions always run in the flow's own precision, also
    under autocast. Use :func:`freeze` or :func:`ijsat_aug.load_flow` to get one.

    Example:
        >>> import ijsat_aug
        >>> flow = ijsat_aug.load_flow("digits")
        >>> x = torch.rand(2, 1, 8, 8)
        >>> z = flow.encode(x)
        >>> z.shape
        torch.Size([2, 64])
        >>> bool(torch.allclose(flow.decode(z), x, atol=1e-5))
        True
    """

    config: GlowConfig
    levels: tuple[tuple[Block, ...], ...]
    mean: Tensor
    std: Tensor
    base: tuple[Tensor, Tensor]
    info: Mapping[str, Any]
    memory: Memory = "tape"

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the images."""
        return self.config.shape

    @property
    def latent_dim(self) -> int:
        """Length D of a latent."""
        return self.config.latent_dim

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the state; the coupling networks may use less."""
        return self.mean.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of the coupling networks."""
        return self.levels[0][0].net[0].weight.dtype

    def encode(self, x: Tensor) -> Tensor:
        """The latent of each image, exactly and without gradient.

        Example:
            >>> import ijsat_aug
            >>> flow = ijsat_aug.load_flow("digits")
            >>> flow.encode(torch.zeros(3, 1, 8, 8)).shape
            torch.Size([3, 64])
        """
        with torch.no_grad(), exact(x.device):
            return self._encode(self._image(x), None)[0]

    def encode_with_tape(self, x: Tensor) -> tuple[Tensor, Tape]:
        """The latents, and the tape for the gradient of ``decode`` at them.

        Example:
            >>> import ijsat_aug
            >>> flow = ijsat_aug.load_flow("digits")
            >>> z, tape = flow.encode_with_tape(torch.rand(2, 1, 8, 8))
            >>> flow.vjp(tape, torch.ones(2, 1, 8, 8)).shape  # no decode needed
            torch.Size([2, 64])
        """
        kept: list[Kept] = []
        with torch.no_grad(), exact(x.device):
            z, squashed = self._encode(self._image(x), kept)
            return z, Tape(tuple(reversed(kept)), squashed)

    def decode(self, z: Tensor) -> Tensor:
        """The image of each latent, differentiable once with respect to ``z``; not clipped.

        Example:
            >>> import ijsat_aug
            >>> flow = ijsat_aug.load_flow("digits")
            >>> z = torch.zeros(1, 64, requires_grad=True)
            >>> flow.decode(z).sum().backward()
            >>> z.grad.shape
            torch.Size([1, 64])
        """
        with exact(z.device):
            z = self._latent(z)
            if torch.is_grad_enabled() and z.requires_grad:
                image: Tensor = _Decode.apply(z, self)
                return image
            with torch.no_grad():
                return self._decode(z, None)[0]

    def decode_with_tape(self, z: Tensor) -> tuple[Tensor, Tape]:
        """The images, and the tape for the gradient at ``z``; no autograd graph is built.

        Example:
            >>> import ijsat_aug
            >>> flow = ijsat_aug.load_flow("digits")
            >>> x, tape = flow.decode_with_tape(torch.zeros(1, 64))
            >>> flow.vjp(tape, torch.ones_like(x)).shape
            torch.Size([1, 64])
        """
        kept: list[Kept] = []
        with torch.no_grad(), exact(z.device):
            x, squashed = self._decode(self._latent(z), kept)
            return x, Tape(tuple(kept), squashed)

    def vjp(self, tape: Tape, g: Tensor) -> Tensor:
        """The gradient ``g^T d decode(z) / dz`` at the point where the tape was recorded.

        Example:
            >>> import ijsat_aug
            >>> flow = ijsat_aug.load_flow("digits")
            >>> _, tape = flow.encode_with_tape(torch.rand(2, 1, 8, 8))
            >>> flow.vjp(tape, torch.zeros(2, 1, 8, 8)).abs().max()
            tensor(0.)
        """
        if g.shape != (len(tape), *self.shape):
            raise ValueError(
                f"the gradient has shape {tuple(g.shape)}, the tape was recorded for "
                f"{(len(tape), *self.shape)}."
            )
        with torch.no_grad(), exact(g.device):
            h = self._to_domain_vjp(g.to(self.dtype), tape.squashed)
            blocks = iter(reversed(tape.blocks))
            parts: list[Tensor] = []
            for level, times in self._from_pixels():
                h = _unshuffle(h, times)
                for block in reversed(level):
                    h = block_vjp(block, next(blocks), h)
                h = _split_off(h, parts, last=level is self.levels[0])
            return self._flatten(parts) * self.std

    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        *,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Random images of the flow, clipped to [0, 1].

        Args:
            count: How many.
            temperature: Scale of the base density's spread.
            generator: Source of randomness, on the flow's device.
            labels: Their classes, for a class-conditional flow; random by default.

        Example:
            >>> import ijsat_aug
            >>> ijsat_aug.load_flow("digits").sample(4, temperature=0.7).shape
            torch.Size([4, 1, 8, 8])
        """
        means, stds = self.base
        place: dict[str, Any] = {"generator": generator, "device": self.device}
        if labels is None:
            labels = torch.randint(len(means), (count,), **place)
        elif self.config.num_classes is None or labels.shape != (count,):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not fit: they must be ({count},), and "
                "the flow class-conditional."
            )
        elif count and not 0 <= int(labels.min()) <= int(labels.max()) < len(means):
            raise ValueError(f"labels must lie in 0..{len(means) - 1}, got {labels.tolist()}.")
        noise = torch.randn(count, self.latent_dim, dtype=self.dtype, **place)
        latents = means[labels] + temperature * stds[labels] * noise
        return self.decode((latents - self.mean) / self.std).clamp(0, 1)

    def to(
        self,
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        memory: Memory | None = None,
    ) -> FrozenGlow:
        """A flow with the same function elsewhere; ``self`` when nothing changes.

        Args:
            device: Where the weights shall lie.
            dtype: Precision of the state. It can only fall, as can ``compute_dtype``.
            compute_dtype: Precision of the coupling networks, such as ``torch.bfloat16``.
            memory: ``"tape"`` keeps what the gradient of ``decode`` needs; ``"low"`` keeps no more
                than an image and inverts the flow block by block on the way back.

        Example:
            >>> import ijsat_aug
            >>> flow = ijsat_aug.load_flow("digits")
            >>> flow.to("cpu") is flow
            True
            >>> flow.to(compute_dtype=torch.bfloat16).compute_dtype
            torch.bfloat16
        """
        memory = memory or self.memory
        check_options(compute_dtype, memory)
        target = torch.empty(0, device=device or self.device, dtype=dtype or self.dtype)
        low = compute_dtype or (dtype if self.compute_dtype == self.dtype else self.compute_dtype)
        low = low or self.compute_dtype
        for name, new, old in (
            ("dtype", target.dtype, self.dtype),
            ("compute_dtype", low, self.compute_dtype),
        ):
            if torch.finfo(new).eps < torch.finfo(old).eps:
                raise ValueError(
                    f"{name}={new} needs more precision than the weights still have ({old}); load "
                    "or freeze the flow again."
                )
        same_place = target.device == self.device and target.dtype == self.dtype
        if same_place and low == self.compute_dtype:
            return self if memory == self.memory else replace(self, memory=memory)
        with torch.inference_mode(False), torch.no_grad():
            levels = tuple(tuple(_move(b, target, low) for b in level) for level in self.levels)
            mean, std = self.mean.to(target), self.std.to(target)
            base = (self.base[0].to(target), self.base[1].to(target))
        return replace(self, levels=levels, mean=mean, std=std, base=base, memory=memory)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        c = self.config
        return (
            f"FrozenGlow({size}, levels={c.levels}, steps={c.steps}, hidden={c.hidden}, "
            f"device={str(self.device)!r}, compute_dtype={self.compute_dtype})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenGlow:
        return self  # frozen, and shared by all who use it

    def _image(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"this flow takes images of shape (B, {', '.join(map(str, self.shape))}), "
                f"got {tuple(x.shape)}."
            )
        if not x.is_floating_point():
            raise TypeError(
                f"this flow takes float images in [0, 1], got {x.dtype}; "
                "divide 8-bit images by 255."
            )
        self._check_device(x)
        return x.detach().to(self.dtype)

    def _latent(self, z: Tensor) -> Tensor:
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(
                f"this flow takes latents of shape (B, {self.latent_dim}), got {tuple(z.shape)}."
            )
        self._check_device(z)
        return z.to(self.dtype)

    def _check_device(self, tensor: Tensor) -> None:
        if tensor.device != self.device:
            raise ValueError(
                f"the flow is on {self.device} and the batch on {tensor.device}; "
                f"use flow.to({str(tensor.device)!r})."
            )

    def _encode(self, x: Tensor, kept: list[Kept] | None) -> tuple[Tensor, Tensor | None]:
        h, squashed = self._to_domain(x)
        h = h.contiguous(memory_format=torch.channels_last)
        parts: list[Tensor] = []
        for level, times in self._from_pixels():
            h = _unshuffle(h, times)
            for block in reversed(level):
                h = encode_block(block, h, kept)
            h = _split_off(h, parts, last=level is self.levels[0])
        return (self._flatten(parts) - self.mean) / self.std, squashed

    def _decode(self, z: Tensor, kept: list[Kept] | None) -> tuple[Tensor, Tensor | None]:
        return self._from_domain(self._decode_to_domain(z, kept))

    def _decode_to_domain(self, z: Tensor, kept: list[Kept] | None) -> Tensor:
        parts = self._unflatten(z * self.std + self.mean)
        h = parts[0]
        for i, level in enumerate(self.levels):
            if i:
                h = torch.cat((h, parts[i]), dim=1)
            for block in level:
                h = decode_block(block, h, kept)
            h = _shuffle(h, self.config.squeezes[i])
        return h

    def _from_pixels(self) -> Iterator[tuple[tuple[Block, ...], int]]:
        """The levels, finest first, each with how often it halves the image before."""
        return zip(reversed(self.levels), reversed(self.config.squeezes), strict=True)

    def _vjp_by_inversion(self, h: Tensor, g: Tensor) -> Tensor:
        """The gradient at the latent that decodes to ``h``, inverting one block at a time."""
        squashed = None if self.config.logit is None else torch.sigmoid(h)
        g = self._to_domain_vjp(g.to(self.dtype), squashed)
        rest: list[Tensor] = []
        parts: list[Tensor] = []
        for level, times in self._from_pixels():
            h, g = _unshuffle(h, times), _unshuffle(g, times)
            for block in reversed(level):
                kept: list[Kept] = []
                h = encode_block(block, h, kept)
                g = block_vjp(block, kept[0], g)
            last = level is self.levels[0]
            h, g = _split_off(h, rest, last=last), _split_off(g, parts, last=last)
        return self._flatten(parts) * self.std

    def _to_domain(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        u = to_unit(x, self.config.bins)
        if self.config.logit is None:
            return u - 0.5, None
        squashed = self.config.logit + (1 - 2 * self.config.logit) * u
        return torch.logit(squashed), squashed

    def _from_domain(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.logit is None:
            return from_unit(v + 0.5, self.config.bins), None
        squashed = torch.sigmoid(v)
        u = (squashed - self.config.logit) / (1 - 2 * self.config.logit)
        return from_unit(u, self.config.bins), squashed

    def _to_domain_vjp(self, g: Tensor, squashed: Tensor | None) -> Tensor:
        factor = self.config.bins / (self.config.bins - 1)
        if self.config.logit is not None:
            assert squashed is not None
            g = g * (squashed * (1 - squashed))
            factor /= 1 - 2 * self.config.logit
        return (g * factor).contiguous(memory_format=torch.channels_last)

    def _flatten(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten(1) for part in reversed(parts)], dim=1)

    def _unflatten(self, z: Tensor) -> list[Tensor]:
        sizes = [math.prod(shape) for shape in self.config.latent_shapes]
        parts = z.split(sizes, dim=1)
        shaped = (p.unflatten(1, s) for p, s in zip(parts, self.config.latent_shapes, strict=True))
        return [p.contiguous(memory_format=torch.channels_last) for p in shaped]


def check_options(compute_dtype: torch.dtype | None, memory: Memory) -> None:
    """Refuse options that no flow has, before a file is read for them."""
    if memory not in get_args(Memory):
        raise ValueError(f"memory must be one of {get_args(Memory)}, got {memory!r}.")
    floats = isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point
    if not (compute_dtype is None or floats):
        raise TypeError(f"compute_dtype is a dtype such as torch.bfloat16, got {compute_dtype!r}.")


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, flow: FrozenGlow) -> Tensor:
        ctx.flow = flow
        if flow.memory == "low":
            h = flow._decode_to_domain(z, None)
            ctx.save_for_backward(h)  # not the image: its sigmoid may have saturated
            return flow._from_domain(h)[0]
        x, tape = flow.decode_with_tape(z)
        ctx.save_for_backward(*tape.tensors())
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        flow: FrozenGlow = ctx.flow
        if flow.memory == "low":
            with exact(g.device):
                (h,) = ctx.saved_tensors
                return flow._vjp_by_inversion(h, g), None
        return flow.vjp(Tape.from_tensors(ctx.saved_tensors), g), None


def _unshuffle(h: Tensor, times: int) -> Tensor:
    """Squeeze 2x2 pixels into channels, some times over; channels stay last."""
    for _ in range(times):
        b, c, height, width = h.shape
        tiles = h.permute(0, 2, 3, 1).reshape(b, height // 2, 2, width // 2, 2, c)
        flat = tiles.permute(0, 1, 3, 5, 2, 4).reshape(b, height // 2, width // 2, 4 * c)
        h = flat.permute(0, 3, 1, 2)
    return h


def _shuffle(h: Tensor, times: int) -> Tensor:
    """The inverse of :func:`_unshuffle`."""
    for _ in range(times):
        b, c, height, width = h.shape
        tiles = h.permute(0, 2, 3, 1).reshape(b, height, width, c // 4, 2, 2)
        flat = tiles.permute(0, 1, 4, 2, 5, 3).reshape(b, 2 * height, 2 * width, c // 4)
        h = flat.permute(0, 3, 1, 2)
    return h


def _split_off(h: Tensor, parts: list[Tensor], last: bool) -> Tensor:
    """Put aside the latents of this level and hand on the rest."""
    if not last:
        h, part = h.chunk(2, dim=1)
        parts.append(part)
        return h
    parts.append(h)
    return h


def _move(block: Block, target: Tensor, low: torch.dtype) -> Block:
    # On a CPU exact products beside bfloat16 networks only cost time; Apple's GPUs have no float64.
    device = target.device.type
    plain = device == "mps" or (device == "cpu" and low != target.dtype)
    exact = target.dtype if plain else torch.float64

    def mix(m: Mix) -> Mix:
        matrix, bias = (t.to(target.device, exact) for t in m[:2])
        return Mix(matrix.contiguous(), bias, m.jacobian.to(target).contiguous())

    def conv(c: Conv) -> Conv:
        weight, bias, transposed = (t.to(target.device, low) for t in c)
        last = torch.channels_last
        return Conv(
            weight.contiguous(memory_format=last), bias, transposed.contiguous(memory_format=last)
        )

    one, two, three = block.net
    net = (conv(one), conv(two), conv(three))
    return Block(mix(block.encode), mix(block.decode), net, block.clamp)
