"""Glow on normflows: one frozen config builds the same network everywhere."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import normflows as nf

__all__ = ["GlowConfig", "bits_per_dim", "build_glow", "dequantize", "from_unit", "to_unit"]


@dataclass(frozen=True, kw_only=True)
class GlowConfig:
    """The whole description of a Glow: two equal configs are the same network.

    Args:
        shape: ``(channels, height, width)`` of the images.
        levels: Number of scales; height and width must divide by ``patch * 2**(levels - 1)``.
        steps: Glow blocks (ActNorm, 1x1 convolution, affine coupling) per level.
        hidden: Width of the coupling networks.
        log_scale: Bound of the log-scale that one level can accumulate. Each coupling is
            soft-clamped to ``log_scale / steps``, so that decoding never explodes.
        patch: Edge of the squares of pixels that become channels before the finest level, a power
            of 2. 4 computes on a quarter of the places, several times as fast.
        bins: Grey levels of the data: 256 for 8-bit images.
        logit: ``alpha`` of the logit transform ``logit(alpha + (1 - 2 alpha) u)``;
            ``None`` shifts ``u`` by -1/2 instead.
        num_classes: Makes the base density class-conditional.

    Example:
        >>> config = GlowConfig(shape=(1, 8, 8), levels=2, steps=4, hidden=32, bins=17)
        >>> config.latent_shapes
        ((8, 2, 2), (2, 4, 4))
        >>> config.latent_dim, config.clamp
        (64, 1.0)
    """

    shape: tuple[int, int, int]
    levels: int = 3
    steps: int = 16
    hidden: int = 64
    log_scale: float = 4.0
    patch: int = 2
    bins: int = 256
    logit: float | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) != 3 or any(not _is_count(n) for n in self.shape):
            raise ValueError(
                f"shape must be (channels, height, width) of positive integers, got {self.shape}."
            )
        for name in ("levels", "steps", "hidden"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)!r}.")
        if not _is_count(self.patch) or self.patch == 1 or self.patch & (self.patch - 1):
            raise ValueError(f"patch must be a power of 2, at least 2, got {self.patch!r}.")
        _, height, width = self.shape
        edge = self.patch << self.levels - 1
        if height % edge or width % edge:
            raise ValueError(
                f"levels={self.levels} and patch={self.patch} make one place of {edge}x{edge} "
                f"pixels, but {height}x{width} does not divide by {edge}; use fewer levels or pad "
                "the images."
            )
        if not isinstance(self.bins, int) or self.bins < 2:
            raise ValueError(f"bins must be an integer >= 2 (256 for 8-bit), got {self.bins!r}.")
        if not (math.isfinite(self.log_scale) and self.log_scale > 0):
            raise ValueError(f"log_scale must be a positive number, got {self.log_scale!r}.")
        if self.logit is not None and not 0 < self.logit < 0.5:
            raise ValueError(f"logit must be None or lie in (0, 0.5), got {self.logit!r}.")
        for name in ("log_scale", "logit"):  # numbers of NumPy are no JSON
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        if self.num_classes is not None and not _is_count(self.num_classes):
            raise ValueError(
                f"num_classes must be None or an integer >= 1, got {self.num_classes!r}."
            )

    @property
    def clamp(self) -> float:
        """Bound of one coupling's log-scale."""
        return self.log_scale / self.steps

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes of the latents of one image, coarsest first, as normflows orders them."""
        _, height, width = self.shape
        shapes = []
        for level, channels in enumerate(self.block_channels):
            edge = self.patch << self.levels - 1 - level
            kept = channels // 2 if level else channels  # the coarsest level keeps all
            shapes.append((kept, height // edge, width // edge))
        return tuple(shapes)

    @property
    def latent_dim(self) -> int:
        """Number of latent values of one image: a flow has as many as the image has values."""
        return math.prod(self.shape)

    @property
    def block_channels(self) -> tuple[int, ...]:
        """Channels inside each level, coarsest first."""
        finest = self.shape[0] * self.patch**2
        return tuple(finest << self.levels - 1 - level for level in range(self.levels))

    @property
    def squeezes(self) -> tuple[int, ...]:
        """How often each level halves the image, coarsest first."""
        return (1,) * (self.levels - 1) + (self.patch.bit_length() - 1,)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return dataclasses.asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GlowConfig:
        """The config that :meth:`to_dict` wrote; an unknown or missing field is an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown Glow setting {unknown[0]!r}; known: {sorted(known)}.")
        if "shape" not in values:
            raise ValueError("a Glow config needs a 'shape'.")
        return cls(**values)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class ClampedNet(nn.Module):
    """A coupling network whose log-scales (odd channels) are soft-clamped to ``(-clamp, clamp)``.

    It runs in ``compute_dtype`` when that is set: bfloat16 is safe here, and only here, because
    encode and decode evaluate the very same network.
    """

    def __init__(self, net: nn.Module, clamp: float) -> None:
        super().__init__()
        self.net = net
        self.clamp = clamp
        self.compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        low = self.compute_dtype
        with torch.autocast(x.device.type, dtype=low or torch.bfloat16, enabled=low is not None):
            parameters = self.net(x).to(x.dtype)
        shift, log_scale = parameters[:, 0::2], parameters[:, 1::2]
        clamped = self.clamp * torch.tanh(log_scale / self.clamp)
        return torch.stack((shift, clamped), dim=2).flatten(1, 2)


