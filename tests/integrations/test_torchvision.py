"""Among torchvision's v2 transforms: Compose, RandomApply, RandomChoice, tv_tensors, CutMix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from ijsat_aug import AugmentedLoader, JointSpaceAdv, RobustMixup


def ours(net: nn.Sequential) -> list:
    return [JointSpaceAdv(net, "digits", eps=0.05), RobustMixup(net, num_classes=10, eps=0.05)]


@pytest.mark.parametrize("kind", [torch.Tensor, tv_tensors.Image])
@pytest.mark.parametrize("shape", ["two", "tuple", "dict", "more"])
def test_in_compose(kind, shape, net, digits, labels) -> None:
    x, y = digits[:6].as_subclass(kind), labels[:6]
    pipeline = v2.Compose([v2.RandomHorizontalFlip(p=0.5), *ours(net)])
    if shape == "dict":
        out = pipeline({"image": x, "labels": y, "path": ["a"] * 6})
        image, t = out["image"], out["labels"]
        assert out["path"] == ["a"] * 6
    elif shape == "more":
        image, t, index = pipeline((x, y, "index"))
        assert index == "index"
    else:
        image, t = pipeline(x, y) if shape == "two" else pipeline((x, y))
    assert type(image) is kind
    assert image.shape == (6, 1, 8, 8)
    assert t.shape == (6, 10)


def test_in_random_apply(net, digits, labels) -> None:
    x, y = digits[:5], labels[:5]
    sometimes = v2.RandomApply([ours(net)[0]], p=0.5)
    seen = {bool(torch.equal(sometimes(x, y)[0], x)) for _ in range(20)}
    assert seen == {True, False}


def test_in_random_choice(net, digits, labels) -> None:
    either = v2.RandomChoice([RobustMixup(net, num_classes=10), v2.CutMix(num_classes=10)])
    for _ in range(6):
        x, t = either(digits[:5], labels[:5])
        assert torch.allclose(t.sum(1), torch.ones(5))
        assert x.shape == (5, 1, 8, 8)


@pytest.mark.parametrize("theirs", [v2.CutMix, v2.MixUp])
@pytest.mark.parametrize("place", ["before", "after"])
def test_beside_their_mixing(theirs, place, net, digits, labels) -> None:
    """Soft labels in, soft labels out."""
    chain = [theirs(num_classes=10), *ours(net)]
    chain = chain if place == "before" else [*chain[1:], chain[0]]
    torch.manual_seed(3)  # CutMix draws a box that holds some pixels
    x, t = v2.Compose(chain)(digits[:40], labels[:40])
    assert x.shape == (40, 1, 8, 8)
    assert torch.allclose(t.sum(1), torch.ones(40))
    assert (t > 0).sum(1).max() > 2  # two mixings


def test_masks_and_boxes_are_not_blended(net, digits, labels) -> None:
    x, y = digits[:4], labels[:4]
    adv, mix = ours(net)
    mask = tv_tensors.Mask(torch.zeros(4, 8, 8))
    boxes = tv_tensors.BoundingBoxes(torch.rand(4, 4), format="XYXY", canvas_size=(8, 8))
    for batch, name in (
        ((x, y, mask), "Mask"),
        (((x, y, boxes),), "BoundingBoxes"),
        (({"image": x, "label": y, "masks": mask},), "masks"),
        (({"image": x, "label": y, "Keypoints": torch.rand(4, 3, 2)},), "Keypoints"),
        (({"image": x, "label": y, "bboxes": boxes, "mask": x},), "bboxes, mask"),
    ):
        with pytest.raises(ValueError, match=f"blends of {name} have no meaning"):
            mix(*batch)
        adv(*batch)
        assert mix.eval()(*batch)
        mix.train()
    assert adv({"image": x, "label": y, "mask": mask})["mask"] is mask


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_masks_of_an_appended_batch_move_with_their_images(p) -> None:
    x, net = torch.rand(2, 3, 8, 8), nn.Conv2d(3, 2, 1)
    mask = (x[:, 0] > 0.5).long()

    def of_pixels(logits: Tensor, masks: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, masks, reduction="none").mean((1, 2))

    attack = JointSpaceAdv(net, eta=0, objective=of_pixels, mode="append", labels_getter="mask")
    flip = v2.RandomHorizontalFlip(p=1.0)
    batch = {"image": tv_tensors.Image(x), "mask": tv_tensors.Mask(mask)}
    loader = AugmentedLoader([batch], attack, "cpu", epochs=(0, None) if p else (1, None))
    (out,) = loader
    assert isinstance(out["mask"], tv_tensors.Mask)
    out = flip(out)
    assert torch.equal(out["image"][:2].as_subclass(Tensor), x.flip(-1))
    assert torch.equal(out["mask"].as_subclass(Tensor), torch.cat([mask, mask]).flip(-1))
