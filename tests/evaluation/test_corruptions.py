"""Corruptions: what they do to real images, against the formulas of others and the original's."""

from __future__ import annotations

import colorsys
import io
import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from benchmarks.real_data import cifar10
from ijsat_aug.evaluation.corruptions import (
    CORRUPTIONS,
    EXTRA,
    LARGE,
    SEVERITIES,
    SMALL,
    STANDARD,
    CorruptionFiles,
    corrupt,
    corruption_score,
    ice_pictures,
    load_pictures,
)
from ijsat_aug.evaluation.corruptions.blur import disk, jitter
from ijsat_aug.evaluation.corruptions.colour import in_colour
from ijsat_aug.evaluation.corruptions.dice import Dice
from ijsat_aug.evaluation.corruptions.digital import _look_up
from ijsat_aug.evaluation.corruptions.filters import correlate, gaussian, streak, zoom
from ijsat_aug.evaluation.corruptions.severities import parameters
from ijsat_aug.evaluation.corruptions.spatter import distance_to, equalise, outlines
from ijsat_aug.evaluation.corruptions.weather import _piece, plasma
from ijsat_aug.flows.data import load_images

RANDOM = [name for name, kind in CORRUPTIONS.items() if kind.random]

# Where more severity is not more distance, and why.
FALLS = {
    "glass_blur": "more passes replace a wider Gaussian",
    "motion_blur": "at 32 pixels severities 3 and 4 have one sigma, and tails of no weight",
    "frost": "the image loses more weight than the frost gains",
    "elastic_transform": "the affine map shrinks while the displacement grows",
    "saturate": "1 and 2 take colour away, the others add it",
}

# Mean squared distance of the first 100 test images of CIFAR-10 at each severity, as measured with
# the published code and its photographs of frost (OpenCV 4.11, ImageMagick 6.9.11).
ORIGINAL = {
    "gaussian_noise": (100.9, 223.5, 392.1, 490.7, 599.1),
    "shot_noise": (59.0, 116.9, 284.0, 375.5, 552.2),
    "impulse_noise": (203.7, 405.0, 632.9, 1031.0, 1433.3),
    "defocus_blur": (4.2, 25.7, 58.6, 100.5, 200.1),
    "glass_blur": (502.6, 482.7, 406.6, 1021.3, 881.9),
    "motion_blur": (135.3, 288.7, 433.6, 431.6, 561.9),
    "zoom_blur": (213.0, 290.5, 402.2, 526.5, 648.0),
    "snow": (176.1, 701.4, 908.5, 1727.2, 3236.2),
    "frost": (1027.4, 2305.3, 2956.8, 2584.9, 2370.0),
    "fog": (173.1, 708.2, 1169.1, 1574.8, 2234.0),
    "brightness": (106.8, 440.8, 982.9, 1711.3, 3585.0),
    "contrast": (181.4, 724.3, 1042.9, 1419.4, 2092.7),
    "elastic_transform": (1298.2, 1014.9, 894.1, 772.5, 501.9),
    "pixelate": (41.2, 67.8, 90.6, 137.2, 202.9),
    "jpeg_compression": (59.3, 89.5, 100.9, 113.4, 130.7),
    "speckle_noise": (62.7, 168.3, 237.4, 410.2, 625.2),
    "gaussian_blur": (4.0, 56.7, 92.2, 128.3, 202.5),
    "spatter": (61.3, 167.4, 361.8, 335.9, 545.9),
    "saturate": (441.3, 733.3, 192.5, 949.8, 1904.3),
}

every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)


@pytest.fixture(scope="module")
def small(photographs: Tensor) -> Tensor:
    """24 RGB pieces of photographs at 32 pixels."""
    return (photographs * 255).round().byte()


@pytest.fixture(scope="module")
def grey() -> Tensor:
    """Digits of 8 pixels."""
    return (load_images("digits", train=False).images[:8].float() * 255 / 16).byte()


@pytest.fixture(scope="module")
def full() -> Tensor:
    """Two photographs of 427 x 640."""
    from sklearn.datasets import load_sample_images

    return torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def large(full: Tensor) -> Tensor:
    """12 pieces of 128 pixels, the least that the parameters of ImageNet-C are for."""
    half = F.avg_pool2d(full.float(), 2).round().byte()
    corners = [(y, x) for y in (0, 80) for x in (0, 100, 192)]
    return torch.cat([half[..., y : y + 128, x : x + 128] for y, x in corners])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().mean())


