"""Unseen threats: every space keeps its promises and fools real networks on real images."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import idctn
from torch import Tensor, nn

from ijsat_aug.attack import Landscape, ascend, cross_entropy
from ijsat_aug.evaluation.draws import Draws
from ijsat_aug.evaluation.spaces import (
    SPACES,
    L1Ball,
    PerceptualBall,
    Space,
    alexnet_distance,
    elastic,
    feature_distance,
    fog,
    gabor,
    jpeg_l1,
    jpeg_linf,
    lpips,
    perceptual,
    recolor,
    snow,
    stadv,
)
from ijsat_aug.evaluation.spaces.jpeg import _LUMA, dct_matrix
from ijsat_aug.evaluation.spaces.l1 import unit_l1_ball
from ijsat_aug.evaluation.spaces.weather import SnowBall, _fallen, _fallen_in_columns
from tests.attack.test_costs import counted


def rms(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean((1, 2, 3)).sqrt()


# A budget for 8 x 8 digits, and one for pieces of photographs, that a network feels.
BUDGETS: dict[str, tuple[Space, float, float]] = {
    "stadv": (stadv, 0.2, 0.05),
    "elastic": (elastic, 0.7, 1.0),
    "recolor": (recolor, 0.3, 0.06),
    "jpeg_linf": (jpeg_linf, 1.5, 0.5),
    "jpeg_l1": (jpeg_l1, 40.0, 256.0),
    "fog": (fog, 0.7, 0.5),
    "snow": (snow, 1.5, 0.5),
    "gabor": (gabor, 0.5, 0.3),
    "perceptual": (perceptual(rms), 0.1, 0.03),
}
each_space = pytest.mark.parametrize("name", BUDGETS)
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 30, 45)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def seeded(seed: int = 0) -> Callable[[tuple[int, ...]], Tensor]:
    return partial(torch.rand, generator=torch.Generator().manual_seed(seed))


def contrasty(shape: tuple[int, ...], batch: int = 4) -> Tensor:
    """A third black, a third white, and one image all black."""
    x = (3 * torch.rand(batch, *shape, generator=torch.Generator().manual_seed(1)) - 1).clamp(0, 1)
    x[0] = 0
    return x


def losses(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(net(x), y, reduction="none")


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (net(x).argmax(1) == y).float().mean().item()


def attack(
    net: nn.Module, space: Space, budget: float, x: Tensor, y: Tensor, steps: int = 8
) -> Any:
    picture, variables = space(x, budget, steps, seeded())
    return ascend(Landscape(picture, net, cross_entropy, y), variables, best=True)


@pytest.fixture
def net(network: nn.Sequential) -> nn.Sequential:
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pieces() -> tuple[Tensor, Tensor]:
    """Overlapping 32-pixel pieces of two photographs, turned, and by how many right angles."""
    from sklearn.datasets import load_sample_images

    found = []
    for photograph in load_sample_images().images:
        image = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[:, :416, :640] / 255
        small = F.avg_pool2d(image, 4)
        found.append(small.unfold(1, 32, 8).unfold(2, 32, 8).flatten(1, 2).transpose(0, 1))
    images = torch.cat(found)
    turned = torch.cat([images.rot90(k, (2, 3)) for k in range(4)])
    order = torch.randperm(len(turned), generator=torch.Generator().manual_seed(0))
    return turned[order], torch.arange(4).repeat_interleave(len(images))[order]


@pytest.fixture(scope="module")
def colour_net(pieces: tuple[Tensor, Tensor]) -> nn.Sequential:
    """Tells which side of a piece is up, with some doubt."""
    x, y = pieces
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 4),
        )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(200):
        index = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x[index]), y[index], label_smoothing=0.1).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


@each_space
def test_digits_are_misread(name, net, digits, labels) -> None:
    space, budget, _ = BUDGETS[name]
    x, y = digits[:64], labels[:64]
    found = attack(net, space, budget, x, y)
    clean, last = losses(net, x, y), losses(net, found.image, y)
    assert torch.allclose(last, found.last, atol=1e-4)
    assert found.finite.all()
    assert last.mean() > 3 * clean.mean() + 0.3
    assert last.mean() > 1.2 * found.first.mean() + 0.1
    assert accuracy(net, found.image, y) < accuracy(net, x, y) - 0.15


@each_space
def test_photographs_are_mistaken(name, colour_net, pieces) -> None:
    space, _, budget = BUDGETS[name]
    x, y = pieces[0][:80], pieces[1][:80]
    found = attack(colour_net, space, budget, x, y)
    clean, last = losses(colour_net, x, y), losses(colour_net, found.image, y)
    assert last.mean() > 1.2 * clean.mean()
    assert last.mean() > 1.2 * found.first.mean()
    assert accuracy(colour_net, found.image, y) < accuracy(colour_net, x, y) - 0.1


@each_space
def test_more_budget_is_stronger(name, net, digits, labels) -> None:
    space, budget, _ = BUDGETS[name]
    x, y = digits[:64], labels[:64]
    found = [attack(net, space, share * budget, x, y).last.mean() for share in (0, 0.25, 1, 2)]
    assert torch.isclose(found[0], losses(net, x, y).mean(), rtol=1e-3, atol=1e-5)
    assert found == sorted(found)


@each_space
@each_shape
def test_no_budget_is_the_clean_image(name, shape) -> None:
    x = contrasty(shape)
    picture, variables = BUDGETS[name][0](x, 0.0, 3, seeded())
    starts = {n: v.start for n, v in variables.items()}
    assert (picture(starts) - x).abs().max() <= 1e-6


@each_space
@each_shape
def test_range_gradients_and_budgets(name, shape) -> None:
    """Whatever the gradient says, also on black and white pixels."""
    space, budget, _ = BUDGETS[name]
    picture, variables = space(contrasty(shape), budget, 4, seeded())
    ((key, variable),) = variables.items()
    value = variable.start
    uniform = seeded(2)
    for _ in range(4):
        assert (variable.ball.distance(value) <= variable.ball.radius * (1 + 1e-5)).all()
        leaf = value.clone().requires_grad_()
        image = picture({key: leaf})
        assert image.min() >= 0
        assert image.max() <= 1
        weights = uniform(tuple(image.shape)) - 0.5
        (gradient,) = torch.autograd.grad((weights * image).sum(), leaf)
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
        value = variable.ball.step(value, gradient, 3 * variable.step_size)
        assert value.isfinite().all()


@each_space
def test_samples_stand_alone(name, colour_net, pieces) -> None:
    """A sample's attack is the same in any batch, and ``take`` takes all that belongs to it."""
    space, _, budget = BUDGETS[name]
    x, y = pieces[0][:5], pieces[1][:5]
    index = torch.tensor([3, 1])

    def start(where: Tensor) -> tuple[Any, dict[str, Any]]:
        return space(x[where], budget, 3, Draws(0, name, where.tolist()).uniform)

    whole, variables = start(torch.arange(5))
    part, few = whole.take(index), {n: v.take(index) for n, v in variables.items()}
    alone, own = start(index)
    for n, variable in few.items():
        assert torch.allclose(variable.start, own[n].start, atol=1e-6)
    lands = [Landscape(p, colour_net, cross_entropy, y[index]) for p in (part, alone)]
    whole_land = Landscape(whole, colour_net, cross_entropy, y)
    together = ascend(whole_land, variables, best=True).image[index]
    for land, its in zip(lands, (few, own), strict=True):
        image = ascend(land, its, best=True).image
        assert (image - together).abs().gt(1e-3).float().mean() < 0.02


