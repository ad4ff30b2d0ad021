"""Our transforms among kornia's: in our container, in kornia's own, and around them."""

from __future__ import annotations

import copy
import pickle

import kornia.augmentation as K
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from ijsat_aug import JointSpaceAdv, RobustMixup
from ijsat_aug.integrations.kornia import AugmentationSequential


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
    mix(digits[:6], labels[:6])  # outside of the container it is what it was
    assert mix.last["lam"].unique().numel() == 6
    augment.same_on_batch = False
    augment(digits[:6], labels[:6])
    assert mix.last["lam"].unique().numel() == 6


@pytest.mark.parametrize("same", [False, True, None])
def test_same_on_batch_keeps_the_weight_of_who_wants_one(same, net, digits, labels) -> None:
    mix = RobustMixup(net, num_classes=10, eps=0, per_sample=False)
    augment = AugmentationSequential(mix, data_keys=["input", "class"], same_on_batch=same)
    augment(digits[:6], labels[:6])
    assert mix.last["lam"].unique().numel() == 1
    with pytest.raises(ValueError, match="num_classes=10 allows"):
        augment(digits[:6], labels[:6] + 10)
    assert not mix.per_sample


@pytest.mark.parametrize("options", [{"draws": 4}, {"lam_steps": 2}])
def test_same_on_batch_is_not_for_chosen_weights(options, net, digits, labels) -> None:
    mix = RobustMixup(net, num_classes=10, **options)
    message = "draws and lam_steps choose one for each sample"
    with pytest.raises(ValueError, match=message):
        AugmentationSequential(mix, data_keys=["input", "class"], same_on_batch=True)
    augment = AugmentationSequential(mix, data_keys=["input", "class"])
    augment.same_on_batch = True
    with pytest.raises(ValueError, match=message):
        augment(digits[:4], labels[:4])
    assert mix.per_sample


def test_without_labels_the_model_predicts(net, digits, flow) -> None:
    x = digits[:8]
    alone = adv(net, flow, random_start=False)(x)
    for kind in (AugmentationSequential, K.AugmentationSequential, K.ImageSequential):
        assert torch.equal(kind(adv(net, flow, random_start=False))(x), alone), kind


@pytest.mark.parametrize("kind", [K.AugmentationSequential, K.ImageSequential])
def test_inside_kornias_own_containers(kind, net, digits, flow) -> None:
    """They hand over the image alone, also to our container."""
    x = digits[:6]
    attack = adv(net, flow, random_start=False)
    inner = AugmentationSequential(K.RandomHorizontalFlip(p=1.0), attack)
    outer = kind(inner, K.RandomVerticalFlip(p=1.0))
    out = outer(x)
    assert torch.allclose(out, attack(x.flip(3)).flip(2))
    assert torch.allclose(outer(x, params=outer._params), out)
    assert torch.equal(outer.eval()(x), x.flip(3).flip(2))
    with pytest.raises(ValueError, match=r"kornia.AugmentationSequential .* \"class\" among"):
        kind(RobustMixup(net, num_classes=10))(x)


def test_masks_around_our_container(net, digits, flow) -> None:
    inner = AugmentationSequential(K.RandomHorizontalFlip(p=1.0), adv(net, flow))
    outer = K.AugmentationSequential(inner, data_keys=["input", "mask"])
    mask = (digits[:4] > 0.5).float()
    out, moved = outer(digits[:4], mask)
    assert torch.equal(moved, mask.flip(3))
    assert not torch.equal(out, digits[:4].flip(3))


@pytest.mark.parametrize(
    "wrap",
    [
        K.ImageSequential,
        AugmentationSequential,
        lambda ours: K.ImageSequential(K.ImageSequential(ours)),
        nn.Sequential,
    ],
)
def test_ours_stand_outermost(wrap, net, flow) -> None:
    for ours in (adv(net, flow), adv(net, flow, mode="append"), RobustMixup(net, num_classes=10)):
        if wrap is AugmentationSequential and getattr(ours, "mode", None) == "append":
            continue
        with pytest.raises(ValueError, match="a direct child of the outermost container"):
            AugmentationSequential(wrap(ours), data_keys=["input", "class"])
    AugmentationSequential(RobustMixup(net, num_classes=10, attack=adv(net, flow)))


