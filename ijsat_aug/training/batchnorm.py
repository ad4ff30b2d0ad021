"""Split BatchNorm: clean and adversarial images have statistics of their own (AdvProp)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["auxiliary_batchnorm", "convert_split_batchnorm"]

M = TypeVar("M", bound=nn.Module)


class _Split:
    """A BatchNorm with a twin for adversarial images; its own state stays where it was."""

    auxiliary: nn.Module
    training: bool
    route = "half"  # or "clean", "auxiliary"

    def forward(self, x: Tensor) -> Tensor:
        main: Any = super()
        if self.route == "auxiliary":
            out: Tensor = self.auxiliary(x)
            return out
        if not self.training or self.route == "clean":
            return main.forward(x)  # type: ignore[no-any-return]
        if len(x) % 2:
            raise ValueError(
                f"split BatchNorm takes the first half of a batch as clean and the second as "
                f'adversarial, and this one has {len(x)} samples: use mode="append", or the '
                "context auxiliary_batchnorm."
            )
        clean, adversarial = x.chunk(2)
        return torch.cat([main.forward(clean), self.auxiliary(adversarial)])


class _Split1d(_Split, nn.BatchNorm1d):
    pass


class _Split2d(_Split, nn.BatchNorm2d):
    pass


class _Split3d(_Split, nn.BatchNorm3d):
    pass


class _SplitSync(_Split, nn.SyncBatchNorm):
    pass


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _Split1d,
    nn.BatchNorm2d: _Split2d,
    nn.BatchNorm3d: _Split3d,
    nn.SyncBatchNorm: _SplitSync,
}


def convert_split_batchnorm(model: M) -> M:
    """Give every BatchNorm of a model an auxiliary twin for adversarial images, in place.

    In training the first half of a batch goes through the main statistics and the second half
    through the auxiliary ones, as ``mode="append"`` lays them out; in evaluation all goes through
    the main ones. The parameters of the model keep their names, the twins add theirs. Convert
    after ``SyncBatchNorm.convert_sync_batchnorm`` and before the optimiser is made. On several GPUs
    use DDP: DataParallel cuts the batch, and so the halves, itself.

    Example:
        >>> model = convert_split_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
        >>> _ = model(torch.cat([torch.zeros(4, 3), torch.ones(4, 3)]))
        >>> model[0].running_mean, model[0].auxiliary.running_mean
        (tensor([0., 0., 0.]), tensor([0.1000, 0.1000, 0.1000]))
    """
    done = [module for module in model.modules() if isinstance(module, _Split)]
    twins = {id(module.auxiliary) for module in done}
    parts = [m for m in model.modules() if isinstance(m, _BatchNorm) and id(m) not in twins]
    todo = [module for module in parts if not isinstance(module, _Split)]
    if not parts:
        raise ValueError("the model has no BatchNorm to split.")
    strange = {type(module).__name__ for module in todo if type(module) not in _KINDS}
    if strange:
        raise ValueError(
            f"{', '.join(sorted(strange))} cannot be split: only torch's own BatchNorm1d, 2d, 3d "
            "and SyncBatchNorm can."
        )
    for module in todo:
        twin = copy.deepcopy(module)
        module.__class__ = _KINDS[type(module)]  # type: ignore[assignment]
        module.auxiliary = twin
    return model


@contextmanager
def auxiliary_batchnorm(model: nn.Module, route: str = "auxiliary") -> Iterator[None]:
    """Send whole batches through the auxiliary statistics, or with ``route="clean"`` the main ones.

    For batches of one kind, and for attacks on the auxiliary branch, as in AdvProp.

    Example:
        >>> model = convert_split_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
        >>> with auxiliary_batchnorm(model):
        ...     _ = model(torch.ones(5, 3))
        >>> model[0].running_mean, model[0].auxiliary.running_mean
        (tensor([0., 0., 0.]), tensor([0.1000, 0.1000, 0.1000]))
    """
    if route not in ("half", "clean", "auxiliary"):
        raise ValueError(f'route must be "half", "clean" or "auxiliary", got {route!r}.')
    parts = [module for module in model.modules() if isinstance(module, _Split)]
    if not parts:
        raise ValueError("the model has no split BatchNorm: convert_split_batchnorm(model) first.")
    before = [part.route for part in parts]
    try:
        for part in parts:
            part.route = route
        yield
    finally:
        for part, old in zip(parts, before, strict=True):
            part.route = old
