"""A network that has learnt the digits, in eval mode."""

from __future__ import annotations

import pytest
from torch import nn


@pytest.fixture
def net(network: nn.Sequential) -> nn.Sequential:
    return network.eval()
