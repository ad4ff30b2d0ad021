"""Per-sample albumentations before and around our batch transforms."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ijsat_aug import JointSpaceAdv, RobustMixup
from ijsat_aug.integrations.albumentations import BatchPipeline

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
A = pytest.importorskip("albumentations", reason='needs pip install "ijsat-aug[albumentations]"')


def tensor():
    return pytest.importorskip("albumentations.pytorch").ToTensorV2()


class Photographs(Dataset):
    """Real photographs as the 8-bit arrays that albumentations takes."""

    def __init__(self, photographs, compose) -> None:
        self.arrays = (255 * photographs).byte().permute(0, 2, 3, 1).numpy()
        self.compose = compose

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index):
        return self.compose(image=self.arrays[index])["image"], index % 3


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 3)).eval()


def batch(photographs, *end):
    compose = A.Compose([A.RandomCrop(24, 24), A.HorizontalFlip(p=0.5), *end], seed=0)
    return next(iter(DataLoader(Photographs(photographs, compose), batch_size=8)))


def test_a_dataset_of_floats_feeds_ours(photographs) -> None:
    x, y = batch(photographs, A.ToFloat(max_value=255), tensor())
    out, t = RobustMixup(classifier(), num_classes=3)(x, y)
    assert out.shape == (8, 3, 24, 24)
    assert t.shape == (8, 3)


def test_a_normalised_dataset_feeds_ours(photographs) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x, y = batch(photographs, A.Normalize(mean, std), tensor())
    adv = JointSpaceAdv(classifier(), eta=0, eps=4 / 255, mean=mean, std=std)
    out, _ = adv(x, y)
    moved = (out - x) * torch.tensor(std).reshape(3, 1, 1)
    assert moved.abs().max() == pytest.approx(4 / 255, abs=1e-5)


def test_eight_bits_are_refused_with_the_fix(photographs) -> None:
    x, y = batch(photographs, tensor())  # ToTensorV2 does not scale
    with pytest.raises(TypeError, match=r"uint8.*divide 8-bit images by 255"):
        RobustMixup(classifier(), num_classes=3)(x, y)


@pytest.mark.parametrize("end", [[], ["tensor"]])
def test_a_compose_on_a_tensor_batch(end, photographs) -> None:
    flip = BatchPipeline(A.Compose([A.HorizontalFlip(p=1.0), *(tensor() for _ in end)]))
    y = torch.arange(6)
    out, same = flip(photographs[:6], y)
    assert torch.equal(out, photographs[:6].flip(3))
    assert same is y
    grey = photographs[:6, :1]
    assert torch.equal(flip(grey), grey.flip(3))
    bytes_ = (255 * photographs[:6]).byte()
    assert torch.equal(flip(bytes_), bytes_.flip(3))
    assert flip.eval()(bytes_) is bytes_


@pytest.mark.parametrize("end", [A.ToFloat(255), A.Normalize(), A.Normalize(normalization="image")])
def test_eight_bits_may_become_floats(end, photographs) -> None:
    x = (255 * photographs[:3]).byte()
    out = BatchPipeline(A.Compose([end]))(x)
    assert out.dtype == torch.float32
    expected = end(image=x[0].permute(1, 2, 0).numpy())["image"]
    assert torch.allclose(out[0].permute(1, 2, 0), torch.from_numpy(expected).float())
    assert out.std() > 0.1


def test_what_is_neither_bits_nor_float_is_refused(photographs) -> None:
    with pytest.raises(TypeError, match=r"returned torch\.uint16 images"):
        BatchPipeline(A.Compose([A.FromFloat("uint16")]))(photographs[:2])


def test_masks_and_boxes_are_not_left_behind(photographs) -> None:
    x, y = photographs[:4], torch.arange(4)
    flip = BatchPipeline(A.Compose([A.HorizontalFlip(p=1.0)]))
    mask = tv_tensors.Mask(torch.zeros(4, 32, 32))
    boxes = tv_tensors.BoundingBoxes(torch.rand(4, 4), format="XYXY", canvas_size=(32, 32))
    for batch, name in (
        (({"image": x, "mask": x[:, :1], "label": y},), "mask"),
        (((x, mask),), "Mask"),
        ((x, y, boxes), "BoundingBoxes"),
        ((x, [{"boxes": torch.rand(1, 4), "labels": y[:1]}] * 4), "boxes"),
    ):
        with pytest.raises(ValueError, match=f"images alone, and the batch has {name}"):
            flip(*batch)
    assert flip.eval()(x, mask)[1] is mask


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_stays(memory_format, photographs) -> None:
    x = photographs[:4].contiguous(memory_format=memory_format)
    for step in (A.HorizontalFlip(p=1.0), A.RandomCrop(24, 20)):
        out = BatchPipeline(A.Compose([step]))(x)
        assert out.is_contiguous(memory_format=memory_format)


def test_eight_bit_transforms_on_floats(photographs) -> None:
    pipeline = BatchPipeline(A.Compose([A.Posterize(num_bits=(3, 3), p=1.0)]), as_uint8=True)
    out = pipeline(photographs[:4])
    assert out.dtype == torch.float32
    assert out.unique().numel() <= 8
    assert (out - photographs[:4]).abs().max() < 33 / 255


def test_eight_bits_of_a_normalised_batch_are_refused(photographs) -> None:
    pipeline = BatchPipeline(A.Compose([A.NoOp()]), as_uint8=True)
    with pytest.raises(ValueError, match="before the normalisation"):
        pipeline((photographs - 0.5) / 0.25)
    with pytest.raises(ValueError, match="before the normalisation"):
        pipeline(photographs * torch.nan)


def test_seeds(photographs) -> None:
    def make(seed):
        return BatchPipeline(
            A.Compose([A.RandomBrightnessContrast(p=1.0), A.Affine(rotate=20)]), seed=seed
        )

    x = photographs[:6]
    assert torch.equal(make(3)(x), make(3)(x))
    assert not torch.equal(make(3)(x), make(4)(x))


def test_before_and_after_ours_in_one_pipeline(photographs) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)).eval()
    pipeline = v2.Compose([
        BatchPipeline(A.Compose([A.HorizontalFlip(p=0.5)]), seed=0),
        JointSpaceAdv(net, "cifar10", method="linear"),
        BatchPipeline(A.Compose([A.CoarseDropout(p=1.0)]), seed=0),
        RobustMixup(net, num_classes=3),
    ])  # fmt: skip
    x, t = pipeline(photographs[:6], torch.arange(6) % 3)
    assert x.shape == (6, 3, 32, 32)
    assert torch.allclose(t.sum(1), torch.ones(6))
    out = pipeline({"image": photographs[:6], "labels": torch.arange(6) % 3, "path": "p"})
    assert set(out) == {"image", "labels", "path"}


def test_mistakes(photographs) -> None:
    with pytest.raises(TypeError, match=r"must be an A\.Compose"):
        BatchPipeline([A.HorizontalFlip()])
    sizes = BatchPipeline(A.Compose([A.RandomScale(0.5, p=1.0)]), seed=0)
    with pytest.raises(ValueError, match="several sizes"):
        sizes(photographs[:8])
    with pytest.raises(TypeError, match="8-bit or floating"):
        BatchPipeline(A.Compose([]))((photographs[:2] * 255).long())
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        BatchPipeline(A.Compose([]))(photographs[0])


def test_a_compose_that_works_in_place_leaves_the_users_batch_alone() -> None:
    class Black(A.ImageOnlyTransform):
        def apply(self, img, **params):
            img *= 0
            return img

    x = torch.rand(2, 1, 8, 8)
    before = x.clone()
    assert BatchPipeline(A.Compose([Black(p=1)]))(x).sum() == 0
    assert torch.equal(x, before)


def test_images_of_two_units_are_no_batch() -> None:
    class Sometimes(A.ImageOnlyTransform):
        turn = 0

        def apply(self, img, **params):
            Sometimes.turn += 1
            return img if Sometimes.turn % 2 else img.astype(np.float32) / 255

    with pytest.raises(TypeError, match="8-bit images and floating ones"):
        BatchPipeline(A.Compose([Sometimes(p=1)]))(torch.randint(256, (2, 3, 8, 8)).byte())


def test_levels_are_rounded_and_come_back() -> None:
    class Same:
        def __call__(self, image):
            return {"image": image}

    levels = torch.arange(256.0).reshape(1, 1, 16, 16) / 255
    pipeline = BatchPipeline(Same(), as_uint8=True)
    assert torch.allclose(pipeline(levels), levels, atol=1e-6)
    assert torch.allclose(pipeline((levels - 0.4 / 255).clamp(0, 1)), levels, atol=1e-6)
