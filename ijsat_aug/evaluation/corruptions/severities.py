"""What the five severities mean: the parameters of CIFAR-10-C and of ImageNet-C, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["EXTRA", "LARGE", "LARGE_SIDE", "SEVERITIES", "SMALL", "STANDARD", "parameters"]

SEVERITIES = (1, 2, 3, 4, 5)

STANDARD = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip

EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")

LARGE_SIDE = 128
"""Images whose shorter side is below this take ``SMALL``, the others ``LARGE``.

Lengths are in pixels and do not grow with the image, except those of ``elastic_transform``.
"""

Table = Mapping[str, tuple[Any, ...]]

SMALL: Table = {
    # std
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    # photons at white
    "shot_noise": (500, 250, 100, 75, 50),
    # share of the values
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    # std relative to the value
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
    # sigma
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    # radius of the disk, sigma that antialiases it
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    # sigma, reach of the shuffle, passes
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    # radius, sigma
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    # number of zooms, step between them
    "zoom_blur": ((7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),
    # mean and std of the flakes, their zoom and threshold; radius and sigma of the fall; visibility
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    # weight of the image, weight of the frost, size of its picture
    "frost": ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
    # thickness, decay of the plasma
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    # mean and std of the liquid, its sigma and threshold; strength (mud: sigma); mud?
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, False),
        (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    ),
    # added to the value of HSV
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    # factor of the difference from the mean
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    # factor of the saturation of HSV, what is added to it
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    # strength and sigma of the displacement, reach of the affine map; all in shorter sides
    "elastic_transform": (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    ),
    # factor of the resolution
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    # quality
    "jpeg_compression": (80, 65, 58, 50, 40),
}
"""CIFAR-10-C (Hendrycks and Dietterich, 2019; ``make_cifar_c.py`` of hendrycks/robustness)."""

# The original writes 244 where it means 224 pixels.
_SIDE = 244 / 224

LARGE: Table = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "spatter": (
        (0.65, 0.3, 4, 0.69, 0.6, False),
        (0.65, 0.3, 3, 0.68, 0.6, False),
        (0.65, 0.3, 2, 0.68, 0.5, False),
        (0.65, 0.3, 1, 0.65, 1.5, True),
        (0.67, 0.4, 1, 0.65, 1.5, True),
    ),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    "elastic_transform": (
        (2 * _SIDE, 0.7 * _SIDE, 0.1 * _SIDE),
        (2 * _SIDE, 0.08 * _SIDE, 0.2 * _SIDE),
        (0.05 * _SIDE, 0.01 * _SIDE, 0.02 * _SIDE),
        (0.07 * _SIDE, 0.01 * _SIDE, 0.02 * _SIDE),
        (0.12 * _SIDE, 0.01 * _SIDE, 0.02 * _SIDE),
    ),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
}
"""ImageNet-C at 224 pixels (``imagenet_c/corruptions.py``); what the columns are, see ``SMALL``."""


def parameters(name: str, severity: int, height: int, width: int) -> tuple[Any, ...]:
    """The parameters of a corruption for images of a size.

    Example:
        >>> parameters("fog", 5, 32, 32), parameters("fog", 5, 224, 300)
        ((1.5, 1.75), (3, 1.4))
        >>> parameters("jpeg_compression", 1, 8, 8)
        (80,)
    """
    table = SMALL if min(height, width) < LARGE_SIDE else LARGE
    values = table[name][severity - 1]
    return values if isinstance(values, tuple) else (values,)