@each_space
def test_the_draws_tell_everything(name, net, digits, labels) -> None:
    space, budget, _ = BUDGETS[name]
    state = torch.get_rng_state()
    first = attack(net, space, budget, digits[:8], labels[:8], steps=2)
    assert torch.equal(
        first.image, attack(net, space, budget, digits[:8], labels[:8], steps=2).image
    )
    assert torch.equal(torch.get_rng_state(), state)
    picture, variables = space(digits[:8], budget, 2, seeded(5))
    other = ascend(Landscape(picture, net, cross_entropy, labels[:8]), variables, best=True)
    assert not torch.equal(first.image, other.image)


@each_space
def test_low_precision_is_the_models_alone(name) -> None:
    space, _, budget = BUDGETS[name]
    images = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            picture, variables = space(contrasty((3, 32, 32)), budget, 2, seeded())
            ((key, variable),) = variables.items()
            moved = variable.ball.step(variable.start, torch.ones_like(variable.start), 1.0)
            images.append(picture({key: moved}))
    assert images[1].dtype == torch.float32
    assert (images[0] - images[1]).abs().max() < 1e-5


@each_space
def test_a_step_is_one_call_of_the_model(name, net, digits, labels) -> None:
    calls = []

    def model(x: Tensor) -> Tensor:
        calls.append(len(x))
        return net(x)

    space, budget, _ = BUDGETS[name]
    attack(model, space, budget, digits[:8], labels[:8], steps=5)
    assert calls == [8] * 6


