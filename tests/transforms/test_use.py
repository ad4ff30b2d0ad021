"""What a transform is told, copied with, and finds behind a model: no surprise in silence."""

from __future__ import annotations

import copy
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from ijsat_aug import BatchTransform, JointSpaceAdv, RobustMixup
from ijsat_aug.flows import Tiles
from ijsat_aug.functional import joint_space_adv, robust_mixup
from ijsat_aug.transforms.replay import replay
from ijsat_aug.transforms.structure import geometry_in, take_apart


def test_a_model_or_an_attack_is_not_assigned(network) -> None:
    attack = JointSpaceAdv(network, eta=0)
    mix = RobustMixup(network, num_classes=10)
    for transform, name, value in ((attack, "model", nn.Identity()), (mix, "attack", attack)):
        with pytest.raises(AttributeError, match=r"bind\(model\) sets the model"):
            setattr(transform, name, value)
    assert attack.model is network
    assert not attack.state_dict()
    assert mix.attack is not attack


def test_a_key_of_the_labels_is_the_one_that_gets_them(network, digits, labels) -> None:
    x, y = digits[:6], labels[:6]
    mix = RobustMixup(network, num_classes=10, labels_getter="labels")
    out = mix({"image": x, "label": y, "labels": y})
    assert out["labels"].shape == (6, 10)
    assert out["label"] is y
    both = RobustMixup(network, num_classes=10, labels_getter=lambda batch: batch[2])
    _, one, two = both((x, y, y))
    assert one is two
    assert one.shape == (6, 10)


_network = nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
)


def test_a_model_among_global_names_is_frozen(digits, labels) -> None:
    before = _network[1].running_mean.clone()
    _network.train()
    JointSpaceAdv(lambda x: _network(x), eta=0)(digits[:6], labels[:6])
    assert torch.equal(_network[1].running_mean, before)
    assert _network.training
    assert all(p.requires_grad and p.grad is None for p in _network.parameters())


def test_a_flow_that_would_do_nothing_is_refused(network, flow, digits, labels) -> None:
    with pytest.raises(ValueError, match=r"attack=JointSpaceAdv\(model, flow\)"):
        RobustMixup(network, num_classes=10, flow=flow)
    with pytest.raises(ValueError, match=r"attack=JointSpaceAdv\(model, flow\)"):
        robust_mixup(digits[:6], labels[:6], network, lam=0.5, num_classes=10, flow=flow)


def test_norms_of_another_precision_do_not_change_that_of_the_images(digits, labels) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3).bfloat16(), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(144, 10).bfloat16(),
    )  # fmt: skip
    x = digits[:6].bfloat16()
    assert model(x).dtype == torch.bfloat16
    moved, _ = JointSpaceAdv(model, eta=0)(x, labels[:6])
    assert not torch.equal(moved, x)


def test_images_of_float64_under_autocast(network, digits, labels) -> None:
    x = digits[:6].double()
    moved, _ = JointSpaceAdv(network, eta=0, amp_dtype=torch.bfloat16)(x, labels[:6])
    assert moved.dtype == torch.float64
    assert 0 < (moved - x).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_autocast_knows_three_precisions(dtype, network) -> None:
    with pytest.raises(ValueError, match="amp_dtype must be float16, bfloat16, or"):
        JointSpaceAdv(network, eta=0, amp_dtype=dtype)


def test_modes_come_back_where_the_model_fails(digits, labels) -> None:
    lazy = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.LazyLinear(10)).train()
    adv = JointSpaceAdv(lazy, eta=0)
    with pytest.raises(ValueError, match="call it once with a batch, as the optimiser"):
        adv(digits[:6], labels[:6])
    assert all(module.training for module in lazy.modules())
    lazy(digits[:6])
    assert adv(digits[:6], labels[:6])[0].shape == digits[:6].shape


