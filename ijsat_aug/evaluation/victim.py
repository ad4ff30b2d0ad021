"""The model that is evaluated, as a function from pixels to logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attack.model import Model, ModelHandle
from ..precision import full_precision
from ..transforms.scale import Scale
from .store import fingerprint

__all__ = ["Found", "Victim"]


class Found(NamedTuple):
    """What an attack made of a batch.

    Attributes:
        images: ``(B, C, H, W)`` in [0, 1].
        right: ``(B,)`` after each of its parts, whether the model was still right.

    Example:
        A threat of one's own is a function that returns it:

        >>> from ijsat_aug.evaluation import Threat, evaluate
        >>> def grey(victim, images, labels, draws):
        ...     return Found(images.mean(1, keepdim=True).expand_as(images))
        >>> threat = Threat("grey", "grey", "unseen", "", 0, "", grey)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> images, labels = torch.rand(8, 3, 2, 2), torch.arange(8) % 2
        >>> evaluate(model, images, labels, threats=[threat], corruptions=()).results["grey"]
        Result(...)
    """

    images: Tensor
    right: Mapping[str, Tensor] = {}


class Victim:
    """A model on pixels in [0, 1]: in eval mode, without autocast, frozen, and as it was later.

    Args:
        model: A module, or any callable from images to logits.
        mean: Of the normalisation that the model expects.
        std: Of the same.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).train()
        >>> victim = Victim(model, mean=0.5, std=0.25)
        >>> with victim.frozen():
        ...     victim(torch.rand(3, 1, 2, 2)).shape, model.training
        (torch.Size([3, 2]), False)
        >>> model.training
        True
    """

    def __init__(
        self,
        model: Model,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
    ) -> None:
        self.handle = ModelHandle(model)
        self.scale = Scale.of(mean, std)

    @property
    def model(self) -> Model:
        """The model itself, without wrappers."""
        assert self.handle.model is not None
        return self.handle.model

    @property
    def parts(self) -> list[str]:
        """The kinds of its modules."""
        return sorted({type(module).__qualname__ for module in self.handle.modules})

    def fingerprint(self) -> str:
        """What tells it from others: its weights, and those of modules that it calls besides."""
        held = set(self.model.modules()) if isinstance(self.model, nn.Module) else ()
        return fingerprint(self.model, *(m for m in self.handle.modules if m not in held))

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        parts = self.handle.modules
        tensors = (t for m in parts for t in (*m.parameters(False), *m.buffers(False)))
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """While it is asked."""
        device = self.device
        with self.handle.frozen(device), full_precision(device):
            yield

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits; call it under :meth:`frozen`."""
        return self.handle(self.scale.to_model(pixels))

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Tensor:
        """Classes; -1 where the answer is no number, which is right of no image."""
        logits = self(pixels)
        return logits.argmax(1).where(~logits.isnan().any(1), -1)