@each_space
def test_a_step_never_waits_for_the_device(name) -> None:
    space, budget, _ = BUDGETS[name]
    picture, variables = space(torch.rand(2, 3, 32, 32), budget, 2, seeded())
    ((key, variable),) = variables.items()

    def step() -> None:
        leaf = variable.start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(picture({key: leaf}).sum(), leaf)
        variable.ball.step(leaf.detach(), gradient, variable.step_size)

    count = counted(step)
    assert count.syncs == 0
    # Constants from the host; kornia makes the matrix from XYZ to RGB anew.
    assert count.ops["aten.lift_fresh"] <= (name == "recolor")


def test_the_table() -> None:
    for info in SPACES.values():
        assert info.steps >= 1
        assert info.budget > 0
        assert list(info.budgets) == sorted(info.budgets)
        assert not info.budgets or info.budget in info.budgets


def test_bad_input() -> None:
    x = torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match="float32 images"):
        stadv((255 * x).byte(), 0.05, 10, torch.rand)
    with pytest.raises(ValueError, match="float32 images"):
        fog(x[0], 0.05, 10, torch.rand)
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        jpeg_linf(x[:, :2], 0.25, 10, torch.rand)
    for budget in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="budget must be"):
            gabor(x, budget, 10, torch.rand)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        snow(x, 0.1, 0, torch.rand)


# Flows


def test_a_constant_flow_moves_the_image_by_whole_pixels() -> None:
    x = torch.rand(1, 3, 8, 16)
    for space, across in ((stadv, 2 / 16), (elastic, 1.0)):
        picture, variables = space(x, 1.0, 1, seeded())
        there = torch.zeros_like(variables["flow"].start)
        there[:, 0] = across
        moved = picture({"flow": there})
        assert torch.allclose(moved[..., :-1], x[..., 1:], atol=1e-5)
        assert torch.allclose(moved[..., -1], x[..., -1], atol=1e-5)


def test_elastic_blurs_its_flow_on_large_images_only() -> None:
    spike = torch.zeros(1, 2, 224, 224)
    spike[:, 0, 112, 112] = 1
    ramp = torch.linspace(0, 1, 224).expand(1, 1, 224, 224)
    picture, _ = elastic(ramp, 1.0, 1, seeded())
    touched = (picture({"flow": spike}) - ramp).abs() > 1e-6
    assert touched.sum() > 100
    small = ramp[..., :8, :8].contiguous()
    picture, _ = elastic(small, 1.0, 1, seeded())
    changed = (picture({"flow": spike[..., 108:116, 108:116]}) - small).abs() > 1e-6
    assert changed.sum() == 1


# Colours


def test_luv_there_and_back(photographs) -> None:
    """Colours that move nowhere are hardly changed, before what is lost is put back."""
    corners = torch.cartesian_prod(*[torch.linspace(0, 1, 9)] * 3).T.reshape(1, 3, 27, 27)
    for x in (photographs, corners):
        picture, _ = recolor(x, 0.0, 1, seeded())
        _, _, lost = picture.facts
        assert lost.abs().max() < 1e-3


def test_colours_move_as_luv_says(photographs) -> None:
    from kornia.color import rgb_to_luv

    x = 0.2 + 0.6 * photographs.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4)  # in the gamut
    picture, variables = recolor(x, 0.06, 1, seeded())
    change = torch.tensor([0.02, -0.01, 0.015]).reshape(1, 3, 1, 1, 1)
    moved = picture({"colours": change.expand_as(variables["colours"].start)})
    expected = torch.tensor([2.0, -2.0, 3.0]).reshape(1, 3, 1, 1)
    assert torch.allclose(rgb_to_luv(moved) - rgb_to_luv(x), expected.expand_as(x), atol=0.05)