def test_one_image_and_one_label_of_each_sample(net, digits, labels, flow) -> None:
    x, y = digits[:4], labels[:4]
    mix = RobustMixup(net, num_classes=10)
    for ours in (adv(net, flow), mix):
        twice = AugmentationSequential(ours, data_keys=["input", "input", "class"])
        with pytest.raises(ValueError, match="takes one image of each sample, and there are 2"):
            twice(x, x, y)
        names = AugmentationSequential(ours, data_keys=None)
        with pytest.raises(ValueError, match="one image of each sample"):
            names({"image": x, "image_2": x, "label": y})
    with pytest.raises(ValueError, match="'input' and 'class', once each"):
        AugmentationSequential(mix, data_keys=["input", "class", "class"])(x, y, y)
    with pytest.raises(ValueError, match="'input' and 'class', once each"):
        AugmentationSequential(mix, data_keys=None)({"image": x, "label_fine": y, "label": y})
    fine = AugmentationSequential(adv(net, flow), data_keys=["input", "class", "class"])
    out, one, two = fine(x, y, y + 1)
    assert torch.equal(one, y)
    assert torch.equal(two, y + 1)
    assert not torch.equal(out, x)


@pytest.mark.parametrize("getter", ["label_fine", None, lambda batch: batch["mask"]])
def test_labels_elsewhere_are_refused(getter, net) -> None:
    ours = JointSpaceAdv(net, eta=0, labels_getter=getter)
    with pytest.raises(ValueError, match="labels_getter is not asked inside kornia"):
        AugmentationSequential(ours, data_keys=None)


def test_ours_inside_a_container_of_torchvision_are_refused(net) -> None:
    hidden = v2.RandomApply([v2.Compose([JointSpaceAdv(net, eta=0)])])
    with pytest.raises(ValueError, match="make it a direct child"):
        AugmentationSequential(hidden, data_keys=["input", "class"])


def test_a_replay_without_the_image(net, digits, labels, flow) -> None:
    x, mask = digits[:6], (digits[:6] > 0.5).float()
    augment = AugmentationSequential(
        K.RandomHorizontalFlip(), adv(net, flow), data_keys=["input", "mask"]
    )
    with pytest.warns(UserWarning, match="own prediction.*the 'class' key"):
        _, moved = augment(x, mask)
    params = augment._params
    assert torch.equal(augment(mask, params=params, data_keys=["mask"]), moved)
    assert torch.equal(augment(x, mask, params=params)[1], moved)
    mix = AugmentationSequential(RobustMixup(net, num_classes=10), data_keys=["input", "class"])
    mix(x, labels[:6])
    with pytest.raises(ValueError, match="needs labels with the image"):
        mix(labels[:6], params=mix._params, data_keys=["class"])


def test_params_travel(net, digits, labels, flow) -> None:
    """Copied and pickled, they replay the same."""
    augment = container(net, flow)
    out, t = augment(digits[:6], labels[:6])
    for params in (copy.deepcopy(augment._params), pickle.loads(pickle.dumps(augment._params))):
        again, same = augment(digits[:6], labels[:6], params=params)
        assert torch.equal(out, again)
        assert torch.equal(t, same)


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


@pytest.mark.parametrize("key", ["labels", "target"])
def test_labels_that_kornia_passes_by_are_told(key: str, network, digits, labels) -> None:
    augment = AugmentationSequential(JointSpaceAdv(network, eta=0), data_keys=None)
    with pytest.warns(UserWarning, match="no labels under a usual name"):
        augment({"image": digits[:4], key: labels[:4]})
    augment({"image": digits[:4], "label": labels[:4]})