def test_a_copy_shares_no_attack(network, digits, labels) -> None:
    mix = RobustMixup(network, num_classes=10, eps=0.1)
    twin = copy.copy(mix)
    twin.eval()
    twin.bind(nn.Identity())
    mix(digits[:6], labels[:6])
    assert "pixel_norm" in mix.last
    assert mix.attack.model is network


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_what_is_shown_again_keeps_type_and_layout(fraction, network, labels) -> None:
    x = torch.rand(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    attack = JointSpaceAdv(eta=0, fraction=fraction)
    attack.calm(x, labels[:6])
    moved = attack.follow(x, labels[:6], torch.randn_like(x))
    assert moved.is_contiguous(memory_format=torch.channels_last)
    kinds = []
    for image, _ in replay(attack, (tv_tensors.Image(x), labels[:6]), 2):
        kinds.append(type(image))
        if image.requires_grad:  # the last showing is followed by none
            image.sum().backward()
    assert kinds == [tv_tensors.Image] * 2


def test_counts_may_be_numpys(network) -> None:
    mix = RobustMixup(network, num_classes=np.int64(10), draws=np.int64(2), lam_steps=np.int64(1))
    assert mix.draws == 2
    with pytest.raises(ValueError, match="draws must be an integer >= 1"):
        RobustMixup(network, num_classes=10, draws=True)


def test_nothing_is_approached_without_labels(network, digits) -> None:
    with pytest.raises(ValueError, match="targeted=True approaches the labels"):
        joint_space_adv(digits[:6], None, network, eps=0.1, targeted=True)


def test_labels_leave_without_a_graph(network, digits, labels) -> None:
    soft = torch.rand(6, 10, requires_grad=True).softmax(1)
    for p in (0.0, 1.0):
        _, y = RobustMixup(network, p=p)(digits[:6], soft)
        assert not y.requires_grad


def test_presets_look_as_they_differ(network, flow) -> None:
    fast, usual = (
        repr(RobustMixup.preset(name, network, flow, num_classes=10))
        for name in ("fast", "accuracy")
    )
    assert "fraction=0.5" in fast
    assert "fraction" not in usual
    told = repr(RobustMixup(network, num_classes=10, draws=3, mode="append"))
    assert "draws=3" in told
    assert "mode=append" in told


def test_a_seeded_attack_draws_for_itself_in_a_mixup(network, digits, labels) -> None:
    found = []
    for disturbed in (False, True):
        attack = JointSpaceAdv(network, eta=0, eps=0.1, generator=0)
        mix = RobustMixup(network, num_classes=10, attack=attack, generator=1)
        if disturbed:
            attack(digits[:6], labels[:6])
        found.append(mix(digits[:6], labels[:6])[0])
    assert torch.equal(*found)


def test_a_setting_that_would_stay_without_effect_is_not_assigned(network, digits, labels) -> None:
    attack = JointSpaceAdv(network, eta=0, eps=0.01)
    with pytest.raises(AttributeError, match=r"eps of a JointSpaceAdv lies in its \.threat"):
        attack.eps = 0.3
    attack.threat = replace(attack.threat, eps=0.3)  # as it says
    assert (attack(digits[:6], labels[:6])[0] - digits[:6]).abs().max() > 0.2
    mix = RobustMixup(network, num_classes=10)
    for name, place in (("eps", "attack.threat"), ("lam_steps", "mix")):
        with pytest.raises(AttributeError, match=rf"lies in its \.{place}"):
            setattr(mix, name, 1)
    mix.alpha = 0.2  # an attribute
    for transform in (attack, mix):
        for name in ("mean", "std", "mode", "model_mode", "amp_dtype", "generator"):
            with pytest.raises(AttributeError, match=f"{name} of a .* is not set: make another"):
                setattr(transform, name, 1)
    for name in ("flow", "random_start"):
        with pytest.raises(AttributeError, match=f"{name} of a RobustMixup is not set"):
            setattr(mix, name, None)


def test_a_transform_that_is_copied_alone_stays_with_its_model(digits, labels) -> None:
    """Also where its objective or its attack know that model."""

    class Learner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
            self.augment = JointSpaceAdv(self.net, eta=0, objective=self.loss)

        def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits, labels, reduction="none")

    class Foreign:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
            return images

    learner = Learner()
    for alone in (copy.deepcopy(learner.augment), copy.deepcopy([learner.augment])[0]):
        assert alone.model is learner.net
        assert alone.threat.objective.__self__ is learner
    whole = copy.deepcopy(learner)
    assert whole.augment.model is whole.net
    assert whole.augment.threat.objective.__self__ is whole
    mix = RobustMixup(learner.net, num_classes=10, attack=Foreign(learner.net))
    assert copy.deepcopy(mix).attack.model is copy.deepcopy(mix).model is learner.net
    assert copy.deepcopy(mix).attack is mix.attack
    assert copy.deepcopy([mix])[0].attack is mix.attack
    copied, net = copy.deepcopy([mix, learner.net])
    assert copied.attack.model is copied.model is net is not learner.net
    assert mix.attack.model is learner.net
    ijsat = copy.deepcopy(RobustMixup(learner.net, num_classes=10, attack=learner.augment))
    assert ijsat.model is ijsat.attack.model is learner.net
    assert torch.isfinite(ijsat(digits[:6], labels[:6])[0]).all()


def test_a_copy_looks_at_values_as_seldom(network, digits, labels) -> None:
    twin = copy.copy(RobustMixup(network, num_classes=10))
    twin(digits[:6], labels[:6])
    assert twin.climb._seen is twin._seen


