"""Our transforms among kornia's: in our container, in kornia's own, and around them."""

from __future__ import annotations

import kornia.augmentation as K
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from ijsat_aug import JointSpaceAdv, RobustMixup
from ijsat_aug.integrations.kornia import AugmentationSequential


@pytest.fixture
def net(network: nn.Sequential) -> nn.Sequential:
    return network.eval()


def adv(net, flow=None, **options) -> JointSpaceAdv:
    return JointSpaceAdv(net, flow, eta=None if flow else 0, eps=0.05, **options)


def container(net, flow, **options) -> AugmentationSequential:
    return AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5), adv(net, flow, steps=2), K.RandomBrightness((0.8, 1.0)),
        RobustMixup(net, num_classes=10), K.RandomErasing(p=0.5),
        **{"data_keys": ["input", "class"], **options},
    )  # fmt: skip


def test_ours_get_images_and_labels_together(net, digits, labels, flow) -> None:
    """With nothing but ours inside, it is ours: the labels of the batch are attacked."""
    x, y = digits[:12], (labels[:12] + 1) % 10  # wrong labels: an attack on predictions differs
    alone = adv(net, flow, generator=0)
    inside = AugmentationSequential(adv(net, flow, generator=0), data_keys=["input", "class"])
    out, t = inside(x, y)
    assert torch.equal(out, alone(x, y)[0])
    assert torch.equal(t, y)


def test_a_long_sequence_ends_in_mixed_labels(net, digits, labels, flow) -> None:
    augment = container(net, flow)
    out, t = augment(digits[:9], labels[:9])
    assert out.shape == (9, 1, 8, 8)
    assert t.shape == (9, 10)
    assert torch.allclose(t.sum(1), torch.ones(9))
    assert (out >= 0).all()
    assert (out <= 1).all()
    same = augment.eval()(digits[:9], labels[:9])[1]
    assert torch.equal(same, labels[:9])  # ours are the identity


def test_kornias_steps_happen_around_ours(net, digits, labels, flow) -> None:
    x, y = digits[:6], labels[:6]
    augment = AugmentationSequential(
        K.RandomHorizontalFlip(p=1.0), adv(net, random_start=False), K.RandomVerticalFlip(p=1.0),
        data_keys=["input", "class"],
    )  # fmt: skip
    expected = adv(net, random_start=False)(x.flip(3), y)[0].flip(2)
    assert torch.allclose(augment(x, y)[0], expected)


@pytest.mark.parametrize("random_apply", [False, True, 2, (1, 3)])
def test_params_replay(random_apply, net, digits, labels, flow) -> None:
    x, y = digits[:8], labels[:8]
    augment = container(net, flow, random_apply=random_apply)
    for _ in range(4):
        out, t = augment(x, y)
        params = augment._params
        again, same = augment(x, y, params=params)
        assert torch.equal(out, again)
        assert torch.equal(t, same)


def test_a_skipped_batch_stays_skipped_on_replay(net, digits, labels) -> None:
    augment = AugmentationSequential(
        RobustMixup(net, num_classes=10, p=0.5, generator=3), data_keys=["input", "class"]
    )
    kinds = set()
    for _ in range(12):
        out, t = augment(digits[:4], labels[:4])
        kinds.add(bool((out == digits[:4]).all()))
        again, same = augment(digits[:4], labels[:4], params=augment._params)
        assert torch.equal(out, again)
        assert torch.equal(t, same)
        assert t.shape == (4, 10)
    assert kinds == {True, False}


def test_masks_boxes_and_keypoints_pass_the_joint_space_attack(net, digits, labels, flow) -> None:
    x, y = digits[:4], labels[:4]
    mask = (x > 0.5).float()
    boxes = torch.tensor([[[1.0, 1.0, 5.0, 6.0]]]).repeat(4, 1, 1)
    points = torch.tensor([[[2.0, 3.0]]]).repeat(4, 1, 1)
    augment = AugmentationSequential(
        K.RandomHorizontalFlip(p=1.0), adv(net, flow),
        data_keys=["input", "mask", "bbox_xyxy", "class", "keypoints"],
    )  # fmt: skip
    out, m, b, t, k = augment(x, mask, boxes, y, points)
    assert torch.equal(m, mask.flip(3))
    assert not torch.equal(out, x.flip(3))
    assert torch.equal(t, y)
    plain = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=1.0), data_keys=["input", "bbox_xyxy", "keypoints"]
    )
    _, boxes_only, points_only = plain(x, boxes, points)
    assert torch.equal(b, boxes_only)
    assert torch.equal(k, points_only)


def test_dictionaries(net, digits, labels, flow) -> None:
    augment = container(net, flow, data_keys=None)
    out = augment({"image": digits[:4], "label": labels[:4], "path": ["a", "b", "c", "d"]})
    assert out["image"].shape == (4, 1, 8, 8)
    assert out["label"].shape == (4, 10)
    assert out["path"] == ["a", "b", "c", "d"]


def test_same_on_batch_is_one_weight_for_all(net, digits, labels) -> None:
    mix = RobustMixup(net, num_classes=10, eps=0)
    augment = AugmentationSequential(mix, data_keys=["input", "class"], same_on_batch=True)
    augment(digits[:6], labels[:6])
    assert mix.last["lam"].unique().numel() == 1
    augment.same_on_batch = False
    augment(digits[:6], labels[:6])
    assert mix.last["lam"].unique().numel() == 6


def test_without_labels_the_model_predicts(net, digits, flow) -> None:
    x = digits[:8]
    alone = adv(net, flow, random_start=False)(x)
    for kind in (AugmentationSequential, K.AugmentationSequential, K.ImageSequential):
        assert torch.equal(kind(adv(net, flow, random_start=False))(x), alone), kind


def test_around_kornias_own_containers(net, digits, labels, flow) -> None:
    geometry = K.AugmentationSequential(
        K.RandomHorizontalFlip(), K.RandomRotation(10.0), data_keys=["input", "class"]
    )
    pipeline = v2.Compose([geometry, adv(net, flow), RobustMixup(net, num_classes=10)])
    x, t = pipeline(digits[:6], labels[:6])
    loss = F.cross_entropy(net(x), t)
    assert loss.isfinite()
    assert t.shape == (6, 10)


def test_the_model_is_no_part_of_the_container(net, flow) -> None:
    augment = container(net, flow)
    assert not list(augment.parameters())
    assert len(augment.state_dict()) == 1  # of RandomBrightness
    net.train()
    augment.eval()
    assert net.training


def test_what_has_no_meaning_is_refused(net, digits, labels) -> None:
    with pytest.raises(ValueError, match="behind the container"):
        AugmentationSequential(RobustMixup(net, num_classes=10, mode="append"))
    augment = AugmentationSequential(
        RobustMixup(net, num_classes=10), data_keys=["input", "mask", "class"]
    )
    with pytest.raises(ValueError, match="blends of mask have no meaning"):
        augment(digits[:4], digits[:4], labels[:4])
    alone = AugmentationSequential(RobustMixup(net, num_classes=10))
    with pytest.raises(ValueError, match="needs labels"):
        alone(digits[:4])