def flat(level: int, count: int = 4) -> Tensor:
    return torch.full((count, 3, 32, 32), level, dtype=torch.uint8)


def dice(count: int = 2) -> Dice:
    return Dice(0, "any", 1, range(count), torch.empty(0, dtype=torch.float64))


def test_the_names_are_those_of_the_files_of_cifar_10_c() -> None:
    assert tuple(CORRUPTIONS) == (*STANDARD, *EXTRA)
    assert (len(STANDARD), len(EXTRA)) == (15, 4)
    for table in (SMALL, LARGE):
        assert set(table) == set(CORRUPTIONS)
        assert all(len(values) == 5 for values in table.values())


@every_corruption
def test_shapes_and_types_stay_whatever_the_size(name, grey, small, full) -> None:
    images = [
        grey, small[:2], full[:1, :, 100:324, 200:424],
        full[:1, :1, :28, :20], full[:1, :, :5, :70], full[:1, :, :1, :1],
    ]  # fmt: skip
    for image in images:
        for severity in SEVERITIES if min(image.shape[2:]) < 128 else (1, 5):
            before = image.clone()
            damaged = corrupt(image, name, severity)
            assert (damaged.shape, damaged.dtype) == (image.shape, torch.uint8)
            assert torch.equal(image, before)
    assert corrupt(small[:0], name, 1).shape == (0, 3, 32, 32)


@every_corruption
def test_damage_grows_with_severity_but_for_known_exceptions(name, small, large) -> None:
    grows = []
    for images in (small, large):
        found = [distance(corrupt(images, name, severity), images) for severity in SEVERITIES]
        assert min(found) > 1
        grows.append(all(b > a for a, b in pairwise(found)))
    assert all(grows) == (name not in FALLS), FALLS.get(name)


@every_corruption
def test_grey_images_are_damaged_as_their_colour_twins_are(name, small) -> None:
    grey = small[:, 1:2]
    for severity in SEVERITIES:
        damaged = corrupt(grey, name, severity)
        untouched = name == "saturate" and severity <= 3  # grey has no colour to take or stretch
        assert torch.equal(damaged, grey) == untouched
    if not CORRUPTIONS[name].random:
        twin = corrupt(grey.expand(-1, 3, -1, -1).contiguous(), name, 2)
        assert (twin[:, :1].int() - corrupt(grey, name, 2).int()).abs().max() <= 1


@every_corruption
def test_an_image_is_damaged_alike_in_every_batch(name, small) -> None:
    for severity in (2, 5):  # spatter: water, mud
        whole = corrupt(small, name, severity, seed=3)
        pieces = [
            corrupt(small[i : i + 7], name, severity, seed=3, first=i) for i in (0, 7, 14, 21)
        ]
        assert torch.equal(whole, torch.cat(pieces))
    assert torch.equal(corrupt(small[5:6], name, 5, seed=3, first=5), whole[5:6])


def test_more_images_than_are_worked_on_at_once(small) -> None:
    many = small.repeat(20, 1, 1, 1)
    whole = corrupt(many, "shot_noise", 2)
    assert torch.equal(whole[400:], corrupt(many[400:], "shot_noise", 2, first=400))
    assert not torch.equal(whole[:24], whole[24:48])