def test_a_foreign_attack_leaves_batch_and_precision(digits, labels) -> None:
    x, y = digits[:6].half(), labels[:6]
    before = x.clone()

    def darker(images: Tensor, targets: Tensor) -> Tensor:
        return images.mul_(0.5).float()

    for options in ({}, {"mode": "append"}, {"order": "attack-mix"}):
        mix = RobustMixup(num_classes=10, attack=darker, **options)
        assert mix(x, y)[0].dtype == torch.float16
        assert torch.equal(x, before)


@pytest.mark.parametrize("objective", ["bce", "ce"])
def test_only_probabilities_are_brought_to_a_sum_of_one(objective, network, digits) -> None:
    rows = torch.tensor([[0.5, 0.5039] + [0] * 8] * 4).bfloat16()
    attack = JointSpaceAdv(network, eta=0, objective=objective)
    _, out = RobustMixup(network, attack=attack, alpha=1e9)(digits[:4], rows)
    total = out.sum(1)
    assert torch.allclose(total, torch.ones(4) if objective == "ce" else rows.float().sum(1))


def test_labels_of_other_shapes_stay_what_they_are(digits, labels) -> None:
    """Per-sample parts are chosen and doubled; weights of classes and numbers are not."""
    Kind = namedtuple("Kind", ["of_what", "how_much"])
    seen = []

    class Watched(BatchTransform):
        def make_params(self, images, labels):
            return {}

        def transform(self, images, labels, params):
            seen.append(labels)
            return images, labels

    x, y = digits[:4], labels[:4]
    weights, number = torch.ones(10), torch.tensor(3.0)
    many = {"kind": y, "w": weights, "n": number, "array": y.numpy(), "name": ("a", "b", "c", "d")}
    Watched(nn.Identity(), fraction=0.5, labels_getter=lambda batch: many)((x, many))
    (some,) = seen
    assert len(some["kind"]) == len(some["array"]) == len(some["name"]) == 2
    assert some["w"] is weights
    assert some["n"] is number
    assert isinstance(some["name"], tuple)
    second = {"mode": "append", "labels_getter": lambda batch: batch[1]}
    for both in (Kind(y, y), (y, y)):
        doubled = Watched(nn.Identity(), **second)((x, both))[1]
        assert type(doubled) is type(both)
        assert [len(part) for part in doubled] == [8, 8]
    doubled = Watched(nn.Identity(), **second)((x, y.numpy()))[1]
    assert isinstance(doubled, np.ndarray)
    assert doubled.tolist() == [*y.tolist(), *y.tolist()]


@pytest.mark.filterwarnings("ignore:the flow takes images of")
def test_the_usual_radius_of_tiles_is_that_of_their_number(flow) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    x, y = torch.rand(2, 1, 16, 16), torch.tensor([3, 1])
    made = [
        JointSpaceAdv(net, Tiles(flow, size), eps=0, latent_norm="l2", steps=2, method="exact")
        for size in ((8, 14), (16, 16))
    ]
    few, many = (attack.threat.eta for attack in made)
    assert few < many
    for attack in made:
        attack(x, y)
        assert attack.threat.eta == many
    made[0].threat = replace(made[0].threat, eta=few)
    made[0](torch.rand(2, 1, 16, 16), y)
    assert made[0].threat.eta == few  # as it was asked for


def test_an_attack_of_the_users_leaves_no_trace(digits, labels) -> None:
    """As one that was copied from somewhere: in whatever mode, with backward()."""
    _network.train()
    _network.zero_grad(set_to_none=True)
    gathered = {p: torch.ones_like(p) for p in list(_network.parameters())[:2]}
    for p, g in gathered.items():
        p.grad = g
    modes = []

    def fgsm(images: Tensor, targets: Tensor) -> Tensor:
        modes.append(_network.training)
        leaf = images.detach().requires_grad_()
        _network.zero_grad(set_to_none=len(modes) == 1)
        nn.functional.cross_entropy(_network(leaf), targets).backward()
        return (images + 0.1 * leaf.grad.sign()).clamp(0, 1)

    x, y = digits[:6], labels[:6]
    plain = RobustMixup(_network, num_classes=10, attack=lambda images, _: images, generator=0)(
        x, y
    )
    before = {name: buffer.clone() for name, buffer in _network.named_buffers()}
    mix = RobustMixup(_network, num_classes=10, attack=fgsm, generator=0)
    with torch.no_grad():
        moved = mix(x, y)
    assert (moved[0] - plain[0]).abs().max() > 0.09
    assert modes == [False]
    again, _ = robust_mixup(x, y, _network, lam=mix.last["lam"], num_classes=10, attack=fgsm)
    assert torch.equal(again, moved[0])
    assert modes == [False, False]
    assert _network.training
    assert all(p.requires_grad and p.grad is gathered.get(p) for p in _network.parameters())
    assert all(bool((g == 1).all()) for g in gathered.values())
    _network.zero_grad(set_to_none=True)
    assert all(torch.equal(b, before[name]) for name, b in _network.named_buffers())


