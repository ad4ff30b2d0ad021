"""Images as PNG in base64: small enough for a report, and back."""

from __future__ import annotations

import base64
import io

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

__all__ = ["from_png", "to_png"]

_WIDEST = 96


def to_png(image: Tensor) -> str:
    """An image ``(C, H, W)`` in [0, 1], not larger than one looks at.

    Example:
        >>> import torch
        >>> to_png(torch.zeros(1, 8, 8))[:10]
        'iVBORw0KGg'
    """
    image = image[: 3 if len(image) >= 3 else 1]  # of many channels the first ones
    step = max(1, -(-max(image.shape[1:]) // _WIDEST))
    pixels = (image.detach().cpu().float()[:, ::step, ::step] * 255).round().clamp(0, 255).byte()
    file = io.BytesIO()
    F.to_pil_image(pixels).save(file, format="png")
    return base64.b64encode(file.getvalue()).decode()


def from_png(text: str) -> Tensor:
    """The image again.

    Example:
        >>> import torch
        >>> from_png(to_png(torch.ones(3, 8, 8))).unique()
        tensor([1.])
    """
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        pixels: Tensor = F.pil_to_tensor(picture)
    return pixels.float() / 255
