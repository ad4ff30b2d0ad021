"""Fold a trained Glow into the blocks of a frozen one; every product in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .blocks import Block, Conv, Mix
from .frozen import FrozenGlow, Memory
from .glow import GlowConfig

__all__ = ["freeze"]


def freeze(
    config: GlowConfig,
    state: Mapping[str, Tensor],
    *,
    info: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    memory: Memory = "tape",
) -> FrozenGlow:
    """Fold the state dict of :func:`build_glow` into a :class:`FrozenGlow`.

    Matrices, inverses and products are computed once, in float64. Weights that do not fit the
    config are a ``ValueError``.

    Args:
        config: That the weights were trained with.
        state: The state dict.
        info: What the flow tells about itself, as in a checkpoint: calibration, data, metrics.
        device: Where it works; it can be moved later.
        dtype: Of latents and images inside.
        compute_dtype: Of the coupling networks; by default the same.
        memory: ``"tape"`` keeps what a backward pass needs, ``"low"`` computes it again.

    Example:
        >>> from ijsat_aug.flows.glow import GlowConfig, build_glow
        >>> config = GlowConfig(shape=(1, 8, 8), levels=2, steps=2, hidden=8, bins=17)
        >>> model = build_glow(config)
        >>> _ = model(torch.rand(16, 1, 8, 8))  # the first batch initialises ActNorm
        >>> flow = freeze(config, model.state_dict())
        >>> flow.latent_dim
        64
    """
    with torch.inference_mode(False), torch.no_grad():
        weights = _Weights(state)
        levels = tuple(
            tuple(_fold(weights, f"flows.{i}.{k}.", config, channels) for k in range(config.steps))
            for i, channels in enumerate(config.block_channels)
        )
        base = _base(weights, config)
        weights.check_all_used()
    flow = FrozenGlow(config, levels, *_moments(base), base, dict(info or {}), memory)
    return flow.to(device, dtype=dtype, compute_dtype=compute_dtype or dtype)


class _Weights:
    """Takes named tensors out of a state dict, in float64, and says which one is wrong."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.unused = set(state)

    def take(self, name: str, *shape: int) -> Tensor:
        if name not in self.state:
            raise ValueError(f"tensor {name!r} is missing: the weights belong to another config.")
        tensor = self.state[name].detach()
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, the config asks for {shape}: "
                "the weights belong to another config."
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"tensor {name!r} holds values that are not finite; train it again.")
        self.unused.discard(name)
        return tensor.to("cpu", torch.float64, copy=True)  # never the model's own memory

    def check_all_used(self) -> None:
        if self.unused:
            raise ValueError(
                f"tensor {min(self.unused)!r} is not part of the config: "
                "the weights belong to another config."
            )


def _fold(weights: _Weights, prefix: str, config: GlowConfig, channels: int) -> Block:
    c = channels
    net, conv, norm = (f"{prefix}flows.{i}." for i in range(3))
    if weights.take(f"{norm}data_dep_init_done") != 1:
        raise ValueError(
            f"ActNorm {norm!r} was never initialised; run one batch of images through the flow."
        )
    log_scale, shift = weights.take(f"{norm}s", 1, c, 1, 1), weights.take(f"{norm}t", 1, c, 1, 1)
    scale, shift = log_scale.flatten().exp(), shift.flatten()
    matrix = _lu_matrix(weights, conv, c)
    inverse = torch.linalg.inv(matrix)
    decode = _mix(scale[:, None] * inverse, shift)
    encode = _mix(matrix / scale, -(matrix / scale) @ shift)
    return Block(encode, decode, _fold_net(weights, net, config, c), config.clamp)


def _lu_matrix(weights: _Weights, prefix: str, c: int) -> Tensor:
    permutation, lower, upper = (weights.take(f"{prefix}{n}", c, c) for n in ("P", "L", "U"))
    weights.take(f"{prefix}eye", c, c)
    diagonal = weights.take(f"{prefix}sign_S", c) * weights.take(f"{prefix}log_S", c).exp()
    unit_lower = lower.tril(-1) + torch.eye(c, dtype=torch.float64, device="cpu")
    return permutation @ unit_lower @ (upper.triu(1) + diagonal.diag())


def _fold_net(
    weights: _Weights, prefix: str, config: GlowConfig, channels: int
) -> tuple[Conv, Conv, Conv]:
    hidden, half = config.hidden, channels // 2
    path = f"{prefix}flows.1.param_map.net."
    sizes = ((0, hidden, half, 3), (2, hidden, hidden, 1), (4, channels, hidden, 3))
    first, second, (weight, bias) = (
        (weights.take(f"{path}{i}.weight", n, m, k, k), weights.take(f"{path}{i}.bias", n))
        for i, n, m, k in sizes
    )
    # normflows interleaves shift and log-scale; side by side they split into views. Going
    # forward, the division of clamp * tanh(raw / clamp) is folded in too.
    order = torch.arange(channels, device="cpu").unflatten(0, (-1, 2)).t().flatten()
    divide = torch.ones(channels, dtype=torch.float64, device="cpu")
    divide[half:] = config.clamp
    third = _conv(weight[order], bias[order])
    third = third._replace(
        weight=third.weight / divide[:, None, None, None], bias=third.bias / divide
    )
    return _conv(*first), _conv(*second), third


def _conv(weight: Tensor, bias: Tensor) -> Conv:
    return Conv(weight, bias, weight.transpose(0, 1).flip(2, 3))


def _mix(matrix: Tensor, bias: Tensor) -> Mix:
    return Mix(matrix.t(), bias, matrix)


def _base(weights: _Weights, config: GlowConfig) -> tuple[Tensor, Tensor]:
    """Means and standard deviations ``(classes or 1, D)`` of the base density."""
    means, stds = [], []
    for i, shape in enumerate(config.latent_shapes):
        full = (1, *shape) if config.num_classes is None else (*shape, config.num_classes)
        loc, scale = weights.take(f"q0.{i}.loc", *full), weights.take(f"q0.{i}.log_scale", *full)
        if config.num_classes is not None:
            loc, scale = loc.movedim(-1, 0), scale.movedim(-1, 0)
        means.append(loc.flatten(1))
        stds.append(scale.flatten(1).exp())
    return torch.cat(means, 1), torch.cat(stds, 1)


def _moments(base: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the classes: those of their mixture."""
    means, stds = base
    mean = means.mean(0)
    return mean, ((stds.square() + means.square()).mean(0) - mean.square()).clamp_min(0).sqrt()