@every_corruption
def test_the_seed_matters_to_the_random_ones_alone(name, small) -> None:
    one, again, other = (corrupt(small, name, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    changed = (one != other).flatten(1).any(1)
    assert bool(changed.float().mean() > 0.9 if name in RANDOM else not changed.any())


def test_names_and_severities_have_noise_of_their_own() -> None:
    noise = [
        corrupt(flat(128), name, severity).double() - 128
        for name, severity in (("gaussian_noise", 1), ("gaussian_noise", 2), ("speckle_noise", 1))
    ]
    noise += [noise[0].roll(1, 0)]
    correlation = torch.corrcoef(torch.stack([n.flatten() for n in noise]))
    assert (correlation - torch.eye(4)).abs().max() < 0.05


@every_corruption
def test_global_random_numbers_and_the_default_device_are_left_alone(name, small) -> None:
    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002

    before, expected = states(), corrupt(small[:2], name, 2)
    with torch.device("meta"):  # where no tensor has values: nothing may be made there
        assert torch.equal(corrupt(small[:2], name, 2), expected)
    assert states() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_corruption
def test_a_gpu_makes_the_same_but_for_rounding(name, small, large) -> None:
    for images in (small, large):
        for severity in (1, 3, 5):
            one = corrupt(images, name, severity)
            other = corrupt(images, name, severity, device="cuda")
            assert other.is_cuda
            assert (one != other.cpu()).float().mean() < 1e-3


@pytest.fixture(scope="module")
def cifar() -> Tensor:
    """The first 100 test images of CIFAR-10."""
    return cifar10(train=False)[0][:100]


@pytest.mark.data
@every_corruption
def test_the_damage_is_that_of_the_original(name, cifar) -> None:
    for severity, published in zip(SEVERITIES, ORIGINAL[name], strict=True):
        found = distance(corrupt(cifar, name, severity), cifar)
        assert found == pytest.approx(published, rel=0.2 if name in RANDOM else 0.03, abs=0.1)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_statistics_that_the_tables_say(severity) -> None:
    index = severity - 1
    for level in (100, 160):
        x, images = level / 255, flat(level, 30)
        noise = {
            name: corrupt(images, name, severity).double() / 255 - x
            for name in ("gaussian_noise", "shot_noise", "speckle_noise", "impulse_noise")
        }
        std = {name: float(values.std()) for name, values in noise.items()}
        assert std["gaussian_noise"] == pytest.approx(SMALL["gaussian_noise"][index], rel=0.02)
        assert std["speckle_noise"] == pytest.approx(x * SMALL["speckle_noise"][index], rel=0.02)
        assert std["shot_noise"] ** 2 == pytest.approx(x / SMALL["shot_noise"][index], rel=0.06)
        # A photon is nearly a level at severity 2, hence the tolerance; and levels are cut, not
        # rounded, which is half a level down.
        assert abs(float(noise["shot_noise"].mean()) + 0.5 / 255) < 1.5e-3
        changed = noise["impulse_noise"][noise["impulse_noise"] != 0]
        share = len(changed) / noise["impulse_noise"].numel()
        assert share == pytest.approx(SMALL["impulse_noise"][index], rel=0.06)
        assert float((changed > 0).double().mean()) == pytest.approx(0.5, abs=0.05)


def test_black_stays_black_under_noise_that_light_makes() -> None:
    for name in ("shot_noise", "speckle_noise"):
        assert not corrupt(flat(0), name, 5).any()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_and_pixels_are_those_of_pillow(mode, small, full) -> None:
    channels = len(mode.replace("L", "1"))
    for images, table in ((small, SMALL), (full[:, :, :200, :300], LARGE)):
        images = images[:2, :channels]
        for severity in SEVERITIES:
            quality = table["jpeg_compression"][severity - 1]
            factor = table["pixelate"][severity - 1]
            for i, image in enumerate(images):
                array = image.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
                picture, file = Image.fromarray(array), io.BytesIO()
                picture.save(file, "JPEG", quality=quality)
                expected = torch.from_numpy(np.array(Image.open(file))).view_as(torch.tensor(array))
                found = (
                    corrupt(images, "jpeg_compression", severity)[i].permute(1, 2, 0).squeeze(-1)
                )
                assert torch.equal(found, expected)
                width, height = picture.size
                coarse = picture.resize((int(width * factor), int(height * factor)), Image.BOX)
                expected = torch.from_numpy(np.array(coarse.resize((width, height), Image.BOX)))
                found = corrupt(images, "pixelate", severity)[i].permute(1, 2, 0).squeeze(-1)
                assert torch.equal(found, expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_colours_and_contrast_are_those_of_plain_formulas(severity, small) -> None:
    x = small[::6].permute(0, 2, 3, 1).double().numpy() / 255
    means = x.mean((1, 2), keepdims=True)
    factor, more = SMALL["saturate"][severity - 1]
    added = SMALL["brightness"][severity - 1]
    brighter, richer = [], []
    for pixel in x.reshape(-1, 3):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        brighter.append(colorsys.hsv_to_rgb(hue, saturation, min(1, value + added)))
        richer.append(colorsys.hsv_to_rgb(hue, np.clip(saturation * factor + more, 0, 1), value))
    for name, expected in (
        ("brightness", np.reshape(brighter, x.shape)),
        ("saturate", np.reshape(richer, x.shape)),
        ("contrast", (x - means) * SMALL["contrast"][severity - 1] + means),
    ):
        found = corrupt(small[::6], name, severity).permute(0, 2, 3, 1).numpy()
        assert np.abs(found - np.floor(expected.clip(0, 1) * 255 + 1e-3)).max() <= 1, name
        assert (found == np.floor(expected.clip(0, 1) * 255 + 1e-3)).mean() > 0.999, name


def test_filters_are_those_of_scipy(small) -> None:
    x = small[:2, :, :24].double() / 255
    for sigma, truncate in ((0.05, 4), (0.7, 4), (3.0, 4), (20.0, 3)):
        for mode, name in (("edge", "nearest"), ("symmetric", "reflect")):
            sigmas = (0, 0, sigma, sigma)
            expected = ndimage.gaussian_filter(x.numpy(), sigmas, mode=name, truncate=truncate)
            assert np.abs(gaussian(x, sigma, mode, truncate).numpy() - expected).max() < 1e-12
    kernel = np.arange(15.0).reshape(5, 3)
    expected = ndimage.correlate(x.numpy(), kernel[None, None], mode="mirror")
    assert np.abs(correlate(x, kernel).numpy() - expected).max() < 1e-12
    for factor in (1, 1.01, 1.25, 1.75, 4.5):
        height, width = (int(np.ceil(n / factor)) for n in (24, 32))
        top, left = (24 - height) // 2, (32 - width) // 2
        part = x[..., top : top + height, left : left + width].numpy()
        grown = ndimage.zoom(part, (1, 1, factor, factor), order=1)
        top, left = (grown.shape[2] - 24) // 2, (grown.shape[3] - 32) // 2
        expected = grown[..., top : top + 24, left : left + 32]
        assert np.abs(zoom(x, factor).numpy() - expected).max() < 1e-12


def test_points_between_pixels_are_looked_up_as_scipy_does(small) -> None:
    x = small[:1, :, :24].double() / 255
    places = torch.from_numpy(np.random.default_rng(0).uniform(-20, 50, (1, 2, 24, 32)))
    for edge_twice, mode in ((True, "reflect"), (False, "mirror")):
        found = _look_up(x, places, edge_twice=edge_twice)
        for channel in range(3):
            expected = ndimage.map_coordinates(
                x[0, channel].numpy(), places[0].flip(0).numpy(), order=1, mode=mode
            )
            assert np.abs(found[0, channel].numpy() - expected).max() < 1e-9


def test_the_disk_of_a_lens_is_opencvs() -> None:
    cv2 = pytest.importorskip("cv2")
    for radius, sigma in (*SMALL["defocus_blur"], *LARGE["defocus_blur"]):
        line = np.arange(-max(8, int(radius)), max(8, int(radius)) + 1)
        whole = (line**2 + line[:, None] ** 2 <= radius**2).astype(float)
        taps = (3, 3) if radius <= 8 else (5, 5)
        expected = cv2.GaussianBlur(whole / whole.sum(), taps, sigma)
        kernel = disk(radius, sigma)
        edge = (len(expected) - len(kernel)) // 2
        assert np.allclose(np.pad(kernel, edge), expected, atol=1e-9)
    white = corrupt(flat(255), "defocus_blur", 5)
    assert torch.equal(white, flat(255))


def test_motion_is_half_a_gaussian_along_the_pixels_of_imagemagick() -> None:
    dot = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    dot[..., 10, 10] = 255
    # What ImageMagick 6.9.11 makes of a white dot with radius 6 and sigma 2.5.
    level = {(0, 0): 70, (0, -1): 64, (-1, -2): 50, (-1, -3): 34, (-2, -3): 19, (-2, -4): 9}
    right = [70, 64, 50, 34, 19, 9]
    moved = streak(dot, torch.tensor([0.0]), 6, 2.5)[0, 0]
    assert [int(moved[10, 10 - i]) for i in range(6)] == right
    down = streak(dot, torch.tensor([-90.0]), 6, 2.5)[0, 0]
    assert [int(down[10 + i, 10]) for i in range(6)] == right
    slanted = streak(dot, torch.tensor([30.0]), 6, 2.5)[0, 0]
    assert {place: int(slanted[10 + place[0], 10 + place[1]]) for place in level} == level
    assert float(slanted.sum()) == pytest.approx(255)


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_takes_pixels_one_after_the_other(reach) -> None:
    rng = np.random.default_rng(0)
    down, right = rng.integers(-reach, reach, (2, 20, 14))
    pixels = rng.permutation(20 * 14).reshape(20, 14)
    expected = pixels.copy()
    for y in range(20 - reach, reach, -1):
        for x in range(14 - reach, reach, -1):
            expected[y, x] = expected[y + down[y, x], x + right[y, x]]
    offsets = torch.from_numpy(np.stack([down, right]))
    source = jitter(offsets[:1], offsets[1:], reach)[0, 0].numpy()
    assert (pixels.flatten()[source] == expected.flatten()).all()


def test_glass_keeps_the_margin_and_the_levels(small) -> None:
    damaged = corrupt(small, "glass_blur", 1)  # whose Gaussian is of no width
    assert torch.equal(damaged[..., :2, :], small[..., :2, :])
    assert torch.equal(damaged[..., :, :2], small[..., :, :2])
    for before, after in zip(small, damaged, strict=True):
        levels = {tuple(p) for p in before.flatten(1).T.tolist()}
        assert {tuple(p) for p in after.flatten(1).T.tolist()} <= levels


def test_distances_edges_and_histograms_of_spatter() -> None:
    rng = np.random.default_rng(0)
    marked = rng.random((3, 1, 40, 50)) < np.array([0.1, 0.003, 0]).reshape(3, 1, 1, 1)
    found = distance_to(torch.from_numpy(marked)).numpy()
    for i in range(2):
        expected = ndimage.distance_transform_edt(~marked[i, 0]).clip(max=20)
        assert np.abs(found[i, 0] - expected).max() < 1e-5
    assert (found[2] == 20).all()
    levels = rng.integers(2, 15, (2, 1, 16, 16))
    levels[1] = 7  # one level has no histogram to spread
    equal = equalise(torch.from_numpy(levels).float()).numpy()
    assert (equal[1] == 7).all()
    rank = np.searchsorted(np.sort(levels[0].ravel()), levels[0], side="right").astype(float)
    assert np.abs(equal[0] - 255 * (rank - rank.min()) / (256 - rank.min())).max() <= 0.5


def test_edges_are_those_of_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for size, sigma in ((32, 0.7), (224, 3.0)):
        liquid = ndimage.gaussian_filter(rng.normal(0.65, 0.3, (size, size)), sigma)
        levels = (np.where(liquid < 0.69, 0, liquid).clip(0, 1) * 255).astype(np.uint8)
        expected = cv2.Canny(levels, 50, 150) > 0
        found = outlines(torch.from_numpy(levels).double()[None, None])[0, 0].numpy()
        assert not (found & ~expected).any()
        assert (found != expected).sum() <= 0.02 * expected.sum()


def test_spatter_is_turquoise_water_and_brown_mud() -> None:
    water, mud = (corrupt(flat(60, 8), "spatter", severity).double() for severity in (3, 4))
    drops = water[(water != 60).any(1, keepdim=True).expand_as(water)].view(-1, 3)
    assert water.min() >= 60
    assert (water[:, 0] <= water[:, 1]).all()
    assert len(drops) > 0
    wet = (mud != 60).any(1)
    assert 0.02 < float(wet.double().mean()) < 0.3
    assert (mud[:, 0][wet] > mud[:, 2][wet]).all()


def test_elastic_images_keep_their_brightness(small) -> None:
    before = small.double().mean((2, 3))
    for severity in SEVERITIES:
        moved = corrupt(small, "elastic_transform", severity).double().mean((2, 3))
        assert (moved - before).abs().mean() < 8
        assert (moved - before).mean().abs() < 2


def test_zooms_are_from_the_tables_of_the_original() -> None:
    ends = {"small": (1.06, 1.11, 1.16, 1.21, 1.26), "large": (1.11, 1.16, 1.21, 1.26, 1.31)}
    for table, name in ((SMALL, "small"), (LARGE, "large")):
        for (count, step), end in zip(table["zoom_blur"], ends[name], strict=True):
            assert np.allclose(1 + step * np.arange(count), np.arange(1, end, step))


def test_clouds_are_rough_at_every_scale_and_rougher_with_less_decay() -> None:
    smooth, rough = (plasma(dice(8), 60, decay) for decay in (3.0, 1.5))
    assert smooth.shape == (8, 64, 64)
    for clouds in (smooth, rough):
        assert torch.equal(clouds.amin((1, 2)), torch.zeros(8).double())
        assert torch.equal(clouds.amax((1, 2)), torch.ones(8).double())
    assert 2 * float(smooth.diff(dim=2).abs().mean()) < float(rough.diff(dim=2).abs().mean())


def test_fog_and_snow_brighten_and_fog_takes_contrast(small) -> None:
    dark = small // 3
    dark[:, :, 0, 0] = 255  # the brightness that fog keeps
    for name in ("fog", "snow"):
        assert corrupt(dark, name, 4).double().mean() > dark.double().mean() + 10
    assert corrupt(small, "fog", 5).amax() <= small.amax()
    details = [i.double().diff(dim=3).abs().mean() for i in (small, corrupt(small, "fog", 4))]
    assert details[1] < 0.7 * details[0]


def test_frost_of_drawings_of_tensors_and_of_a_folder(small, tmp_path: Path) -> None:
    assert all(p.shape == (3, 512, 512) and p.dtype == torch.uint8 for p in ice_pictures())
    red = torch.zeros(3, 200, 300, dtype=torch.uint8)
    red[0] = 200
    clear, ice, _ = SMALL["frost"][2]
    expected = clear * small.double()
    expected[:, 0] += ice * 200
    found = corrupt(small, "frost", 3, frost_images=[red])
    assert torch.equal(found, (expected.clamp(max=255) + 1e-3).floor().byte())
    Image.fromarray(red.permute(1, 2, 0).numpy()).save(tmp_path / "frost1.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    assert torch.equal(load_pictures(tmp_path)[0], red)
    assert torch.equal(corrupt(small, "frost", 3, frost_images=tmp_path), found)
    assert torch.equal(corrupt(small, "frost", 3, frost_images=str(tmp_path)), found)
    tiny = red[:, :10, :10]  # enlarged until it covers the image
    assert torch.equal(corrupt(small, "frost", 3, frost_images=[tiny]), found)
    drawn = corrupt(flat(0, 40), "frost", 1).double().flatten(1)
    assert len({round(float(m)) for m in drawn.mean(1)}) > 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "rain"}, ValueError, "no corruption 'rain'; there are gaussian_noise, "),
        ({"severity": 0}, ValueError, "severity must be 1, 2, 3, 4 or 5, got 0"),
        ({"severity": 6}, ValueError, "severity must be"),
        ({"severity": 2.0}, ValueError, "severity must be"),
        ({"images": torch.rand(2, 3, 8, 8)}, TypeError, r"uint8.*float32.*255 \* images"),
        ({"images": [1, 2]}, TypeError, "uint8 tensor.*list"),
        ({"images": flat(0)[0]}, ValueError, r"\(N, C, H, W\).*\(3, 32, 32\)"),
        ({"images": torch.zeros(2, 4, 8, 8).byte()}, ValueError, "1 or 3 channels"),
        ({"images": torch.zeros(2, 3, 0, 8).byte()}, ValueError, r"\(2, 3, 0, 8\)"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0"),
        ({"first": -1}, ValueError, "first must be an integer >= 0"),
        ({"frost_images": []}, ValueError, "frost_images is empty"),
        ({"frost_images": [torch.rand(3, 8, 8)]}, ValueError, r"\(3, H, W\) uint8.*float32"),
    ],
)
def test_bad_input_is_one_clear_sentence(change, error, message) -> None:
    options = {"images": flat(0), "name": "frost", "severity": 1} | change
    with pytest.raises(error, match=message):
        corrupt(**options)


def test_an_empty_folder_of_frost(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no picture of frost"):
        corrupt(flat(0), "frost", 1, frost_images=tmp_path)


NAMES = ["gaussian_noise", "contrast"]


@pytest.mark.parametrize("channels", [1, 3])
def test_files_have_the_layout_of_cifar_10_c(channels, small, tmp_path: Path) -> None:
    images, labels = small[:, :channels], torch.arange(24) % 10
    files = CorruptionFiles(tmp_path / "new" / "folder")
    assert files.names == ()
    files.write(images, labels, NAMES, seed=4)
    assert files.names == tuple(NAMES)
    assert sorted(p.name for p in files.folder.iterdir()) == [
        "contrast.npy", "corruptions.json", "gaussian_noise.npy", "labels.npy",
    ]  # fmt: skip
    array = np.load(files.folder / "gaussian_noise.npy", allow_pickle=False)
    assert (array.shape, array.dtype) == ((120, 32, 32, channels), np.uint8)
    assert np.load(files.folder / "labels.npy").tolist() == labels.tolist() * 5
    for severity in SEVERITIES:
        for name in NAMES:
            found, truth = files.read(name, severity)
            assert torch.equal(found, corrupt(images, name, severity, seed=4))
            assert torch.equal(truth, labels)
            assert (found.is_contiguous(), truth.dtype) == (True, torch.long)
    few, truth = files.read("contrast", 5, 20, 99)
    assert torch.equal(few, found[20:])
    assert torch.equal(truth, labels[20:])
    assert len(files.read("contrast", 5, 9, 3)[0]) == 0


def test_files_are_reused_and_never_mixed(small, tmp_path: Path) -> None:
    labels, files = torch.arange(24), CorruptionFiles(tmp_path)
    files.write(small, labels, NAMES)
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    files.write(small, labels, [*NAMES, "fog"])
    assert {n: t for n, t in kept.items() if (tmp_path / n).stat().st_mtime_ns != t} == {}
    assert files.names == ("gaussian_noise", "fog", "contrast")
    for wrong, change in (
        ("seed", {"seed": 1}),
        ("images", {"images": small.flip(0)}),
        ("shape, images, labels", {"images": small[:9], "labels": labels[:9]}),
        ("labels", {"labels": labels.flip(0)}),
    ):
        with pytest.raises(ValueError, match=f"written with other {wrong}; choose another folder"):
            files.ensure(**{"name": "snow", "images": small, "labels": labels} | change)
    assert "snow" not in files.names
    notes = json.loads((tmp_path / "corruptions.json").read_text())
    assert (notes["seed"], notes["shape"]) == (0, [24, 32, 32, 3])


def test_the_pictures_of_frost_are_part_of_what_a_folder_is_of(small, tmp_path: Path) -> None:
    labels, files = torch.arange(24), CorruptionFiles(tmp_path)
    (tmp_path / "frost").mkdir()
    Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / "frost" / "1.png")
    files.ensure("frost", small, labels, frost_images=tmp_path / "frost")
    assert torch.equal(
        files.read("frost", 2)[0], corrupt(small, "frost", 2, frost_images=[flat(9)[0]])
    )
    files.ensure("fog", small, labels)
    with pytest.raises(ValueError, match="other frost_images"):
        files.ensure("frost", small, labels)


def test_a_failure_leaves_nothing_half_written(small, tmp_path: Path) -> None:
    files = CorruptionFiles(tmp_path)
    with pytest.raises(RuntimeError):
        files.ensure("fog", small, torch.arange(24), device="cuda:99")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corruptions.json", "labels.npy"]
    files.ensure("fog", small, torch.arange(24))
    assert files.names == ("fog",)


@pytest.mark.parametrize("flat_grey", [False, True])
def test_an_official_folder_is_read_as_it_is(flat_grey, small, tmp_path: Path) -> None:
    channels = 1 if flat_grey else 3
    images, labels = small[:, :channels], torch.arange(24)
    array = np.random.default_rng(0).integers(0, 256, (120, 32, 32, channels), dtype=np.uint8)
    np.save(tmp_path / "fog.npy", array[..., 0] if flat_grey else array)
    np.save(tmp_path / "labels.npy", np.tile(labels.numpy().astype(np.uint8), 5))
    files = CorruptionFiles(tmp_path)
    found, truth = files.read("fog", 4, 2, 6)
    assert torch.equal(found, torch.from_numpy(array[74:78]).permute(0, 3, 1, 2))
    assert truth.tolist() == [2, 3, 4, 5]
    files.ensure("fog", images, labels)
    files.ensure("fog", images[:5], labels[:5])  # the first of them
    with pytest.raises(ValueError, match=r"has no snow.npy, and what it has was not written here"):
        files.ensure("snow", images, labels)
    with pytest.raises(ValueError, match=r"holds \(120, .*choose another folder"):
        files.ensure("fog", images[..., :16], labels)
    with pytest.raises(ValueError, match=r"labels in .* are not those of the data set"):
        files.ensure("fog", images, labels.flip(0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fog.npy", "labels.npy"]


def test_files_that_are_missing_or_wrong(small, tmp_path: Path) -> None:
    files = CorruptionFiles(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no .*fog.npy; write it with"):
        files.read("fog", 1)
    np.save(tmp_path / "labels.npy", np.zeros(10))
    np.save(tmp_path / "fog.npy", np.zeros((10, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"float64.*expected uint8"):
        files.read("fog", 1)
    np.save(tmp_path / "fog.npy", np.zeros((12, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"expected uint8 .5 N"):
        files.read("fog", 1)
    np.save(tmp_path / "fog.npy", np.zeros((15, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"15 images of fog, but labels of shape \(10,\)"):
        files.read("fog", 1)
    with pytest.raises(ValueError, match="severity must be"):
        files.read("fog", 6)
    with pytest.raises(ValueError, match="one label for each, got 24 images"):
        files.ensure("fog", small, torch.arange(3))


def test_the_mean_corruption_error() -> None:
    accuracies = {"fog": [0.9, 0.8, 0.7, 0.6, 0.5], "snow": [1.0, 1.0, 0.9, 0.9, 0.7]}
    score = corruption_score(accuracies)
    assert score.accuracy == pytest.approx(0.8)
    assert score.mce == pytest.approx(20)
    assert score.errors == pytest.approx({"fog": 30, "snow": 10})
    baseline = {"fog": [0.5] * 5, "snow": [0.1, 0.2, 0.3, 0.2, 0.2], "frost": [1.0] * 5}
    relative = corruption_score(accuracies, baseline)
    assert relative.errors == pytest.approx({"fog": 60, "snow": 50})  # 1.5 / 2.5 and 0.5 / 1
    assert relative.mce == pytest.approx(55)
    assert relative.accuracy == score.accuracy
    for wrong, message in (
        (({},), "accuracies must have values"),
        (({"fog": [90.0]},), r"values in \[0, 1\]"),
        ((accuracies, {"fog": [0.5] * 5}), r"as many errors as accuracies of \['snow'\]"),
        ((accuracies, baseline | {"fog": [0.0] * 5}), "no error on fog"),
    ):
        with pytest.raises(ValueError, match=message):
            corruption_score(*wrong)


def test_a_piece_ends_with_its_severity(tmp_path: Path) -> None:
    files = CorruptionFiles(tmp_path)
    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    files.write(images, torch.arange(5), ["contrast"])
    whole, _ = files.read("contrast", 2)
    for begin, end in ((3, 9), (-2, None), (4, 1), (1, -1)):
        piece, truth = files.read("contrast", 2, begin, end)
        assert torch.equal(piece, whole[begin:end])
        assert torch.equal(truth, torch.arange(5)[begin:end])


def test_of_the_six_pictures_of_the_original_five_are_drawn_from(tmp_path: Path) -> None:
    for i in range(1, 7):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"frost{i}.png")
    assert [int(picture.max()) for picture in load_pictures(tmp_path)] == [1, 2, 3, 4, 5]
    (tmp_path / "frost6.png").rename(tmp_path / "more.png")
    assert len(load_pictures(tmp_path)) == 6


def test_files_of_fewer_images_are_of_other_data(tmp_path: Path) -> None:
    np.save(tmp_path / "fog.npy", np.zeros((5 * 4, 8, 8, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.tile(np.arange(4), 5))
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    labels = torch.arange(6) % 4
    with pytest.raises(ValueError, match=r"holds \(20, .*choose another folder"):
        CorruptionFiles(tmp_path).ensure("fog", images, labels)


def test_snow_falls_from_both_sides() -> None:
    black = torch.zeros(2, 1, 40, 32, dtype=torch.uint8)
    for severity in (1, 5):
        snow = corrupt(black, "snow", severity).int()
        assert (snow - snow.flip(-2, -1)).abs().max() <= 1
        assert snow.max() > 50


def test_a_piece_of_frost_reaches_the_edge() -> None:
    sheet = torch.arange(30.0).reshape(1, 5, 6)
    x = torch.zeros(1, 1, 3, 3)
    assert torch.equal(_piece(sheet, (0.0, 0.0), x), sheet[:, :3, :3])
    assert torch.equal(_piece(sheet, (0.999, 0.999), x), sheet[:, 2:, 3:])


def test_the_shorter_side_tells_small_images_from_large_ones() -> None:
    assert parameters("fog", 1, 100, 300) == parameters("fog", 1, 300, 100) == SMALL["fog"][0]
    assert parameters("fog", 1, 128, 300) == LARGE["fog"][0]


def test_grey_images_are_grey_of_colours_that_there_are() -> None:
    reddened = in_colour(lambda x: x * torch.tensor([2.0, 0.0, 0.0]).view(3, 1, 1))
    assert torch.allclose(reddened(torch.ones(1, 1, 2, 2)), torch.tensor(0.299))