def test_equal_colours_stay_equal(photographs) -> None:
    for x in (photographs[:4], photographs[:4].mean(1, keepdim=True)):
        doubled = torch.cat([x, x.flip(3)], 3)
        picture, variables = recolor(doubled, 0.06, 1, seeded())
        image = picture({"colours": variables["colours"].start})
        assert torch.allclose(image[..., 32:].flip(3), image[..., :32], atol=1e-5)
        assert (image - doubled).abs().max() > 0.02
        change = image - doubled
        assert change.abs().max() < 0.5


def test_grey_has_a_curve_of_its_own() -> None:
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 1, 64)
    picture, variables = recolor(ramp, 0.1, 1, seeded())
    lighter = picture({"colours": variables["colours"].ball.bounds[1]})
    assert ((lighter > ramp) | (lighter == 1)).all()
    assert lighter.diff().min() > -1e-6


# JPEG


def test_dct_there_and_back() -> None:
    matrix = dct_matrix()
    x = torch.rand(5, 8, 8)
    assert torch.allclose(matrix.T @ (matrix @ x @ matrix.T) @ matrix, x, atol=1e-6)


def test_a_coefficient_is_what_a_decoder_makes_of_it() -> None:
    """The 9th coefficient of the second block, against SciPy's inverse transform."""
    x = torch.full((1, 1, 8, 16), 0.5)
    picture, variables = jpeg_linf(x, 1.0, 1, seeded())
    coefficients = torch.zeros_like(variables["coefficients"].start)
    coefficients[0, 64 + 8] = 1
    change = picture({"coefficients": coefficients}) - x
    block = np.zeros((8, 8))
    block[1, 0] = _LUMA[1][0] / 2 / 255
    assert (change[..., :8] == 0).all()
    assert np.allclose(change[0, 0, :, 8:], idctn(block, norm="ortho"), atol=1e-6)


def test_chroma_is_coarse_and_keeps_luma() -> None:
    x = torch.full((1, 3, 16, 16), 0.5)
    picture, variables = jpeg_linf(x, 1.0, 1, seeded())
    coefficients = torch.zeros_like(variables["coefficients"].start)
    coefficients[:, 256:] = 2 * torch.rand(1, 128) - 1
    change = picture({"coefficients": coefficients}) - x
    halves = change.reshape(1, 3, 8, 2, 8, 2)
    assert (halves - halves[..., :1, :, :1]).abs().max() < 1e-6
    luma = (change * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(1)
    assert luma.abs().max() < 1e-5 < 0.01 < change.abs().max()


# The L1 ball


def nearest_in_l1(v: np.ndarray[Any, Any], radius: float) -> np.ndarray[Any, Any]:
    """Duchi et al., 2008, in a plain loop."""
    if np.abs(v).sum() <= radius:
        return v
    total, shrink = 0.0, 0.0
    for count, size in enumerate(sorted(np.abs(v), reverse=True), start=1):
        total += size
        if size >= (total - radius) / count:
            shrink = (total - radius) / count
    return np.sign(v) * np.maximum(np.abs(v) - shrink, 0)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-9, 9, width=32), min_size=4, max_size=4), max_size=3),
    radius=st.floats(0, 20, width=32),
)
def test_l1_projection(rows, radius) -> None:
    values = torch.tensor([*rows, [0.0, 3.0, -3.0, 1e-3]])
    ball = L1Ball(torch.ones_like(values), radius)
    found = ball.project(values + 1)
    expected = 1 + np.stack([nearest_in_l1(v, radius) for v in values.double().numpy()])
    assert np.allclose(found, expected, atol=1e-5)
    assert (ball.distance(found) <= radius + 1e-5).all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.floats(0, 5),
    stride=st.floats(0.01, 1) | st.just(math.inf),
    box=st.none() | st.just((-0.5, 0.5)),
)
def test_l1_step(seed, size, stride, box) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = torch.rand(3, 2, 5, generator=generator) - 0.5
    gradient = torch.randn(3, 2, 5, generator=generator)
    ball = L1Ball(torch.zeros_like(value), 100.0, box, stride)
    move = ball.step(value, gradient, size) - value
    assert (move.abs().flatten(1).sum(1) <= size + 1e-5).all()
    assert (move.abs() <= stride + 1e-6).all()
    assert (move * gradient >= -1e-6).all()
    room = torch.full_like(move, math.inf) if box is None else 0.5 - value * gradient.sign()
    full = move.abs() >= room.clamp(max=stride) - 1e-5
    steepest = gradient.abs().where(~full, 0).flatten(1).amax(1)
    flatter = gradient.abs().flatten(1) < steepest[:, None] - 1e-6
    assert (move.abs().flatten(1)[flatter] < 1e-6).all()  # the largest entries come first


