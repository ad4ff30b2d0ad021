"""Where random numbers come from: the global generator, a given one, or a seed."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Randomness"]


class Randomness:
    """Draws on any device; with a generator or a seed it leaves the global state alone.

    Example:
        >>> one, two = Randomness(0), Randomness(0)
        >>> device = torch.device("cpu")
        >>> bool((one.uniform((3,), device) == two.uniform((3,), device)).all())
        True
    """

    def __init__(self, source: torch.Generator | int | None = None) -> None:
        if not (source is None or isinstance(source, (Integral, torch.Generator))):
            raise TypeError(
                f"generator must be a torch.Generator or a seed, got {type(source).__name__}."
            )
        self._seed = int(source) if isinstance(source, Integral) else None
        self._generators: dict[str, torch.Generator] = {}
        self._given = source if isinstance(source, torch.Generator) else None

    @property
    def is_global(self) -> bool:
        """Whether the global generators are used."""
        return self._seed is None and self._given is None

    def again(self) -> Randomness:
        """The same from its seed on; a generator that was given stays shared."""
        return self if self._seed is None else Randomness(self._seed)

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """From [0, 1)."""
        generator, place = self._on(device)
        return torch.rand(shape, generator=generator, device=place).to(device)

    def normal(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """From a standard normal distribution."""
        generator, place = self._on(device)
        return torch.randn(shape, generator=generator, device=place).to(device)

    def beta(self, alpha: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """From Beta(alpha, alpha), drawn on the host by NumPy, which is seeded from here."""
        words = self.uniform((4,), torch.device("cpu")).double().mul_(2**24).long().tolist()
        draw = np.random.default_rng(words).beta(alpha, alpha, shape).astype(np.float32)
        return torch.from_numpy(draw).to(device, non_blocking=True)

    def chance(self, p: float) -> bool:
        """Whether something of probability ``p`` happens; drawn on the host unless given there."""
        return p >= 1 or float(self.uniform((), torch.device("cpu"))) < p

    def seed(self) -> int | None:
        """A seed for others; None with the global generators, which they may use themselves."""
        if self.is_global:
            return None
        return int(self.uniform((), torch.device("cpu")).double() * 2**24)

    def _on(self, device: torch.device) -> tuple[torch.Generator | None, torch.device]:
        if self._given is not None:
            return self._given, self._given.device
        if self._seed is None:
            return None, device
        if str(device) not in self._generators:
            self._generators[str(device)] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[str(device)], device

    def __getstate__(self) -> dict[str, Any]:
        given = self._given
        every = {**self._generators, **({} if given is None else {"given": given})}
        states = {name: (str(g.device), g.get_state()) for name, g in every.items()}
        return {"seed": self._seed, "states": states}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._seed = state["seed"]
        self._generators = {}
        for name, (device, value) in state["states"].items():
            self._generators[name] = torch.Generator(device)
            self._generators[name].set_state(value)
        self._given = self._generators.pop("given", None)

    def __repr__(self) -> str:
        if self._given is not None:
            return f"Generator({str(self._given.device)!r})"
        return repr(self._seed)