def build_glow(config: GlowConfig) -> nf.MultiscaleFlow:
    """Build the plain :class:`normflows.MultiscaleFlow` of a config.

    Its data are images ``u`` in the unit interval, at bin centres (:func:`to_unit`) or
    dequantised (:func:`dequantize`). Its state dict has normflows' own keys.

    Example:
        >>> config = GlowConfig(shape=(1, 8, 8), levels=2, steps=2, hidden=8, bins=17)
        >>> flow = build_glow(config)
        >>> flow(torch.rand(4, 1, 8, 8)).shape  # negative log-likelihoods
        torch.Size([4])
    """
    import normflows as nf

    flows = [
        [_block(channels, config) for _ in range(config.steps)]
        + [nf.flows.Squeeze() for _ in range(squeezes)]
        for channels, squeezes in zip(config.block_channels, config.squeezes, strict=True)
    ]
    merges = [nf.flows.Merge() for _ in range(config.levels - 1)]
    conditional = config.num_classes is not None
    bases = [
        nf.distributions.ClassCondDiagGaussian(shape, config.num_classes)
        if conditional
        else nf.distributions.DiagGaussian(shape)
        for shape in config.latent_shapes
    ]
    transform = _Centre() if config.logit is None else nf.transforms.Logit(config.logit)
    return nf.MultiscaleFlow(bases, flows, merges, transform=transform, class_cond=conditional)


def _block(channels: int, config: GlowConfig) -> Any:
    import warnings

    import normflows as nf

    with warnings.catch_warnings():  # normflows 1.7.3 calls the deprecated torch.lu
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        block: Any = nf.flows.GlowBlock(channels, config.hidden, scale_map="exp")
    coupling = block.flows[0].flows[1]
    coupling.param_map = ClampedNet(coupling.param_map.net, config.clamp)
    return block


class _Centre(nn.Module):
    """``u - 1/2``; normflows' own Shift changes its argument in place."""

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return v + 0.5, v.new_zeros(len(v))

    def inverse(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return u - 0.5, u.new_zeros(len(u))


def to_unit(x: Tensor, bins: int) -> Tensor:
    """Map pixels in [0, 1] to the centres of their bins, so that black and white are interior.

    Example:
        >>> to_unit(torch.tensor([0.0, 1.0]), bins=4)
        tensor([0.1250, 0.8750])
    """
    return x * ((bins - 1) / bins) + 0.5 / bins


def from_unit(u: Tensor, bins: int) -> Tensor:
    """The inverse of :func:`to_unit`.

    Example:
        >>> from_unit(torch.tensor([0.375, 0.875]), bins=4)
        tensor([0.3333, 1.0000])
    """
    return u * (bins / (bins - 1)) - 0.5 / (bins - 1)


def dequantize(levels: Tensor, bins: int, generator: torch.Generator | None = None) -> Tensor:
    """Spread integer grey levels uniformly over their bins: training only, never in an attack.

    Example:
        >>> u = dequantize(torch.tensor([0, 255], dtype=torch.uint8), bins=256)
        >>> bool((u * 256).floor().tolist() == [0, 255])
        True
    """
    noise = torch.rand(levels.shape, generator=generator, device=levels.device)
    return (levels + noise) / bins


def bits_per_dim(nll: Tensor, config: GlowConfig) -> Tensor:
    """Negative log-likelihood of ``u`` in nats per image -> bits per dimension of the levels.

    Example:
        >>> config = GlowConfig(shape=(1, 8, 8), levels=2, bins=256)
        >>> bits_per_dim(torch.tensor(0.0), config)  # the uniform density
        tensor(8.)
    """
    return nll / (config.latent_dim * math.log(2)) + math.log2(config.bins)
