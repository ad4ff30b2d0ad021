"""The classifiers that benchmarks measure against."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.skip = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


def cifar_resnet18(num_classes: int = 10, width: int = 64) -> nn.Sequential:
    """ResNet-18 for 32-pixel images: 3x3 stem, no pooling; 11.2 M parameters at width 64."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
    ]  # fmt: skip
    inner = width
    for stage in range(4):
        outer = width << stage
        layers += [_Residual(inner, outer, 2 if stage else 1), _Residual(outer, outer, 1)]
        inner = outer
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, num_classes)]
    return nn.Sequential(*layers)


def like_weights(weights: Mapping[str, Tensor]) -> nn.Sequential:
    """One of these networks with these weights."""
    width, channels = weights["0.weight"].shape[:2]
    if "13.weight" in weights:
        network = cifar_resnet18(len(weights["13.weight"]), width)
    else:
        network = small_resnet(len(weights["9.weight"]), channels)
    network.load_state_dict(weights)
    return network.eval()


def small_resnet(num_classes: int = 10, channels: int = 3) -> nn.Sequential:
    """ResNet-10 for 32-pixel images, 16 to 128 channels wide: 0.31 M parameters, for two cores."""
    widths = (16, 32, 64, 128)
    layers: list[nn.Module] = [
        nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
    ]  # fmt: skip
    for inner, outer in zip((16, *widths), widths, strict=False):
        layers.append(_Residual(inner, outer, 1 if outer == inner else 2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes)]
    return nn.Sequential(*layers)