def test_l1_ball_is_filled_uniformly() -> None:
    points = unit_l1_ball((40_000, 3), seeded())
    radius = points.abs().sum(1)
    for r in (0.5, 0.8, 0.95):
        assert math.isclose((radius < r).float().mean(), r**3, abs_tol=0.01)
    assert points.mean(0).abs().max() < 0.01


# Weather and Gabor noise


def test_fog_is_smoother_than_noise_and_brightens_black() -> None:
    x = torch.zeros(8, 1, 64, 64)
    picture, variables = fog(x, 1.0, 1, seeded())
    image = picture({"octaves": variables["octaves"].start})
    assert torch.allclose(image.amax((1, 2, 3)), torch.full((8,), 0.5), atol=1e-5)
    assert image.amin((1, 2, 3)).abs().max() < 1e-6
    assert image.diff(dim=3).abs().mean() < 0.25 * (image - image.mean((2, 3), True)).abs().mean()


def test_snow_falls_in_bounded_amounts() -> None:
    ball = SnowBall(torch.zeros(2, 7, 11, 19))
    inside = ball.project(4 * torch.rand(2, 7, 11, 19) ** 4)
    assert inside.min() >= 0
    assert inside.max() <= 1
    for region in (inside[..., :8, :8], inside[..., 8:, 16:]):
        assert region.mean((2, 3)).max() <= 0.2 + 1e-6
    assert (ball.distance(inside) <= ball.radius + 1e-6).all()
    x = torch.rand(4, 3, 40, 64)
    picture, variables = snow(x, 0.5, 1, seeded())
    one = torch.zeros_like(variables["flakes"].start)
    one[:, 3, 5, 8] = 1
    none = picture({"flakes": torch.zeros_like(one)})
    seen = (picture({"flakes": one}) - none).amax(1) > 1e-4
    rows, columns = seen.any(2), seen.any(1)
    assert seen.any((1, 2)).all()
    assert not rows[:, : 5 * 4 + 2 - 6].any()
    assert not columns[:, 8 * 4 + 2 + 7 :].any()
    assert not torch.equal(seen[0], seen[1])  # each image has its own streaks


def test_gabor_noise_is_sparse_and_bounded(photographs) -> None:
    picture, variables = gabor(photographs, 0.1, 1, seeded())
    weights = variables["weights"].start
    assert weights.shape[1] == 32 * 32 // 14
    noise = picture({"weights": weights}) - photographs
    assert noise.abs().max() <= 0.1 + 1e-6
    grey = torch.full((24, 1, 32, 32), 0.5)
    picture, _ = gabor(grey, 0.1, 1, seeded())
    noise = picture({"weights": weights}) - grey
    assert torch.allclose(noise.abs().amax((1, 2, 3)), torch.full((24,), 0.1), atol=1e-5)
    again = picture({"weights": 0.1 * weights}) - grey
    assert torch.allclose(noise, again, atol=1e-5)  # it is the pattern that counts


# Perceptual balls


def two_layers(net: nn.Sequential) -> Callable[[Tensor, Tensor], Tensor]:
    return feature_distance(lambda x: [net[:2](x), net[:4](x)])


