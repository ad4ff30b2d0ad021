"""Training images from folders, arrays, torchvision and scikit-learn."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image

from ijsat_aug.flows.data import load_images


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)


def test_digits_have_a_training_and_a_test_part_without_overlap() -> None:
    train, test = load_images("digits"), load_images("digits", train=False)
    assert (len(train.images), len(test.images)) == (1500, 297)
    assert train.bins == 17
    assert int(train.images.max()) == 16
    seen = {bytes(i.numpy()) for i in train.images}
    assert not any(bytes(i.numpy()) in seen for i in test.images)


def test_a_folder_called_digits_does_not_hide_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    assert load_images("digits").bins == 17
    with pytest.raises(ValueError, match="holds no image"):
        load_images("./digits")


def test_a_folder_with_classes(tmp_path: Path, pictures: np.ndarray) -> None:
    for i, picture in enumerate(pictures):
        folder = tmp_path / ("cat" if i % 2 else "dog")
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / f"{i}.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    data = load_images(tmp_path)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.classes == ("cat", "dog")
    order = [1, 3, 5, 0, 2, 4]
    assert torch.equal(data.images, torch.from_numpy(pictures[order]).permute(0, 3, 1, 2))


def test_a_folder_of_mixed_sizes_needs_a_size(tmp_path: Path, pictures: np.ndarray) -> None:
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    Image.fromarray(pictures[1][:7]).save(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match="differ in size; give one"):
        load_images(tmp_path)
    data = load_images(tmp_path, size=6)
    assert data.images.shape == (2, 3, 6, 6)
    assert data.labels is None


def test_grey_and_colour_pictures_mix(tmp_path: Path, pictures: np.ndarray) -> None:
    Image.fromarray(pictures[0, :, :, 0]).save(tmp_path / "grey.png")
    Image.fromarray(pictures[1, :, :, 0]).save(tmp_path / "other.png")
    assert load_images(tmp_path).images.shape == (2, 1, 8, 10)
    Image.fromarray(pictures[0]).save(tmp_path / "colour.png")
    assert load_images(tmp_path).images.shape == (3, 3, 8, 10)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_arrays_of_every_layout(tmp_path: Path, pictures: np.ndarray, layout: str) -> None:
    array = {
        "NHWC": pictures,
        "NCHW": pictures.transpose(0, 3, 1, 2),
        "NHW": pictures[..., 0],
    }[layout]
    np.save(tmp_path / "x.npy", array)
    images = load_images(tmp_path / "x.npy").images
    assert images.is_contiguous()
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    assert torch.equal(images, expected[:, :1] if layout == "NHW" else expected)


def test_npz_with_labels(tmp_path: Path, pictures: np.ndarray) -> None:
    np.savez(tmp_path / "x.npz", images=pictures, labels=np.arange(6, dtype=np.uint8))
    data = load_images(tmp_path / "x.npz")
    assert data.labels is not None
    assert data.labels.tolist() == list(range(6))
    np.savez(tmp_path / "y.npz", pictures)
    assert load_images(tmp_path / "y.npz").labels is None


def test_an_archive_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_images(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((4, 8, 8), np.float32), TypeError, "save the images as uint8"),
        (np.zeros((4, 8), np.uint8), ValueError, "expected"),
        (np.zeros((4, 9, 8, 8), np.uint8), ValueError, "at most 4 channels"),
        (np.zeros((0, 8, 8), np.uint8), ValueError, "holds no images"),
    ],
)
def test_arrays_that_are_no_images(
    tmp_path: Path, array: np.ndarray, error: type[Exception], message: str
) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(error, match=message):
        load_images(tmp_path / "x.npy")


def test_archives_that_do_not_fit(tmp_path: Path, pictures: np.ndarray) -> None:
    np.savez(tmp_path / "x.npz", images=pictures, labels=np.arange(5))
    with pytest.raises(ValueError, match="6 images but 5 labels"):
        load_images(tmp_path / "x.npz")
    np.savez(tmp_path / "two.npz", train_images=pictures, test_images=pictures[:2])
    with pytest.raises(ValueError, match="holds no array 'images'"):
        load_images(tmp_path / "two.npz")
    np.savez(tmp_path / "one.npz", pictures=pictures, labels=np.arange(6))
    assert load_images(tmp_path / "one.npz").labels is not None
    np.savez(tmp_path / "none.npz", labels=np.arange(6, dtype=np.uint8))
    with pytest.raises(ValueError, match="holds no array 'images'"):
        load_images(tmp_path / "none.npz")
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(ValueError, match="holds no array"):
        load_images(tmp_path / "empty.npz")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_images(tmp_path / "none.npy")


def test_arrays_are_resized_too(tmp_path: Path, pictures: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", pictures)
    assert load_images(tmp_path / "x.npy", size=6).images.shape == (6, 3, 6, 6)


def test_pictures_of_sixteen_bits_are_refused(tmp_path: Path) -> None:
    for i in range(2):
        deep = np.full((8, 8), 40_000, dtype=np.uint16)
        Image.fromarray(deep).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"\.png is a picture of more than 8 bits"):
        load_images(tmp_path)


def test_a_damaged_picture_is_named_and_hidden_files_are_none(
    tmp_path: Path, pictures: np.ndarray
) -> None:
    for i in range(3):
        Image.fromarray(pictures[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "._0.png").write_bytes(b"of macOS")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    Image.fromarray(pictures[0]).save(tmp_path / ".ipynb_checkpoints" / "0-checkpoint.png")
    assert len(load_images(tmp_path).images) == 3
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:90])
    with pytest.raises(ValueError, match=r"1\.png cannot be read as a picture"):
        load_images(tmp_path)


def test_what_cannot_be_downloaded_is_told(tmp_path: Path, monkeypatch) -> None:
    def urlopen(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    for name in ("CIFAR10", "FashionMNIST", "QMNIST"):  # each fails in another way
        with pytest.raises(ValueError, match=f"{name} is not in .* cannot be downloaded"):
            load_images(name, root=tmp_path)


def test_sources_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a file or folder that exists"):
        load_images("CIFAR11")
    with pytest.raises(ValueError, match="say where torchvision's CIFAR10 lies"):
        load_images("CIFAR10")
    with pytest.raises(ValueError, match="holds no image"):
        load_images(tmp_path)


def test_a_torchvision_dataset(tmp_path: Path) -> None:
    _write_fashion_mnist(tmp_path)
    data = load_images("FashionMNIST", root=tmp_path)
    test = load_images("FashionMNIST", root=tmp_path, train=False)
    assert data.images.shape == (3, 1, 28, 28)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2]
    assert len(test.images) == 2


def _write_fashion_mnist(root: Path) -> None:
    """torchvision's own raw layout (IDX files), with other pictures."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 3), ("t10k", 2)):
        pixels = bytes(range(256)) * (28 * 28 * count // 256 + 1)
        header = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels[: count * 784])
        header = b"\x00\x00\x08\x01" + count.to_bytes(4, "big")
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + bytes(range(count)))


