"""Split BatchNorm: clean and adversarial images have statistics of their own (AdvProp)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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
    before the optimiser is made.

    Example:
        >>> model = convert_split_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
        >>> _ = model(torch.cat([torch.zeros(4, 3), torch.ones(4, 3)]))
        >>> model[0].running_mean, model[0].auxiliary.running_mean
        (tensor([0., 0., 0.]), tensor([0.1000, 0.1000, 0.1000]))
    """
    for module in list(model.modules()):
        kind = _KINDS.get(type(module))
        if kind is not None:
            twin = copy.deepcopy(module)
            module.__class__ = kind
            module.auxiliary = twin
    if not any(isinstance(module, _Split) for module in model.modules()):
        raise ValueError("the model has no BatchNorm to split.")
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
