"""Calibration: what it reports is what a latent ball really does to a picture."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ijsat_aug import load_flow
from ijsat_aug.flows import Pyramid
from ijsat_aug.flows.calibration import (
    _worst_direction,
    calibrate,
    matching_eta,
    recommended_eta,
    round_trip,
)
from ijsat_aug.flows.data import load_images
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.flows.probe import probe_network
from tests.conftest import IdentityFlow

ETAS = (0.01, 0.05, 0.2)


@pytest.fixture(scope="module")
def flow() -> FrozenGlow:
    return load_flow("digits")


@pytest.fixture(scope="module")
def labels() -> Tensor:
    found = load_images("digits", train=False).labels
    assert found is not None
    return found


@pytest.fixture(scope="module")
def table(flow: FrozenGlow, digits: Tensor, labels: Tensor) -> dict:
    return calibrate(flow, digits[:128], labels[:128], etas=ETAS)


def test_both_norms_have_a_row_for_every_radius(table: dict) -> None:
    assert [row["eta"] for row in table["linf"]] == list(ETAS)
    assert [row["eta"] for row in table["l2"]] == pytest.approx([8 * eta for eta in ETAS])
    assert table["images"] == 128


def test_the_gradient_moves_further_than_chance_and_the_worst_case_furthest(table: dict) -> None:
    for norm in ("linf", "l2"):
        for row in table[norm]:
            random, gradient, worst = (
                row[kind]["pixel_rms"] for kind in ("random", "gradient", "worst")
            )
            assert random < gradient < worst


def test_displacement_grows_with_the_radius(table: dict) -> None:
    for norm in ("linf", "l2"):
        for kind in ("random", "gradient", "worst"):
            rms = [row[kind]["pixel_rms"] for row in table[norm]]
            assert rms == sorted(rms)


def test_random_rows_are_what_a_random_corner_does(
    table: dict, flow: FrozenGlow, digits: Tensor
) -> None:
    x = digits[:128]
    z = flow.encode(x)
    moved = flow.decode(z + 0.05 * torch.randn_like(z).sign()) - x
    median = moved.flatten(1).square().mean(1).sqrt().median()
    assert table["linf"][1]["random"]["pixel_rms"] == pytest.approx(float(median), rel=0.1)


def test_the_gradient_direction_raises_the_loss_of_the_network(
    flow: FrozenGlow, digits: Tensor, labels: Tensor
) -> None:
    """Pixel RMS alone could come from any direction: check the one that calibrate() uses."""
    from ijsat_aug.flows.calibration import _gradient_direction

    train = load_images("digits")
    network = probe_network(train.images.float() / 16, train.labels)
    x, y = digits, labels
    accuracy = (network(x).argmax(1) == y).float().mean()
    assert accuracy > 0.9, "the small network must have learnt something"
    z = flow.encode(x)
    step = _gradient_direction(flow, network, x, y)(x, z, "linf", 0.05)
    loss = nn.functional.cross_entropy
    before, after = (float(loss(network(flow.decode(z + s)), y)) for s in (0 * step, step))
    chance = float(loss(network(flow.decode(z + 0.05 * torch.randn_like(z).sign())), y))
    assert after > 1.3 * before
    assert after > 1.2 * chance


def test_steps_lie_on_their_sphere(flow: FrozenGlow, digits: Tensor) -> None:
    from ijsat_aug.flows.calibration import _random_direction, _worst_direction

    x = digits[:8]
    z = flow.encode(x)
    for find in (_random_direction(0), _worst_direction(flow, 0)):
        torch.testing.assert_close(find(x, z, "l2", 0.3).norm(dim=1), torch.full((8,), 0.3))
        assert find(x, z, "linf", 0.3).abs().max() == pytest.approx(0.3)


def test_the_recommended_radius_moves_pixels_by_eight_levels(
    flow: FrozenGlow, digits: Tensor, labels: Tensor
) -> None:
    network = probe_network(digits, labels, steps=100)
    digits, labels = digits[:100], labels[:100]
    fine = tuple(0.01 * i for i in range(1, 9))
    table = calibrate(flow, digits, labels, network=network, etas=fine)
    for norm, unit in (("linf", 1.0), ("l2", 8.0)):
        eta = table["recommended"][norm]
        row = calibrate(flow, digits, labels, network=network, etas=(eta / unit,))[norm][0]
        assert row["gradient"]["pixel_rms"] == pytest.approx(8 / 255, rel=0.02)


def test_shipped_flows_carry_a_complete_table() -> None:
    for name in ("digits", "cifar10", "cifar10-fast", "fashion-mnist"):
        table = load_flow(name).info["calibration"]
        for norm in ("linf", "l2"):
            assert len(table[norm]) >= 8
            for row in table[norm]:
                for kind in ("random", "gradient", "worst"):
                    assert set(row[kind]) == {
                        "pixel_linf", "pixel_rms", "out_of_range", "non_finite",
                    }  # fmt: skip
            assert 0 < table["recommended"][norm] < table[norm][-1]["eta"]


def fake(*rows: tuple[float, float | None, float]) -> dict:
    return {
        "linf": [
            {"eta": eta, "gradient": {"pixel_rms": rms, "non_finite": lost}}
            for eta, rms, lost in rows
        ]
    }


def test_matching_interpolates_and_stops_at_the_table() -> None:
    table = fake((0.1, 0.2, 0.0), (0.2, 0.6, 0.0))
    assert matching_eta(table, 0.0) == 0.0
    assert matching_eta(table, 0.1) == pytest.approx(0.05)
    assert matching_eta(table, 0.4) == pytest.approx(0.15)
    assert matching_eta(table, 9.0) == 0.2


def test_matching_never_recommends_a_radius_that_blows_up() -> None:
    assert matching_eta(fake((0.1, 0.2, 0.0), (0.2, 0.6, 0.01)), 0.5) == 0.1
    assert matching_eta(fake((0.1, 0.2, 0.0), (0.2, None, 1.0)), 0.5) == 0.1


def test_matching_refuses_what_it_cannot_answer() -> None:
    with pytest.raises(ValueError, match="norm must be"):
        matching_eta(fake(), 0.1, "l1")
    with pytest.raises(ValueError, match="no calibration table"):
        matching_eta({}, 0.1)
    for bad in (math.nan, -1.0):
        with pytest.raises(ValueError, match="pixel_rms must be"):
            matching_eta(fake(), bad)


class _Exploding:
    """The flow, but infinite where a latent is large."""

    def __init__(self, flow: FrozenGlow) -> None:
        self.flow = flow

    def __getattr__(self, name: str) -> object:
        return getattr(self.flow, name)

    def decode(self, z: Tensor) -> Tensor:
        x = self.flow.decode(z)
        return torch.where((z.abs().amax(1) > 3)[:, None, None, None], torch.inf, x)


def test_images_that_are_not_finite_are_counted(flow: FrozenGlow, digits: Tensor) -> None:
    x = digits[:64]
    table = calibrate(_Exploding(flow), x, etas=(0.01, 5.0))  # type: ignore[arg-type]
    share = float((flow.encode(x).abs().amax(1) > 3).float().mean())
    assert abs(table["linf"][0]["random"]["non_finite"] - share) < 0.1
    assert table["linf"][1]["random"] == {
        "pixel_linf": None, "pixel_rms": None, "out_of_range": None, "non_finite": 1.0,
    }  # fmt: skip


def test_a_table_without_labels_uses_mirrored_images(flow: FrozenGlow, digits: Tensor) -> None:
    network = probe_network(digits, None)
    flipped = network(digits.flip(2)).argmax(1)
    plain = network(digits).argmax(1)
    assert float((flipped == 2).float().mean()) > 0.5
    assert float((plain == 0).float().mean()) > 0.5
    assert calibrate(flow, digits[:16], etas=(0.05,))["linf"][0]["gradient"]["pixel_rms"] > 0


def test_one_class_is_none(flow: FrozenGlow, digits: Tensor) -> None:
    one = calibrate(flow, digits[:16], torch.zeros(16, dtype=torch.long), etas=(0.05, 0.2))
    assert one == calibrate(flow, digits[:16], etas=(0.05, 0.2))
    deaf = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(ValueError, match="moves nothing"):
        calibrate(flow, digits[:8], torch.zeros(8, dtype=torch.long), network=deaf, etas=(0.1,))


def test_it_replays_and_leaves_the_global_generator_alone(flow: FrozenGlow, digits: Tensor) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = calibrate(flow, digits[:16], etas=(0.05,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert calibrate(flow, digits[:16], etas=(0.05,)) == first


def test_it_works_under_inference_mode_and_leaves_the_network_alone(
    flow: FrozenGlow, digits: Tensor
) -> None:
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(64, 4))
    network[1].eval()
    modes = [module.training for module in network.modules()]
    statistics = network[0].running_mean.clone()
    with torch.inference_mode():
        x = digits[:8].clone()
        calibrate(flow, x, network=network, etas=(0.05,))
        calibrate(flow, x, etas=(0.05,))
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(network[0].running_mean, statistics)
    assert all(p.grad is None for p in network.parameters())


def test_radii_are_sorted_and_checked(flow: FrozenGlow, digits: Tensor) -> None:
    table = calibrate(flow, digits[:4], etas=(0.1, 0.01))
    assert [row["eta"] for row in table["linf"]] == [0.01, 0.1]
    for bad in ((), (0.0, 0.1)):
        with pytest.raises(ValueError, match="etas must be radii"):
            calibrate(flow, digits[:4], etas=bad)


def test_round_trip_names_its_kinds_of_images(flow: FrozenGlow, digits: Tensor) -> None:
    errors = round_trip(flow, digits)
    assert set(errors) == {"real", "mixed", "black", "white", "noise"}
    assert max(errors.values()) <= 1e-5


def test_what_a_manifold_misses_is_no_move(flow: FrozenGlow, digits: Tensor) -> None:
    large = nn.functional.interpolate(digits[:32], size=(20, 20), mode="nearest")
    pyramid = Pyramid(flow, (20, 20))
    (row,) = calibrate(pyramid, large, etas=(0.05,))["linf"]
    z = pyramid.encode(large)
    generator = torch.Generator().manual_seed(0)
    corner = 0.05 * torch.randn(z.shape, generator=generator).sign()
    move = (pyramid.decode(z + corner) - pyramid.decode(z)).square().mean((1, 2, 3)).sqrt()
    assert row["random"]["pixel_rms"] == pytest.approx(float(move.median()), rel=1e-3)
    assert row["random"]["pixel_rms"] < 0.5 * float(
        (pyramid.decode(z) - large).square().mean().sqrt()
    )


@pytest.mark.parametrize("measure", [calibrate, round_trip])
def test_images_out_of_range_are_refused(measure, flow: FrozenGlow, digits: Tensor) -> None:
    with pytest.raises(TypeError, match="floats in"):
        measure(flow, (255 * digits[:8]).byte())
    with pytest.raises(ValueError, match="before they are normalised"):
        measure(flow, (digits[:8] - 0.5) / 0.25)
    with pytest.raises(ValueError, match="no image to measure"):
        measure(flow, digits[:0])


def test_labels_are_classes_of_the_images(flow: FrozenGlow, digits: Tensor, labels: Tensor) -> None:
    for wrong in (labels[:4], labels[:8] - 10):
        with pytest.raises(ValueError, match="classes from 0, one an image"):
            calibrate(flow, digits[:8], wrong)
    with pytest.raises(ValueError, match="no image to measure"):
        calibrate(flow, digits[:0], labels[:0])


def test_a_network_without_labels_is_asked_for_its_own(flow: FrozenGlow, digits: Tensor) -> None:
    x = digits[:32]
    network = probe_network(x, torch.arange(32) % 3, steps=20)
    own = network(x).argmax(1)
    assert len(own.unique()) > 1
    alone, told = (calibrate(flow, x, y, network=network, etas=(0.05,)) for y in (None, own))
    assert alone == told


def test_no_radius_can_be_told_of_a_flow_that_is_never_finite() -> None:
    calibrated = SimpleNamespace(info={"calibration": {"recommended": {"linf": 0.0}}})
    with pytest.raises(ValueError, match="not finite at the smallest radius"):
        recommended_eta(calibrated, "linf")


def test_half_a_level_beside_the_range_is_rounding(flow, digits) -> None:
    table = calibrate(flow, digits[:64], etas=(1e-4,))
    assert table["linf"][0]["random"]["out_of_range"] == 0


def test_more_than_half_a_level_beside_the_range_is_out_of_it() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    levels = (0.4 / 255, 0.6 / 255)
    rows = calibrate(IdentityFlow(), torch.zeros(8, 1, 8, 8), network=network, etas=levels)["linf"]
    inside, outside = (row["random"]["out_of_range"] for row in rows)
    assert inside == 0
    assert outside == pytest.approx(0.5, abs=0.1)


def test_where_nothing_moves_the_worst_direction_is_the_random_one() -> None:
    class Still(IdentityFlow):
        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return 0 * super().decode(z)

    x = torch.rand(3, 1, 2, 2)
    step = _worst_direction(Still((1, 2, 2), 4), 0)(x, x.flatten(1), "linf", 0.3)
    assert torch.allclose(step.abs(), torch.full((3, 4), 0.3))


def test_no_radius_is_taken_from_beyond_one_that_blows_up() -> None:
    assert matching_eta(fake((0.1, 0.2, 0.0), (0.2, 0.3, 0.5), (0.3, 0.6, 0.0)), 0.5) == 0.1
    assert matching_eta(fake((0.1, 0.2, 0.0), (0.2, None, 1.0), (0.3, 0.6, 0.0)), 0.5) == 0.1
