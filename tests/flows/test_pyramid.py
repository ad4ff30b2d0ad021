"""A flow at any size: exactness, gradients, and the attack that picks it by itself."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijsat_aug import JointSpaceAdv, RobustMixup, load_flow
from ijsat_aug.attack.model import ModelHandle
from ijsat_aug.flows import Decoder, Pyramid, Tiles
from ijsat_aug.flows.pyramid import at_size
from ijsat_aug.functional import joint_space_adv
from tests.conftest import IdentityFlow

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


def autoencoder() -> Decoder:
    """A manifold without tape that misses the image by far."""
    torch.manual_seed(1)
    encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    decode = nn.Sequential(nn.Linear(12, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
    return Decoder(decode, (1, 8, 8), (12,), encode=encode)


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


def test_tiles_of_a_manifold_in_float64_are_as_exact() -> None:
    tiles = Tiles(IdentityFlow(), (20, 13))
    for dtype, error in ((torch.float32, 1e-6), (torch.float64, 1e-14), (torch.float32, 1e-6)):
        x = torch.rand(2, 1, 20, 13, dtype=dtype)
        decoded = tiles.decode(tiles.encode(x))
        assert decoded.dtype == dtype
        assert torch.allclose(decoded, x, rtol=0, atol=error)


def test_the_tape_gives_the_gradient_of_decode(flow, photographs) -> None:
    x = pictures(photographs, (20, 13))
    pyramid = Pyramid(flow, (20, 13))
    z, tape = pyramid.encode_with_tape(x)
    g = torch.randn_like(x)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(pyramid.decode(leaf), leaf, g)
    assert torch.allclose(pyramid.vjp(tape, g), expected, rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        z, tape = pyramid.encode_with_tape(x)
        assert torch.allclose(pyramid.vjp(tape, g + 0), expected, rtol=1e-3, atol=1e-4)


def test_tiles_fade_into_each_other(flow, photographs) -> None:
    """Where two overlap, the move of each loses weight towards its own edge: there is no seam."""
    x = pictures(photographs, (8, 14))
    tiles = Tiles(flow, (8, 14))
    z = tiles.encode(x)
    step = torch.cat([0.3 * torch.randn(4, 64), torch.zeros(4, 64)], 1)
    alone = flow.decode((z + step)[:, :64]) - flow.decode(z[:, :64])
    blended = tiles.decode(z + step) - tiles.decode(z)
    left, right = ((blended[..., j] / alone[..., j]).median() for j in (6, 7))
    assert left == pytest.approx(2 / 3, abs=1e-3)
    assert right == pytest.approx(1 / 3, abs=1e-3)
    assert torch.allclose(blended[..., :6], alone[..., :6], atol=1e-5)
    assert blended[..., 8:].abs().max() < 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda flow: Pyramid(flow, (20, 13)),
        lambda flow: Pyramid(autoencoder(), (20, 13)),
        lambda flow: Tiles(flow, (20, 13)),
        lambda flow: Tiles(autoencoder(), (20, 13)),
    ],
)
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_a_linear_step_of_nothing_is_the_image(make, amp_dtype, flow, photographs) -> None:
    x, y = pictures(photographs, (20, 13)), torch.arange(4)
    options = {"method": "linear", "random_start": False, "amp_dtype": amp_dtype}
    adv = JointSpaceAdv(classifier((20, 13)), make(flow), eps=0, eta=1e-7, **options)
    assert (adv(x, y)[0] - x).abs().max() < 2e-5


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
    with pytest.warns(UserWarning, match="batch has 6x8: they are enlarged on the way"):
        JointSpaceAdv(classifier((6, 8)), flow)(pictures(photographs, (6, 8)), y)
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


def test_tiles_of_another_size_are_laid_anew_and_said_so(flow, photographs) -> None:
    adv = JointSpaceAdv(classifier((20, 13)), Tiles(flow, (16, 16)))
    with pytest.warns(UserWarning, match=r"16x16, the batch has 20x13: as many tiles move"):
        adv(pictures(photographs, (20, 13)), torch.arange(4))
    assert adv.last["latent_norm"].max() > 0


def test_what_was_fitted_stays_while_device_and_size_do(flow, photographs) -> None:
    tiles = Tiles(flow, (16, 16))
    adv = JointSpaceAdv(classifier((16, 16)), tiles)
    seen = [adv._fitted(pictures(photographs, size)) for size in [(16, 16)] * 2 + [(20, 13)] * 2]
    assert seen[0] is seen[1] is adv.flow is tiles
    assert seen[2] is seen[3]
    assert seen[2].shape == (1, 20, 13)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_calibrated_radius_moves_tiles_as_far_as_images(norm, flow, network, digits) -> None:
    """Four digits in one picture, and the digits alone."""
    network.eval()
    y = torch.arange(16) % 10
    four = digits[:64].reshape(2, 2, 16, 1, 8, 8).permute(2, 3, 0, 4, 1, 5).reshape(16, 1, 16, 16)

    def each(x: Tensor) -> Tensor:
        return sum(network(part) for half in x.chunk(2, 2) for part in half.chunk(2, 3))

    def rms(model, flow, x: Tensor) -> float:
        adv = JointSpaceAdv(model, flow, eps=0, latent_norm=norm, random_start=False)
        moved, _ = adv(x, y)
        return (moved - x).square().mean((1, 2, 3)).sqrt().median().item()

    alone = rms(network, flow, digits[:16])
    assert rms(each, Tiles(flow, (16, 16), 0), four) == pytest.approx(alone, rel=0.3)
    assert rms(each, Tiles(flow, (16, 16)), four) == pytest.approx(alone, rel=0.3)
    rows = [f.info["calibration"][norm][0]["eta"] for f in (flow, Tiles(flow, (16, 16), 0))]
    assert rows[1] == pytest.approx(rows[0] * (2 if norm == "l2" else 1))
    assert "calibration" not in Tiles(autoencoder(), (16, 16)).info


@pytest.mark.parametrize("kind", [Pyramid, Tiles])
def test_no_images_at_all(kind, flow) -> None:
    resized = kind(flow, (20, 13))
    z = resized.encode(torch.zeros(0, 1, 20, 13))
    assert z.shape == (0, resized.latent_dim)
    assert resized.decode(z).shape == (0, 1, 20, 13)


def test_weights_of_inference_mode_do_not_stay(flow, photographs) -> None:
    x, tiles = pictures(photographs, (16, 16)), Tiles(flow, (16, 16))
    with torch.inference_mode():
        z = tiles.encode(x)
        tiles.decode(z)
    leaf = z.clone().requires_grad_()
    tiles.decode(leaf).sum().backward()
    assert leaf.grad.abs().max() > 0


def test_at_size(flow) -> None:
    assert at_size(flow, (8, 8)) is flow
    assert at_size(Pyramid(flow, (9, 9)), (20, 20)).flow is flow
    tiles = at_size(Tiles(flow, (9, 9), 3), (20, 20))
    assert isinstance(tiles, Tiles)
    assert (tiles.overlap, tiles.size) == (3, (20, 20))
    pyramid = Pyramid(flow, (9, 9))
    assert pyramid.to("cpu") is pyramid
    low = pyramid.to(compute_dtype=torch.bfloat16)
    assert (low.size, low.flow.compute_dtype) == ((9, 9), torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: Pyramid(f, (0, 8)), "both at least 1"),
        (lambda f: Pyramid(f, 224), r"size is \(height, width\).* got 224"),
        (lambda f: Tiles(f, (16, 16.0)), r"size is \(height, width\)"),
        (lambda f: Pyramid(f, (9, 9)).encode(torch.rand(2, 1, 9, 8)), r"\(B, 1, 9, 9\)"),
        (lambda f: Tiles(f, (9, 9)).encode(torch.rand(2, 1, 9, 10)), r"\(B, 1, 9, 9\)"),
        (lambda f: Tiles(f, (7, 8)), "smaller than a tile"),
        (lambda f: Tiles(f, (16, 16), 8), "overlap must be from 0 to 7"),
    ],
)
def test_bad_sizes(make, message, flow) -> None:
    with pytest.raises(ValueError, match=message):
        make(flow)


@pytest.mark.parametrize("kind", [Pyramid, Tiles])
def test_a_name_is_no_flow(kind) -> None:
    with pytest.raises(TypeError, match=r"got str; load one with ijsat_aug\.load_flow"):
        kind("digits", (16, 16))


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


def test_tiles_of_another_size_keep_their_overlap(flow) -> None:
    tiles = at_size(Tiles(flow, (20, 13), overlap=5), (24, 16))
    assert (tiles.overlap, tiles.shape) == (5, (1, 24, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_resampled_on_a_cpu_too(dtype: torch.dtype, flow) -> None:
    x = torch.rand(2, 1, 12, 12)
    pyramid = Pyramid(flow, (12, 12))
    z = pyramid.encode(x.to(dtype))
    assert (z.float() - pyramid.encode(x.to(dtype).float())).abs().max() < 0.05


def test_pyramids_of_a_manifold_in_float64_are_as_exact() -> None:
    pyramid = Pyramid(IdentityFlow(), (20, 13))
    x = torch.rand(2, 1, 20, 13, dtype=torch.float64)
    low = F.interpolate(x, (8, 8), mode="bilinear", antialias=True)
    assert torch.allclose(pyramid.encode(x), low.flatten(1), rtol=0, atol=1e-14)
    assert torch.allclose(
        pyramid.decode(pyramid.encode(x)) + pyramid.rest(x), x, rtol=0, atol=1e-14
    )
