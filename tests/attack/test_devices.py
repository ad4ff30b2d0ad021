"""No tensor is made on the wrong device: the whole attack on the meta device, without a GPU."""

from __future__ import annotations

import pytest
import torch

from ijsat_aug import JointSpaceAdv
from tests.conftest import small_network

META = torch.device("meta")


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 0},
        {"steps": 2},
        {"steps": 2, "norm": "l2", "eps": 0.5, "latent_norm": "l2"},
        {"steps": 3, "update": "alternating", "best": True},
        {"method": "linear"},
        {"objective": "kl"},
        {"objective": "margin", "mean": 0.5, "std": 0.5},
        {"target": "random", "targeted": True},
        {"target": "prediction", "p": 0.999},
    ],
)
def test_everything_stays_on_the_device_of_the_batch(options, flow) -> None:
    with META:
        network = small_network()
        x, y = torch.empty(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    adv = JointSpaceAdv(network, flow, **options)
    for places in (adv._seen, adv._asked):
        places.add(META)  # values cannot be looked at, as after the first batch on a GPU
    out, _ = adv(x, y)
    assert out.device == META
    assert all(value.device == META for value in adv.last.values())
    assert adv.flow.device == (META if adv.threat.moves_latent else flow.device)


def test_a_generator_of_another_device_is_drawn_from_there() -> None:
    adv = JointSpaceAdv(small_network(), eta=0, generator=torch.Generator().manual_seed(3))
    draw = adv.make_params(torch.empty(2, 1, 8, 8, device=META), None)["pixel_start"]
    assert draw.device == META


def test_a_batch_that_is_left_as_it_is_has_been_looked_at() -> None:
    adv = JointSpaceAdv(small_network(), eta=0, p=0)
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(adv(x), x)
    assert adv._seen == {x.device}
