"""Whatever the network, the frozen flow is a bijection with the right gradient."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from ijsat_aug.flows.calibration import matching_eta
from ijsat_aug.flows.fold import freeze
from ijsat_aug.flows.glow import GlowConfig
from tests.conftest import random_glow


@st.composite
def configs(draw: st.DrawFn) -> GlowConfig:
    levels = draw(st.integers(1, 3))
    sides = st.integers(1, 2).map(lambda n: n * 2 ** (levels + 1))
    return GlowConfig(
        shape=(draw(st.integers(1, 4)), draw(sides), draw(sides)),
        levels=levels,
        steps=draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 9)),
        log_scale=draw(st.floats(0.1, 5.0)),
        patch=draw(st.sampled_from([2, 4])),
        bins=draw(st.sampled_from([2, 17, 256])),
        logit=draw(st.sampled_from([None, 0.01, 0.05])),
        num_classes=draw(st.sampled_from([None, 3])),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(configs(), st.integers(0, 3))
def test_it_is_a_bijection_and_all_gradients_agree(config: GlowConfig, batch: int) -> None:
    flow = freeze(
        config, random_glow(config, 0.2 / config.patch**2).state_dict(), dtype=torch.float64
    )
    x = torch.rand(batch, *config.shape, dtype=torch.float64)
    z, tape = flow.encode_with_tape(x)
    assert z.shape == (batch, config.latent_dim)
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-9)
    g = torch.randn_like(x)
    leaf = z.clone().requires_grad_()
    (autograd,) = torch.autograd.grad(flow.decode(leaf), leaf, g)
    (low,) = torch.autograd.grad(flow.to(memory="low").decode(leaf), leaf, g)
    torch.testing.assert_close(flow.vjp(tape, g), autograd, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(low, autograd, rtol=1e-5, atol=1e-8)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(configs())
def test_the_gradient_is_the_slope_of_decode(config: GlowConfig) -> None:
    """Against a central difference along a random direction, not against another backward."""
    flow = freeze(
        config, random_glow(config, 0.2 / config.patch**2).state_dict(), dtype=torch.float64
    )
    z = flow.encode(torch.rand(1, *config.shape, dtype=torch.float64))
    direction, g = torch.randn_like(z), torch.randn(1, *config.shape, dtype=torch.float64)
    h = 1e-6
    slope = ((flow.decode(z + h * direction) - flow.decode(z - h * direction)) * g).sum() / (2 * h)
    leaf = z.requires_grad_()
    (gradient,) = torch.autograd.grad(flow.decode(leaf), leaf, g)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-3, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=8, unique=True),
    st.floats(0, 2.0),
    st.floats(0, 2.0),
)
def test_matching_eta_is_monotone_and_inside_the_table(
    etas: list[float], small: float, large: float
) -> None:
    rows = [{"eta": e, "gradient": {"pixel_rms": e**1.5, "non_finite": 0.0}} for e in sorted(etas)]
    small, large = sorted((small, large))
    low, high = (matching_eta({"linf": rows}, rms) for rms in (small, large))
    assert 0 <= low <= high + 1e-12
    assert high <= max(etas) + 1e-12
