"""A kornia container in which our transforms get images and labels together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import kornia.augmentation as K
import torch
from kornia.augmentation.container.ops import AugmentationSequentialOps
from kornia.augmentation.container.params import ParamItem
from kornia.constants import DataKey
from torch import nn

from ..transforms.batch import BatchTransform
from ..transforms.checks import check_blendable, check_one_weight
from ..transforms.robust_mixup import RobustMixup
from ..transforms.structure import USUAL_LABELS

__all__ = ["AugmentationSequential"]

_GEOMETRY = (
    DataKey.MASK, DataKey.BBOX, DataKey.BBOX_XYXY, DataKey.BBOX_XYWH, DataKey.KEYPOINTS,
)  # fmt: skip


class AugmentationSequential(K.AugmentationSequential):
    """kornia's ``AugmentationSequential``, in which our transforms may stand anywhere.

    Ours get the image and the ``"class"`` key together (of a dictionary, kornia reads ``class`` and
    ``label``; newer versions pass ``labels`` by); all other children, ``random_apply``,
    ``data_keys``, dictionaries and the replay of ``params`` are kornia's own. Masks, boxes and
    keypoints pass :class:`~ijsat_aug.JointSpaceAdv` unchanged. ``same_on_batch=True`` gives all
    samples of a :class:`~ijsat_aug.RobustMixup` the same mixing weight.

    kornia's own containers hand over the image alone, also around this one: there,
    :class:`~ijsat_aug.JointSpaceAdv` attacks the model's own predictions, anew in every replay, and
    :class:`~ijsat_aug.RobustMixup`, which needs labels, refuses.

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
        others = [child for child in self.children() if not _is_ours(child)]
        if any(_is_ours(module) for child in others for module in _all_in(child)):
            raise ValueError(
                "one of our transforms stands inside another module, which would keep the labels "
                "from it: make it a direct child of the outermost container."
            )
        if any(module.mode == "append" for module in self.children() if _is_ours(module)):
            raise ValueError(
                'mode="append" changes the size of the batch, for which kornia has drawn its '
                "parameters: apply that transform behind the container."
            )
        if any(module.labels_getter != "default" for module in self.children() if _is_ours(module)):
            raise ValueError(
                "labels_getter is not asked inside kornia, where the labels are the 'class' key: "
                "leave it out, or apply that transform behind the container."
            )
        self._of_one_weight()

    def forward_parameters(self, batch_shape: torch.Size) -> list[ParamItem]:
        """What kornia draws, and a place for what ours draw when they see the batch."""
        params = super().forward_parameters(batch_shape)
        return [_Place(p.name, None) if _is_ours(self.get_submodule(p.name)) else p for p in params]

    def forward(
        self, *args: Any, params: list[ParamItem] | None = None, data_keys: Any = None
    ) -> Any:
        """The batch, augmented; see kornia."""
        if args and isinstance(args[0], dict):
            self._look_for_labels(args[0])
        mixups = self._of_one_weight()
        own = [mixup.per_sample for mixup in mixups]
        try:
            for mixup in mixups:
                mixup.per_sample = False
            return super().forward(*args, params=params, data_keys=data_keys)
        finally:
            for mixup, per_sample in zip(mixups, own, strict=True):
                mixup.per_sample = per_sample

    def _look_for_labels(self, batch: dict[str, Any]) -> None:
        """Say once what is attacked where kornia passes the labels by."""
        names = {name.lower() for name in batch}
        if not names & {"class", "label"} and names & set(USUAL_LABELS):
            for child in self.children():
                if _is_ours(child) and child.training:
                    child.find_no_labels()

    def _of_one_weight(self) -> list[RobustMixup]:
        """The children that ``same_on_batch`` is for, if they allow it."""
        mixups = [m for m in self.children() if isinstance(m, RobustMixup) and self.same_on_batch]
        for mixup in mixups:
            check_one_weight(mixup.draws, mixup.mix.lam_steps)
        return mixups


class _Place(ParamItem):
    """No parameters, for kornia, and what one of ours drew."""

    drawn: Any = ...


class _JointOps(AugmentationSequentialOps):
    def transform(self, *arg: Any, module: nn.Module, param: ParamItem, **options: Any) -> Any:
        """Apply a kornia child key by key, and one of ours to images and labels at once."""
        if not isinstance(module, BatchTransform):
            return super().transform(*arg, module=module, param=param, **options)
        keys = self.preproc_datakeys(options.get("data_keys"))
        outputs = list(arg)
        if module.training:
            _check_keys(module, keys)
        if module.training and DataKey.INPUT in keys:
            place = param if isinstance(param, _Place) else _Place(*param)
            image = keys.index(DataKey.INPUT)
            label = keys.index(DataKey.CLASS) if DataKey.CLASS in keys else None
            if label is None and len(keys) > 1:
                module.find_no_labels()
            outputs[image], labels, place.drawn = module.augment(
                arg[image], None if label is None else arg[label], place.drawn
            )
            if label is not None:
                outputs[label] = labels
        return outputs if len(outputs) > 1 else outputs[0]


def _is_ours(module: nn.Module) -> TypeGuard[BatchTransform]:
    return isinstance(module, BatchTransform)


def _all_in(module: nn.Module) -> Iterator[nn.Module]:
    """It and all that it holds; torchvision's containers hold theirs in plain lists."""
    for part in module.modules():
        yield part
        held = getattr(part, "transforms", None)
        for other in held if isinstance(held, (list, tuple)) else ():
            if isinstance(other, nn.Module):
                yield from _all_in(other)


def _check_keys(module: BatchTransform, keys: list[DataKey]) -> None:
    if keys.count(DataKey.INPUT) > 1:
        raise ValueError(
            f"{type(module).__name__} takes one image of each sample, and there are "
            f"{keys.count(DataKey.INPUT)} keys of images: call the container once for each."
        )
    if not isinstance(module, RobustMixup):
        return
    check_blendable([key.name.lower() for key in keys if key in _GEOMETRY])
    if keys.count(DataKey.INPUT) != 1 or keys.count(DataKey.CLASS) != 1:
        raise ValueError(
            "RobustMixup needs labels with the image: data_keys, or the keys of a dictionary, must "
            "have 'input' and 'class', once each."
        )
