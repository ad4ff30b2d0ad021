"""CapturedStep where there is no GPU: the function itself. On a GPU: tests/test_cuda.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ijsat_aug.training import CapturedStep


def test_without_a_gpu_it_is_called() -> None:
    total = torch.zeros(())
    calls = 0

    def add(x: Tensor, more: dict[str, Tensor | None]) -> Tensor:
        nonlocal calls
        calls += 1
        return total.add_(x + more["y"])

    step = CapturedStep(add)
    for i in range(6):
        found = step(torch.tensor(float(i)), {"y": torch.tensor(1.0), "nothing": None})
        assert found is total
    assert (calls, float(total)) == (6, 21.0)


def test_any_shape_may_come() -> None:
    step = CapturedStep(lambda x: x.sum())
    assert [int(step(torch.ones(n))) for n in (4, 4, 4, 4, 3)] == [4, 4, 4, 4, 3]
