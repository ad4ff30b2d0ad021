"""The gallery: what it shows is what the attacks did."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn

from ijsat_aug.gallery import draw, gallery
from ijsat_aug.transforms.scale import Scale


def test_the_columns_are_the_attacks(network, digits, labels, flow) -> None:
    x, y = digits[:40], labels[:40]
    modes = [m.training for m in network.modules()]
    columns = gallery(network, x, y, flow, eps=0.1, eta=0.1)
    assert [m.training for m in network.modules()] == modes
    by_title = {c.title: c for c in columns}
    assert list(by_title) == ["clean", "latent move", "pixel move ×10", "joint", "attacked blend"]
    loss = {title: float(c.losses.mean()) for title, c in by_title.items()}
    assert loss["clean"] < loss["latent move"] < loss["joint"]
    assert loss["clean"] < loss["pixel move ×10"] < loss["joint"]
    assert torch.equal(by_title["clean"].pictures, x)
    assert (by_title["latent move"].pictures - x).abs().max() > 0.05
    enlarged = by_title["pixel move ×10"].pictures - 0.5
    assert enlarged.abs().max() == 0.5  # ten times 0.1, cut at the range
    blend = by_title["attacked blend"]
    assert (blend.truth.sum(1) - 1).abs().max() < 1e-6
    other = y != y.roll(1)
    assert torch.allclose(blend.truth[other].amax(1), torch.tensor(0.6))
    assert not blend.fooled[blend.predictions == y].any()
    assert blend.fooled[(blend.predictions != y) & (blend.predictions != y.roll(1))].all()


def test_a_normalised_model_without_a_flow_or_labels(network, digits) -> None:
    network.eval()
    scale = Scale.of([0.5], [0.25])
    normalised = nn.Sequential(_Denormalise(), network)
    plain = gallery(network, digits[:8])
    other = gallery(normalised, digits[:8], mean=[0.5], std=[0.25])
    assert [c.title for c in plain] == ["clean", "pixel move ×10", "attacked blend"]
    assert not plain[0].fooled.any()  # its own predictions are the labels
    for one, two in zip(plain, other, strict=True):
        assert torch.allclose(one.pictures, two.pictures, atol=1e-5)
        assert torch.allclose(one.losses, two.losses, atol=1e-3)
    assert scale.mean == (0.5,)


class _Denormalise(nn.Module):
    def forward(self, x):
        return 0.5 + 0.25 * x


def test_the_picture_is_whole_or_absent(network, digits, labels, tmp_path, monkeypatch) -> None:
    columns = gallery(network, digits[:3], labels[:3])
    draw(columns, tmp_path / "a" / "picture.png", classes=[f"class {i}" for i in range(10)])
    with Image.open(tmp_path / "a" / "picture.png") as picture:
        assert picture.size[0] > 400
    before = (tmp_path / "a" / "picture.png").read_bytes()
    figure = pytest.importorskip("matplotlib.figure")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(figure.Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(columns, tmp_path / "a" / "picture.png")
    assert (tmp_path / "a" / "picture.png").read_bytes() == before
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_an_uncalibrated_flow_needs_a_radius(network, digits, labels) -> None:
    class Same:
        shape, latent_dim = (1, 8, 8), 64

        def encode(self, x):
            return x.flatten(1)

        def decode(self, z):
            return z.unflatten(1, (1, 8, 8))

    with pytest.raises(ValueError, match="eta="):
        gallery(network, digits[:2], labels[:2], Same())
    assert len(gallery(network, digits[:2], labels[:2], Same(), eta=0.1)) == 5


def test_grey_pictures_are_as_bright_as_they_are(network, tmp_path) -> None:
    columns = gallery(network, torch.zeros(1, 1, 8, 8))[:1]
    for ink, middle in ((False, 0), (True, 255)):
        draw(columns, tmp_path / "a.png", ink=ink)
        with Image.open(tmp_path / "a.png") as picture:
            grey = picture.convert("L")
            assert grey.getpixel((grey.width // 2, grey.height // 2)) == middle


def test_long_names_stay_below_their_picture(tmp_path, network, digits, labels) -> None:
    from ijsat_aug.gallery import _caption

    names = ["automobile", "a very long name of a class", *"abcdefgh"]
    columns = gallery(network, digits[:2], torch.tensor([0, 1]))
    lines = [line for c in columns for i in range(2) for line in _caption(c, i, names).split("\n")]
    assert max(map(len, lines)) <= 32
    assert any("a very long…" in line for line in lines)
    draw(columns, tmp_path / "a.png", names, truth="its prediction")
    with pytest.raises(ValueError, match=r"would be a PNG file: call it a\.png"):
        draw(columns, tmp_path / "a.jpg")