def test_the_projection_ends_just_inside(colour_net, pieces) -> None:
    x = pieces[0][:8]
    ball = PerceptualBall(x, 0.15, two_layers(colour_net))
    far = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    assert (ball.distance(far) > 0.15).all()
    found = ball.project(2 * far - 0.5)
    distances = ball.distance(found)
    assert (distances <= 0.15).all()
    assert (distances > 0.145).all()
    near = (x + 0.001 * far).clamp(0, 1)
    assert torch.allclose(ball.project(near), near, atol=1e-6)
    assert torch.equal(PerceptualBall(x, 0.0, rms).project(far), x)


def test_a_network_of_ones_own_measures(colour_net, pieces) -> None:
    x, y = pieces[0][:16], pieces[1][:16]
    space = perceptual(two_layers(colour_net))
    weak, strong = (attack(colour_net, space, budget, x, y) for budget in (0.05, 0.4))
    assert strong.last.mean() > weak.last.mean() > losses(colour_net, x, y).mean()
    assert (two_layers(colour_net)(strong.image, x) <= 0.4).all()
    assert accuracy(colour_net, strong.image, y) < 0.5


def test_alexnet_measures(pieces) -> None:
    from torchvision.models import alexnet

    x = pieces[0][:4]
    distance = alexnet_distance(alexnet().state_dict())
    assert (distance(x, x) == 0).all()
    assert (distance(x, x.flip(3)) > distance(x, 0.99 * x + 0.005)).all()
    grey = x.mean(1, keepdim=True)
    assert torch.allclose(distance(grey, x), distance(grey.expand_as(x), x), atol=1e-5)
    with pytest.raises(ValueError, match="at least 31 x 31"):
        distance(x[..., :8, :8], x[..., :8, :8])


def test_missing_weights_are_asked_for(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no way out
    with pytest.raises(FileNotFoundError, match=r"put https://.*pth into .*checkpoints"):
        lpips(torch.rand(1, 3, 32, 32), 0.5, 10, torch.rand)


def test_snow_falls_on_a_gpu_as_on_a_cpu() -> None:
    flakes, streaks = torch.rand(3, 7, 8, 9), torch.rand(3, 7, 13, 13)
    one, two = (fall(flakes, streaks) for fall in (_fallen, _fallen_in_columns))
    torch.testing.assert_close(one, two)


def test_a_gradient_that_leads_inside_is_followed_at_the_edge() -> None:
    """Only the part of it that leads out is taken away."""

    centre = torch.full((1, 1, 2, 2), 0.5)
    ball = PerceptualBall(centre, 0.2, rms)
    edge = centre + 0.2
    inwards = ball.step(edge, -torch.ones_like(edge), 0.1)
    assert torch.allclose(inwards, centre + 0.1, atol=1e-3)
    outwards = ball.step(edge, torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]), 0.1)
    assert outwards[0, 0, 0, 0] > outwards[0, 0, 1, 1]
    assert (ball.distance(outwards) <= 0.2).all()


def test_few_flakes_stay_few() -> None:
    ball = SnowBall(torch.zeros(2, 7, 8, 8))
    few = 0.1 + 0.05 * torch.rand(2, 7, 8, 8)
    assert torch.equal(ball.project(few), few)


def test_a_step_may_begin_at_the_clean_image() -> None:
    centre = torch.full((2, 1, 4, 4), 0.5)
    ball = PerceptualBall(centre, 0.2, rms)
    moved = ball.step(centre, torch.ones_like(centre), 0.1)
    assert torch.allclose(moved, centre + 0.1, atol=1e-3)


def test_each_knot_of_the_curve_moves_the_levels_around_it() -> None:
    x = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 1, 1, 3)
    picture, variables = SPACES["recolor"].space(x, 0.3, 1, torch.rand)
    still = torch.zeros_like(variables["colours"].start)
    for knot, moves in ((0, [True, False, False]), (7, [False, False, True])):
        change = still.clone()
        change[..., knot] = 0.3 if knot == 0 else -0.3
        moved = (picture({"colours": change}) - x).abs().flatten() > 0.01
        assert moved.tolist() == moves


def test_a_step_at_the_edge_goes_along_it() -> None:
    centre = torch.full((1, 1, 2, 2), 0.5)
    ball = PerceptualBall(centre, 0.2, rms)
    along = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]])
    moved = ball.step(centre + 0.2, torch.ones_like(centre) + 0.1 * along, 0.1)
    assert (moved * along).mean() > 0.05
