"""The config, and the normflows network that it builds."""

from __future__ import annotations

import dataclasses
import math

import normflows as nf
import pytest
import torch

from ijsat_aug.flows.glow import (
    ClampedNet,
    GlowConfig,
    bits_per_dim,
    build_glow,
    dequantize,
    from_unit,
    to_unit,
)
from tests.conftest import random_glow

SMALL = GlowConfig(shape=(3, 8, 8), levels=2, steps=2, hidden=8)


def test_the_network_is_a_plain_normflows_multiscale_flow() -> None:
    model = build_glow(SMALL)
    assert type(model) is nf.MultiscaleFlow
    assert [tuple(q.shape) for q in model.q0] == list(SMALL.latent_shapes)
    assert sum(math.prod(s) for s in SMALL.latent_shapes) == SMALL.latent_dim == 192


def test_equal_configs_have_equal_parameter_names_and_a_round_trip_through_json() -> None:
    again = GlowConfig.from_dict(SMALL.to_dict())
    assert again == SMALL
    assert build_glow(again).state_dict().keys() == build_glow(SMALL).state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3, 28, 28), "levels": 3}, "28x28 does not divide by 8"),
        ({"shape": (3, 8)}, "shape must be"),
        ({"shape": (0, 8, 8)}, "shape must be"),
        ({"levels": 0}, "levels must be an integer >= 1"),
        ({"steps": 1.5}, "steps must be an integer >= 1"),
        ({"hidden": True}, "hidden must be an integer >= 1"),
        ({"patch": 3}, "patch must be a power of 2"),
        ({"patch": 1}, "patch must be a power of 2"),
        ({"patch": 8}, "levels=2 and patch=8 make one place of 16x16"),
        ({"bins": 1}, "bins must be an integer >= 2"),
        ({"log_scale": 0.0}, "log_scale must be a positive number"),
        ({"log_scale": math.inf}, "log_scale must be a positive number"),
        ({"logit": 0.5}, "logit must be None or lie in"),
        ({"num_classes": 0}, "num_classes must be None or"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_unknown_or_missing_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown Glow setting 'depth'"):
        GlowConfig.from_dict(SMALL.to_dict() | {"depth": 3})
    with pytest.raises(ValueError, match="needs a 'shape'"):
        GlowConfig.from_dict({"levels": 2})


def test_log_scales_are_clamped_however_large_the_network_output() -> None:
    model = random_glow(SMALL, spread=5.0)
    nets = [m for m in model.modules() if isinstance(m, ClampedNet)]
    assert len(nets) == SMALL.levels * SMALL.steps
    for net in nets:
        width = net.net[0].in_channels
        parameters = net(100 * torch.randn(2, width, 4, 4))
        assert parameters[:, 1::2].abs().max() <= SMALL.clamp
        assert parameters[:, 0::2].abs().max() > SMALL.clamp


def test_the_clamp_keeps_small_log_scales() -> None:
    net = ClampedNet(torch.nn.Identity(), clamp=0.5)
    x = 1e-3 * torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(net(x), x, rtol=1e-4, atol=1e-7)


def test_the_density_integrates_the_change_of_variables() -> None:
    """Log-determinant against the Jacobian that autograd gives, in float64."""
    config = GlowConfig(shape=(1, 4, 4), levels=1, steps=2, hidden=8, logit=0.05)
    model = random_glow(config).double()
    u = torch.rand(1, 1, 4, 4, dtype=torch.float64)

    def encode(v: torch.Tensor) -> torch.Tensor:
        return model.inverse_and_log_det(v.view(1, 1, 4, 4))[0][0].flatten()

    jacobian = torch.autograd.functional.jacobian(encode, u.flatten())
    z, log_det = model.inverse_and_log_det(u)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[0])
    torch.testing.assert_close(-model(u)[0], model.q0[0].log_prob(z[0])[0] + log_det[0])


def test_units_are_inverse_and_keep_black_and_white_inside() -> None:
    x = torch.linspace(0, 1, 17)
    u = to_unit(x, 17)
    assert u.min() > 0
    assert u.max() < 1
    torch.testing.assert_close(from_unit(u, 17), x)
    torch.testing.assert_close(u * 17 - 0.5, torch.arange(17.0))


def test_dequantisation_stays_in_its_bin_and_replays() -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(50)
    first, second = (dequantize(levels, 256, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal((first.double() * 256).floor().to(torch.uint8), levels)
    assert abs(float((first * 256 - levels).mean()) - 0.5) < 0.01


def test_bits_per_dim_of_the_uniform_density_is_the_bit_depth() -> None:
    assert float(bits_per_dim(torch.zeros(()), SMALL)) == 8.0
    one_nat = bits_per_dim(torch.tensor(1.0), SMALL) - 8.0
    assert math.isclose(float(one_nat), 1 / (192 * math.log(2)), rel_tol=1e-3)


def test_bf16_runs_in_the_coupling_networks_alone() -> None:
    model = random_glow(SMALL)
    u = torch.rand(4, 3, 8, 8)
    exact = model(u)
    for module in model.modules():
        if isinstance(module, ClampedNet):
            module.compute_dtype = torch.bfloat16
    rounded = model(u)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (bits_per_dim(rounded, SMALL) - bits_per_dim(exact, SMALL)).abs().max() < 0.05


def test_a_class_conditional_flow_depends_on_the_class() -> None:
    model = random_glow(dataclasses.replace(SMALL, num_classes=3), spread=0.1)
    u = torch.rand(4, 3, 8, 8)
    zero, one = (model(u, torch.full((4,), k)) for k in (0, 1))
    assert not torch.allclose(zero, one)
