"""A per-sample albumentations pipeline as a transform of whole batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..transforms.structure import LabelsGetter, geometry_in, take_apart

__all__ = ["BatchPipeline"]


class BatchPipeline(nn.Module):
    """Applies an ``A.Compose`` to every image of a tensor batch, on the CPU.

    It stands before or after our transforms in ``v2.Compose`` and takes the same kinds of batches,
    but for masks, boxes and keypoints, which it would leave where they were. The compose gets
    ``(H, W, C)`` arrays: of 8-bit images as they are, of floating ones in float32, or in 8 bits
    where ``as_uint8`` says so, because some of albumentations' transforms want that. Images come
    back on their device, in their precision and memory format, and must have one size; 8-bit ones
    that the compose made floating, as ``A.ToFloat`` and ``A.Normalize`` do, in float32. After
    ``eval()`` it is the identity, as our transforms are.

    Args:
        compose: From albumentations or AlbumentationsX; a last ``ToTensorV2`` may stay.
        as_uint8: Round images of [0, 1] to 8 bits for the compose, and divide by 255 afterwards.
        seed: Of the compose, whose draws go on from there; by default albumentations seeds them in
            its own way, whatever the seed of torch is.
        labels_getter: Where the labels are, which stay as they are.

    Example:
        >>> class Dark:  # stands for A.Compose([...])
        ...     def __call__(self, image):
        ...         return {"image": image // 2}
        >>> x = torch.ones(2, 3, 4, 4)
        >>> BatchPipeline(Dark(), as_uint8=True)(x).unique()
        tensor([0.4980])
    """

    def __init__(
        self,
        compose: Any,
        *,
        as_uint8: bool = False,
        seed: int | None = None,
        labels_getter: LabelsGetter = "default",
    ) -> None:
        super().__init__()
        if not callable(compose):
            raise TypeError(f"compose must be an A.Compose, got {type(compose).__name__}.")
        self.compose = compose
        self.as_uint8 = as_uint8
        self.labels_getter = labels_getter
        if seed is not None:
            compose.set_random_seed(seed)

    def forward(self, *batch: Any) -> Any:
        """The batch with other images."""
        if not self.training:
            return batch[0] if len(batch) == 1 else batch
        if beside := geometry_in(batch):
            raise ValueError(
                f"BatchPipeline moves images alone, and the batch has {', '.join(beside)}: apply "
                "the compose to each sample in the dataset, or use torchvision's v2 or kornia."
            )
        parts = take_apart(batch, self.labels_getter)
        return parts.rebuild(self._augment(parts.images), parts.labels)

    def _augment(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ValueError("BatchPipeline takes a batch of images (B, C, H, W).")
        arrays = _arrays(images.detach(), self.as_uint8)
        found = [_tensor(self.compose(image=array)["image"]) for array in arrays]
        if len({image.dtype for image in found}) > 1:
            raise TypeError(
                "the compose returned 8-bit images and floating ones, whose units differ: let it "
                "end in one of them, always."
            )
        if len({tuple(image.shape) for image in found}) > 1:
            raise ValueError(
                "the compose returned images of several sizes, which are no batch: end it with a "
                "resize or a crop."
            )
        new = torch.stack(found) if found else images
        if not (new.is_floating_point() or new.dtype == torch.uint8):
            raise TypeError(
                f"the compose returned {new.dtype} images: let it end in 8-bit or floating ones."
            )
        dtype = images.dtype
        if new.dtype == torch.uint8 and images.is_floating_point():
            new = new / 255
        elif new.is_floating_point() and not images.is_floating_point():
            dtype = torch.float32
        new = new.to(images.device, dtype)
        if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
            new = new.contiguous(memory_format=torch.channels_last)
        return new.as_subclass(type(images))

    def extra_repr(self) -> str:
        """The compose."""
        return f"{self.compose!r}"


def _arrays(images: Tensor, as_uint8: bool) -> np.ndarray[Any, Any]:
    given = images = images.as_subclass(Tensor)
    if images.is_floating_point():
        if as_uint8 and not bool(((images > -1e-3) & (images < 1 + 1e-3)).all()):
            raise ValueError(
                "as_uint8=True takes images in [0, 1], and these are not: put the pipeline before "
                "the normalisation, or pass as_uint8=False."
            )
        images = (255 * images.float()).round().clamp(0, 255).byte() if as_uint8 else images.float()
    elif images.dtype != torch.uint8:
        raise TypeError(f"albumentations takes 8-bit or floating images, got {images.dtype}.")
    rows = images.permute(0, 2, 3, 1).contiguous().cpu()
    # A compose may work in place: not on the user's own batch.
    own = rows.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return (rows.clone() if own else rows).numpy()


def _tensor(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image
    array = image[:, :, None] if image.ndim == 2 else image
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
