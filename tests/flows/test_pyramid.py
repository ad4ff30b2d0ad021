"""A flow at any size: exactness, gradients, and the attack that picks it by itself."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from ijsat_aug import JointSpaceAdv, RobustMixup, load_flow
from ijsat_aug.attack.model import ModelHandle
from ijsat_aug.flows import Pyramid, Tiles
from ijsat_aug.flows.pyramid import at_size
from ijsat_aug.functional import joint_space_adv

SIZES = [(8, 8), (16, 16), (20, 13), (9, 31), (5, 7), (64, 48)]


def pictures(photographs: Tensor, size: tuple[int, int], count: int = 4) -> Tensor:
    """Real photographs, grey, of any size."""
    grey = photographs[:count].mean(1, keepdim=True)
    return nn.functional.interpolate(grey, size=size, mode="bilinear", antialias=True)


def classifier(size: tuple[int, int], channels: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10),
    ).eval()  # fmt: skip


class Untaped:
    """A flow with nothing but the protocol."""

    def __init__(self, flow) -> None:
        self._flow = flow
        self.shape, self.latent_dim = flow.shape, flow.latent_dim

    def encode(self, x: Tensor) -> Tensor:
        return self._flow.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self._flow.decode(z)


@pytest.mark.parametrize("size", SIZES)
def test_latent_and_rest_are_the_image(size, flow, photographs) -> None:
    x = pictures(photographs, size)
    pyramid = Pyramid(flow, size)
    z, rest = pyramid.encode(x), pyramid.rest(x)
    assert z.shape == (4, 64)
    assert torch.allclose(pyramid.decode(z) + rest, x, atol=1e-5)
    if size == (8, 8):
        assert not rest.any()


def test_no_detail_is_folded_into_the_low_band(flow) -> None:
    """A checkerboard averages to grey: without antialiasing it would not."""
    board = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float()[None, None]
    low = Pyramid(flow, (64, 64))._down(board)
    assert (low - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("size", [s for s in SIZES if min(s) >= 8])
@pytest.mark.parametrize("overlap", [None, 0, 7])
def test_tiles_are_the_image(size, overlap, flow, photographs) -> None:
    x = pictures(photographs, size)
    tiles = Tiles(flow, size, overlap)
    assert torch.allclose(tiles.decode(tiles.encode(x)), x, atol=1e-5)
    rows = sorted({i for i, _ in tiles.places})
    assert rows[0] == 0
    assert rows[-1] == size[0] - 8
    assert all(b - a <= 8 - tiles.overlap for a, b in pairwise(rows))


@pytest.mark.parametrize("make", [Pyramid, lambda f, s: Pyramid(Untaped(f), s)])
def test_the_tape_gives_the_gradient_of_decode(make, flow, photographs) -> None:
    x = pictures(photographs, (20, 13))
    pyramid = make(flow, (20, 13))
    z, tape = pyramid.encode_with_tape(x)
    g = torch.randn_like(x)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(pyramid.decode(leaf), leaf, g)
    assert torch.allclose(pyramid.vjp(tape, g), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [Pyramid, Tiles])
@pytest.mark.parametrize("method", ["exact", "linear"])
@pytest.mark.parametrize("eps", [0.0, 0.02])
def test_the_attack_moves_images_of_any_size(kind, method, eps, flow, photographs) -> None:
    size = (20, 13)
    x, y = pictures(photographs, size), torch.arange(4)
    net = classifier(size)
    steps = 1 if method == "linear" and eps == 0 else 2
    options = {"eps": eps, "method": method, "steps": steps, "random_start": False}
    adv = JointSpaceAdv(net, kind(flow, size), eta=0.2, **options)
    worse, _ = adv(x, y)
    loss = nn.functional.cross_entropy
    assert loss(net(worse), y) > loss(net(x), y)
    assert (worse - x).abs().max() > 0.01
    assert worse.min() >= 0
    assert worse.max() <= 1
    assert (adv.last["latent_norm"] <= 0.2 * (1 + 1e-5)).all()


def test_the_move_is_what_the_formula_says(flow, photographs) -> None:
    x = pictures(photographs, (24, 40))
    pyramid = Pyramid(flow, (24, 40))
    z, move = pyramid.encode(x), 0.1 * torch.randn(4, 64)
    moved = joint_space_adv(
        x, torch.arange(4), classifier((24, 40)), pyramid, eta=1.0, latent_norm="linf", steps=0,
        latent_start=move,
    )  # fmt: skip
    low = pyramid._up(flow.decode(z + move) - flow.decode(z))
    assert torch.allclose(moved, (x + low).clamp(0, 1), atol=1e-5)
    still = joint_space_adv(
        x, torch.arange(4), classifier((24, 40)), pyramid, eta=1.0, steps=0,
        latent_start=torch.zeros_like(move),
    )  # fmt: skip
    assert torch.allclose(still, x, atol=1e-6)


def test_the_attack_picks_a_pyramid_and_says_so_once(flow, photographs) -> None:
    x, y = pictures(photographs, (20, 13)), torch.arange(4)
    net = classifier((20, 13))
    adv = JointSpaceAdv(net, flow, generator=0)
    with pytest.warns(UserWarning, match="flow takes images of 8x8, the batch has 20x13"):
        one, _ = adv(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adv(pictures(photographs, (16, 16)), y)  # another size, no other word
        two, _ = JointSpaceAdv(net, Pyramid(flow, (20, 13)), generator=0)(x, y)
    assert torch.equal(one, two)
    mix = RobustMixup(net, num_classes=10, attack=JointSpaceAdv(net, flow))
    with pytest.warns(UserWarning, match="20x13"):
        mixed, t = mix(x, y)
    assert mixed.shape == x.shape
    assert (t.sum(1) - 1).abs().max() < 1e-6


def test_at_size(flow) -> None:
    assert at_size(flow, (8, 8)) is flow
    assert at_size(Pyramid(flow, (9, 9)), (20, 20)).flow is flow
    tiles = at_size(Tiles(flow, (9, 9), 3), (20, 20))
    assert isinstance(tiles, Tiles)
    assert (tiles.overlap, tiles.size) == (3, (20, 20))
    assert Pyramid(flow, (9, 9)).to("cpu").size == (9, 9)
    assert Pyramid(flow, (9, 9)).to(dtype=torch.float32).flow is flow


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: Pyramid(f, (0, 8)), "both at least 1"),
        (lambda f: Tiles(f, (7, 8)), "smaller than a tile"),
        (lambda f: Tiles(f, (16, 16), 8), "overlap must be from 0 to 7"),
    ],
)
def test_bad_sizes(make, message, flow) -> None:
    with pytest.raises(ValueError, match=message):
        make(flow)


def test_channels_must_agree(flow, photographs) -> None:
    rgb, y = photographs[:2], torch.arange(2)
    with pytest.raises(ValueError, match=r"v2\.Grayscale"):
        JointSpaceAdv(classifier((32, 32), 3), flow)(rgb, y)
    with pytest.raises(ValueError, match="repeat the channel"):
        JointSpaceAdv(classifier((32, 32)), load_flow("cifar10"))(rgb[:, :1], y)
    with pytest.raises(ValueError, match=r"Pyramid\(flow, \(32, 32\)\)"):
        joint_space_adv(rgb[:, :1], y, classifier((32, 32)), flow, eta=0.1)


def test_a_real_photograph_at_its_own_size() -> None:
    """427 x 640 pixels, through the flow of 32-pixel images."""
    from sklearn.datasets import load_sample_image

    picture = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 255
    net = classifier((427, 640), 3)
    cifar = load_flow("cifar10")
    adv = JointSpaceAdv(net, Pyramid(cifar, (427, 640)), eps=0, steps=3, random_start=False)
    worse, _ = adv(picture, torch.tensor([0]))
    assert adv.last["loss"] > adv.last["loss_start"]
    assert 0.005 < (worse - picture).square().mean().sqrt() < 0.1
    with ModelHandle(net).frozen(torch.device("cpu"), None):
        assert net(worse).isfinite().all()
