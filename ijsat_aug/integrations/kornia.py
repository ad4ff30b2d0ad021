"""A kornia container in which our transforms get images and labels together."""

from __future__ import annotations

from typing import Any

import kornia.augmentation as K
import torch
from kornia.augmentation.container.ops import AugmentationSequentialOps
from kornia.augmentation.container.params import ParamItem
from kornia.constants import DataKey
from torch import nn

from ..transforms.batch import BatchTransform
from ..transforms.robust_mixup import RobustMixup

__all__ = ["AugmentationSequential"]

_GEOMETRY = (
    DataKey.MASK, DataKey.BBOX, DataKey.BBOX_XYXY, DataKey.BBOX_XYWH, DataKey.KEYPOINTS,
)  # fmt: skip


class AugmentationSequential(K.AugmentationSequential):
    """kornia's ``AugmentationSequential``, in which our transforms may stand anywhere.

    Ours get the image and the ``"class"`` key together; all other children, ``random_apply``,
    ``data_keys``, dictionaries and the replay of ``params`` are kornia's own. Masks, boxes and
    keypoints pass :class:`~ijsat_aug.JointSpaceAdv` unchanged. ``same_on_batch=True`` gives all
    samples of a :class:`~ijsat_aug.RobustMixup` the same mixing weight.

    In kornia's own containers, which hand over the image alone, our transforms attack the model's
    own predictions.

    Args:
        *args: kornia augmentations and ours.
        **kwargs: As of ``kornia.augmentation.AugmentationSequential``.

    Example:
        >>> import kornia.augmentation as K
        >>> from ijsat_aug import JointSpaceAdv, RobustMixup
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> augment = AugmentationSequential(
        ...     K.RandomHorizontalFlip(),
        ...     JointSpaceAdv(net, "digits"),
        ...     K.RandomErasing(),
        ...     RobustMixup(net, num_classes=10),
        ...     data_keys=["input", "class"],
        ... )
        >>> x, y = augment(torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1]))
        >>> x.shape, y.shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4, 10]))
    """

    def __init__(self, *args: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.transform_op = _JointOps(self.data_keys)
        if any(module.mode == "append" for module in self.children() if _is_ours(module)):
            raise ValueError(
                'mode="append" changes the size of the batch, for which kornia has drawn its '
                "parameters: apply that transform behind the container."
            )

    def update_attribute(
        self, same_on_batch: bool | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Hand ``same_on_batch`` and ``keepdim`` on to the children."""
        super().update_attribute(same_on_batch, *args, **kwargs)
        if same_on_batch is not None:
            for module in self.children():
                if isinstance(module, RobustMixup):
                    module.per_sample = not same_on_batch

    def forward_parameters(self, batch_shape: torch.Size) -> list[ParamItem]:
        """What kornia draws, and an empty place for what ours draw when they see the batch."""
        params = super().forward_parameters(batch_shape)
        return [
            ParamItem(p.name, {}) if _is_ours(self.get_submodule(p.name)) else p for p in params
        ]


class _JointOps(AugmentationSequentialOps):
    def transform(self, *arg: Any, module: nn.Module, param: ParamItem, **options: Any) -> Any:
        """Apply a kornia child key by key, and one of ours to images and labels at once."""
        if not isinstance(module, BatchTransform):
            return super().transform(*arg, module=module, param=param, **options)
        keys = self.preproc_datakeys(options.get("data_keys"))
        outputs = list(arg)
        if module.training:
            _check_keys(module, keys)
            place = keys.index(DataKey.INPUT)
            label = keys.index(DataKey.CLASS) if DataKey.CLASS in keys else None
            drawn: Any = param.data
            images, labels, found = module.augment(
                arg[place],
                None if label is None else arg[label],
                drawn.get("drawn", ...),
            )
            drawn["drawn"] = found
            outputs[place] = images
            if label is not None:
                outputs[label] = labels
        return outputs if len(outputs) > 1 else outputs[0]


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, BatchTransform)


def _check_keys(module: BatchTransform, keys: list[DataKey]) -> None:
    if DataKey.INPUT not in keys:
        raise ValueError(f"{type(module).__name__} needs the image: data_keys must have 'input'.")
    beside = [key.name.lower() for key in keys if key in _GEOMETRY]
    if beside and isinstance(module, RobustMixup):
        raise ValueError(
            f"RobustMixup blends images, and blends of {', '.join(beside)} have no meaning: leave "
            "these keys out, or use JointSpaceAdv, which keeps them."
        )