def test_the_split_is_replayable_and_complete() -> None:
    data = load_images("digits")
    (a, b), (c, _) = data.split(0.1, seed=1), data.split(0.1, seed=1)
    assert torch.equal(a.images, c.images)
    assert (len(a.images), len(b.images)) == (1350, 150)
    assert not torch.equal(a.images, data.split(0.1, seed=2)[0].images)
    assert int(a.images.sum()) + int(b.images.sum()) == int(data.images.sum())


@pytest.mark.parametrize(
    ("known", "train", "taken"),
    [
        (("train", "test"), True, "train"),
        (("trainval", "test"), True, "trainval"),
        (("train", "val"), False, "val"),
        (("letters", "balanced"), True, None),
    ],
)
def test_splits_have_several_names(known, train, taken, tmp_path, monkeypatch) -> None:
    """ImageNet and OxfordIIITPet do not call theirs as CIFAR-10 does; EMNIST's are none."""

    class Odd:
        def __init__(self, root, split: str) -> None:
            if split not in known:
                raise ValueError(f"Unknown value {split!r} for argument split.")
            self.split = split

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int):
            return Image.new("L", (8, 8), 100 if self.split == taken else 0), index

    monkeypatch.setattr("torchvision.datasets.Odd", Odd, raising=False)
    if taken is None:
        with pytest.raises(ValueError, match="Odd cannot be loaded by its name alone"):
            load_images("Odd", root=tmp_path, train=train)
    else:
        assert (load_images("Odd", root=tmp_path, train=train).images == 100).all()