def test_an_attack_of_the_users_has_the_seed_of_train_mode(digits, labels) -> None:
    """Dropout is as it is drawn, and other random numbers are left alone."""
    net = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))

    def fgsm(images: Tensor, targets: Tensor) -> Tensor:
        leaf = images.detach().requires_grad_()
        loss = nn.functional.cross_entropy(net(leaf), targets)
        return (images + 0.1 * torch.autograd.grad(loss, leaf)[0].sign()).clamp(0, 1)

    x, y = digits[:6], labels[:6]
    mix = RobustMixup(net, num_classes=10, attack=fgsm, model_mode="train", generator=0)
    before = torch.get_rng_state()
    moved, _, params = mix.augment(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    same = mix.replay(x, mix.as_labels(x, y), params)
    other = mix.replay(x, mix.as_labels(x, y), params | {"seed": params["seed"] + 1})
    assert torch.equal(same[0], moved)
    assert not torch.equal(other[0], moved)


def test_what_was_told_of_a_batch_is_not_told_of_the_next(network, digits, labels) -> None:
    mix = RobustMixup(network, num_classes=10)
    mix(digits[:6], labels[:6])
    assert mix.last
    assert mix.attack.last
    mix.p = 0.0
    mix(digits[:6], labels[:6])
    assert mix.last == mix.attack.last == {}


def test_masks_are_told_where_they_belong(network, digits) -> None:
    masks = torch.randint(5, (6, 8, 8))
    for transform in (JointSpaceAdv(network, eta=0), RobustMixup(network, num_classes=5)):
        with pytest.raises(ValueError, match=r"JointSpaceAdv takes masks with an objective="):
            transform(digits[:6], masks)


def test_of_labels_that_stand_twice_the_first_are_replaced(digits, labels) -> None:
    x, y = digits[:4], labels[:4]
    _, soft, kept = RobustMixup(num_classes=10, eps=0)(x, y, y)
    assert soft.shape == (4, 10)
    assert kept is y


def test_a_picture_comes_before_what_has_a_usual_name(digits) -> None:
    batch = {"image": ["a.png", "b.png"], "pixel_values": digits[:2]}
    assert take_apart((batch,), "default").images is batch["pixel_values"]


@pytest.mark.skipif(not hasattr(tv_tensors, "KeyPoints"), reason="torchvision before 0.23")
def test_keypoints_are_geometry() -> None:
    points = tv_tensors.KeyPoints(torch.zeros(1, 2), canvas_size=(8, 8))
    assert geometry_in([torch.zeros(1), points]) == ["KeyPoints"]


def test_a_batch_that_is_left_out_comes_without_a_graph(net, digits, labels) -> None:
    x = digits[:4].clone().requires_grad_()
    assert not JointSpaceAdv(net, eta=0, p=0)(x, labels[:4])[0].requires_grad


def test_a_batch_of_colours_that_nobody_normalised_is_doubted() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    x, y = torch.rand(4, 3, 4, 4), torch.zeros(4).long()
    x[0, :, 0, 0] = 0
    with pytest.warns(UserWarning, match="as if it were not normalised"):
        JointSpaceAdv(net, eta=0, mean=mean, std=std)(x, y)


def test_the_model_gets_the_layout_that_was_asked_for(network, digits, labels) -> None:
    seen = []
    network.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    x = digits[:6].expand(-1, 3, -1, -1).contiguous()
    network[0] = torch.nn.Conv2d(3, 16, 3, padding=1)
    options = {"memory_format": torch.channels_last, "eps": 0.1}
    JointSpaceAdv(network, eta=0, steps=2, **options)(x, labels[:6])
    RobustMixup(network, num_classes=10, lam_steps=1, draws=2, **options)(x, labels[:6])
    assert len(seen) == 6
    assert all(seen)


def test_eval_reaches_ours_beside_a_container_of_torchvision(digits, labels) -> None:
    """Which keeps its transforms in a plain list, as the README tells."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adv = JointSpaceAdv(_network, eta=0)
            self.augment = v2.Compose([self.adv])

    module, x, y = Module(), digits[:4], labels[:4]
    assert not torch.equal(module.augment(x, y)[0], x)
    assert torch.equal(module.eval().augment(x, y)[0], x)