def test_processes_that_were_launched_together_download_one_after_the_other(
    tmp_path, monkeypatch
) -> None:
    class Odd:
        def __init__(self, root, download: bool) -> None:
            assert download
            with pytest.raises(Timeout), FileLock(root / ".ijsat-aug.lock", timeout=0):
                pass

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int):
            return Image.new("L", (8, 8)), index

    monkeypatch.setattr("torchvision.datasets.Odd", Odd, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    root = tmp_path / "new"
    assert len(load_images("Odd", root=root).images) == 2
    with FileLock(root / ".ijsat-aug.lock", timeout=0):  # it is free again
        pass
    (root / ".ijsat-aug.lock").unlink()
    (root / ".ijsat-aug.lock").mkdir()  # which nobody can lock
    monkeypatch.setattr(Odd, "__init__", lambda self, root, download: None)
    assert len(load_images("Odd", root=root).images) == 2


def test_of_a_folder_no_more_pictures_are_read_than_picked(tmp_path: Path, pictures) -> None:
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for i in range(3):
            file = tmp_path / kind / f"{i}.png"
            Image.fromarray(pictures[i]).save(file) if i == 1 else file.write_bytes(b"")
    data = load_images(tmp_path, pick=lambda count: torch.tensor([1, count - 2]))
    assert len(data.images) == 2
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1]
    assert data.classes == ("cat", "dog")
    Image.new("L", (10, 8)).save(tmp_path / "cat" / "1.png")
    grey = load_images(tmp_path, pick=lambda count: torch.tensor([1]))
    assert grey.images.shape == (1, 3, 8, 10)  # as the others are
    with pytest.raises(ValueError, match="pick is for folders"):
        load_images("digits", pick=lambda count: torch.arange(count))


def test_a_single_picture_is_no_data_set(tmp_path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is a single picture; name the folder"):
        load_images(tmp_path / "a.png")


def test_links_to_folders_are_followed_and_not_round_in_circles(tmp_path: Path, pictures) -> None:
    real = tmp_path / "elsewhere" / "cats"
    folder = tmp_path / "data"
    for place in (real, folder / "dog"):
        place.mkdir(parents=True)
        Image.fromarray(pictures[0]).save(place / "a.png")
    (folder / "cat").symlink_to(real)
    (folder / "dog" / "up").symlink_to(folder)
    data = load_images(folder)
    assert data.classes == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1]


def test_arrays_that_cannot_be_read_are_told_by_their_file(tmp_path: Path, pictures) -> None:
    objects, empty, rotten = (tmp_path / n for n in ("objects.npz", "empty.npy", "rotten.npz"))
    np.savez(objects, images=np.array([{"a": 1}], dtype=object))
    empty.touch()
    np.savez(rotten, images=pictures)
    whole = bytearray(rotten.read_bytes())
    whole[len(whole) // 2] ^= 255
    rotten.write_bytes(whole)
    for path in (objects, empty, rotten):
        with pytest.raises(ValueError, match=rf"{path.name} is damaged, or holds objects"):
            load_images(path)


def test_a_picture_that_pillow_finds_too_large_is_named(tmp_path: Path, monkeypatch) -> None:
    Image.new("L", (40, 40)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"huge\.png cannot be read as a picture"):
        load_images(tmp_path)
