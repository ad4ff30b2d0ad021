"""What goes in and out: tuples, dicts, tv_tensors, real pipelines, probability, modes."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from ijsat_aug import BatchTransform, JointSpaceAdv, RobustMixup

Named = namedtuple("Named", "image label path")


@pytest.fixture
def adv(network: nn.Module) -> JointSpaceAdv:
    return JointSpaceAdv(network, eps=8 / 255, eta=0, generator=0)


def test_two_arguments_and_more(adv, digits, labels) -> None:
    x, y = digits[:4], labels[:4]
    out = adv(x, y)
    assert type(out) is tuple
    assert out[1] is y
    rest = ["a", "b", "c", "d"]
    out = adv(x, y, rest)
    assert out[1] is y
    assert out[2] is rest
    assert isinstance(adv(x), torch.Tensor)


@pytest.mark.parametrize("make", [tuple, list, lambda items: Named(*items)])
def test_one_packed_batch(make, adv, digits, labels) -> None:
    batch = make([digits[:4], labels[:4], ["p"] * 4])
    out = adv(batch)
    assert type(out) is type(batch)
    assert out[1] is batch[1]
    assert out[2] is batch[2]
    assert not torch.equal(out[0], batch[0])
    assert torch.equal(batch[0], digits[:4])


@pytest.mark.parametrize("make", [dict, OrderedDict, UserDict])
@pytest.mark.parametrize(
    "keys", [("image", "label"), ("pixel_values", "labels"), ("images", "target"), ("X", "Y")]
)
def test_mappings(make, keys, adv, digits, labels) -> None:
    image, label = keys
    batch = make({"index": torch.arange(4), label: labels[:4], image: digits[:4]})
    out = adv(batch)
    assert type(out) is type(batch)
    assert list(out) == list(batch)
    assert out[label] is batch[label]
    assert out["index"] is batch["index"]
    assert torch.equal(batch[image], digits[:4])
    assert not torch.equal(out[image], digits[:4])
    one, two = (JointSpaceAdv(adv.model, eta=0, generator=0) for _ in range(2))
    assert torch.equal(one(batch)[image], two(digits[:4], labels[:4])[0])


def test_labels_getter(network, digits, labels) -> None:
    x, y = digits[:8], labels[:8]
    wrong = (y + 1) % 10

    def attacked(getter, *batch):
        adv = JointSpaceAdv(network, eta=0, generator=0, labels_getter=getter)
        out = adv(*batch)
        return out["image"] if isinstance(out, dict) else out[0]

    expected = attacked("default", x, y)
    assert torch.equal(attacked(lambda batch: batch[2], x, wrong, y), expected)
    assert torch.equal(attacked("fine", {"image": x, "label": wrong, "fine": y}), expected)
    assert not torch.equal(attacked(None, x, wrong), attacked("default", x, wrong))
    with pytest.raises(ValueError, match="no labels under 'coarse'"):
        attacked("coarse", {"image": x})


def test_without_labels_it_is_the_models_own_prediction(network, digits, flow) -> None:
    network.eval()
    x = digits[:8]
    own = network(x).argmax(1)
    for options in ({"eta": 0}, {"steps": 2}, {"eta": 0, "random_start": False}):
        advs = [JointSpaceAdv(network, flow, generator=0, **options) for _ in range(3)]
        expected = advs[0](x, own)[0]
        assert torch.equal(advs[1](x), expected)
        assert torch.equal(advs[2]({"image": x})["image"], expected)


def test_tv_tensors_stay_what_they_are(adv, digits, labels) -> None:
    image = tv_tensors.Image(digits[:4])
    mask = tv_tensors.Mask(torch.zeros(4, 8, 8, dtype=torch.uint8))
    out, _, same_mask = adv(image, labels[:4], mask)
    assert isinstance(out, tv_tensors.Image)
    assert same_mask is mask
    assert not torch.equal(out, image)
    assert isinstance(adv.eval()(image, labels[:4])[0], tv_tensors.Image)


def test_torchvision_composes(network, digits, labels) -> None:
    x, y = digits[:8], labels[:8]
    adv = JointSpaceAdv(network, eta=0, generator=0)
    out, soft = v2.Compose([v2.RandomHorizontalFlip(1.0), adv])(x, y)
    assert 0 < (out.flip(3) - x).abs().max() <= 1 / 255 + 1e-6
    assert soft is y
    mixed, soft = v2.Compose([v2.MixUp(num_classes=10), adv])(x, y)
    assert soft.shape == (8, 10)
    assert mixed.shape == x.shape
    skipped = v2.RandomApply([adv], p=0.0)(x, y)
    assert torch.equal(skipped[0], x)
    v2.RandomChoice([adv, adv])(x, y)


def test_kornia_composes(network, digits, labels) -> None:
    import kornia.augmentation as K

    x, y = digits[:8], labels[:8]
    adv = JointSpaceAdv(network, eta=0, generator=0)
    geometric = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=1.0), data_keys=["input", "class"]
    )
    out, same = v2.Compose([geometric, adv])(x, y)
    assert torch.equal(same, y)
    assert 0 < (out.flip(3) - x).abs().max() <= 1 / 255 + 1e-6
    inside = K.ImageSequential(K.RandomHorizontalFlip(p=1.0), adv)(x)
    assert 0 < (inside.flip(3) - x).abs().max() <= 1 / 255 + 1e-6


def test_eval_is_the_identity(adv, digits, labels) -> None:
    adv.eval()
    batch = {"image": digits[:4], "label": labels[:4]}
    assert adv(batch) is batch
    assert adv(digits)[0].data_ptr() == digits.data_ptr()
    x, y = adv(digits, labels)
    assert x is digits
    assert y is labels


def test_p_is_the_share_of_attacked_batches(network, digits, labels) -> None:
    calls: list[int] = []
    network.register_forward_hook(lambda m, i, o: calls.append(1))
    adv = JointSpaceAdv(network, eta=0, p=0.3, generator=1)
    for _ in range(300):
        before = len(calls)
        out, _ = adv(digits[:2], labels[:2])
        attacked = len(calls) > before
        assert attacked == (not torch.equal(out, digits[:2])) == bool(adv.last)
    assert 60 < len(calls) < 120  # 90 expected, 8 is a standard deviation
    for p, expected in ((0.0, 0), (1.0, 20)):
        calls.clear()
        adv = JointSpaceAdv(network, eta=0, p=p)
        for _ in range(20):
            adv(digits[:2], labels[:2])
        assert len(calls) == expected


def test_normalised_batches(network, digits, labels) -> None:
    """The budget counts in pixels, and what does not move stays bit for bit."""
    mean, std = 0.3, 0.25

    class Denormalised(nn.Module):
        def forward(self, x):
            return network(x * std + mean)

    network.eval()
    x, y = digits[:8], labels[:8]
    options = {"eta": 0, "eps": 0.1, "steps": 4, "random_start": False}
    plain, _ = JointSpaceAdv(network, **options)(x, y)
    adv = JointSpaceAdv(Denormalised(), mean=[mean], std=[std], **options)
    normalised = (x - mean) / std
    out, _ = adv(normalised, y)
    pixels = out * std + mean
    assert (pixels - x).abs().max() <= 0.1 + 1e-6
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert (pixels - plain).abs().gt(1e-4).float().mean() < 0.02
    zero = JointSpaceAdv(Denormalised(), mean=mean, std=std, eta=0, eps=0)
    assert torch.equal(zero(normalised, y)[0], normalised)


def test_mean_and_std_a_channel(digits) -> None:
    class Brightness(nn.Module):
        def forward(self, x):
            s = x.mean((1, 2, 3))
            return torch.stack([s, -s], 1)

    mean, std = (0.1, 0.5, 0.9), (0.2, 0.1, 0.4)
    x = torch.rand(3, 3, 4, 4)
    m, s = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (mean, std))
    adv = JointSpaceAdv(Brightness(), eta=0, eps=0.05, mean=mean, std=std, random_start=False)
    out, _ = adv((x - m) / s, torch.zeros(3, dtype=torch.long))
    assert torch.allclose(out * s + m, (x - 0.05).clamp(0, 1), atol=1e-6)


def test_last_tells_what_happened(network, digits, labels, flow) -> None:
    adv = JointSpaceAdv(network, flow, eps=0.02, eta=0.05, steps=3, latent_norm="l2")
    adv(digits[:6], labels[:6])
    assert set(adv.last) == {"loss_start", "loss", "latent_norm", "pixel_norm", "fallback"}
    assert all(t.shape == (6,) and not t.requires_grad for t in adv.last.values())
    assert (adv.last["pixel_norm"] <= 0.02 + 1e-7).all()
    assert (adv.last["latent_norm"] <= 0.05 + 1e-6).all()
    assert (adv.last["loss"] > adv.last["loss_start"]).float().mean() > 0.8


def test_a_model_can_come_later(network, digits, labels) -> None:
    adv = JointSpaceAdv(eta=0, model_mode="train")
    assert adv.model is None
    assert adv.bind(network) is adv
    assert adv.handle.mode == "train"
    adv(digits[:2], labels[:2])


@pytest.mark.parametrize("order", [("net", "augment"), ("augment", "net")])
def test_who_is_copied_with_the_model_attacks_the_copy(order, network) -> None:
    """In whatever order a module got them."""
    parts = {"net": network, "augment": RobustMixup(network, num_classes=10)}
    one = nn.ModuleDict({name: parts[name] for name in order})
    first, second = copy.deepcopy(one), copy.deepcopy(one)
    third = copy.deepcopy(first)
    assert len({twin["net"] for twin in (one, first, second, third)}) == 4
    for twin in (third, second, first, one):
        assert twin["augment"].model is twin["augment"].attack.model is twin["net"]
    assert copy.deepcopy(one["augment"]).model is network


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (torch.Tensor.tolist, torch.tensor),
        (lambda y: {"kind": y}, lambda some: some["kind"]),
        (lambda y: [y, 9 - y], lambda some: some[0]),
    ],
)
def test_an_objective_gets_the_labels_of_the_chosen_samples(
    pack, unpack, network, digits, labels
) -> None:
    seen = []

    def objective(logits, some):
        seen.append(some)
        return logits[:, 0]

    x, y = digits[:8], labels[:8]
    given = pack(y)
    adv = JointSpaceAdv(
        network, eta=0, eps=0.1, fraction=0.25, objective=objective, labels_getter=lambda b: b[1],
        generator=0,
    )  # fmt: skip
    moved, same = adv(x, given)
    assert same is given
    index = (moved != x).flatten(1).any(1).nonzero().flatten()
    assert len(index) == 2
    assert torch.equal(unpack(seen[0]), y[index])


def test_a_small_fraction_of_a_small_batch_is_one_sample(network, digits, labels) -> None:
    for count in (1, 4):
        adv = JointSpaceAdv(network, eta=0, eps=0.1, fraction=0.1)
        moved, _ = adv(digits[:count], labels[:count])
        assert int((moved != digits[:count]).flatten(1).any(1).sum()) == 1


def test_a_base_class_is_abstract(digits) -> None:
    with pytest.raises(NotImplementedError):
        BatchTransform(nn.Identity())(digits)


def test_repr_shows_the_settings(network, flow) -> None:
    adv = JointSpaceAdv(
        network, flow, steps=3, norm="l2", eps=0.5, target="prediction", mean=0.5, std=0.5
    )
    text = repr(adv)
    for piece in ("model=Sequential", "1x8x8", "steps=3", "norm=l2", "prediction", "mean=(0.5,)"):
        assert piece in text
    assert "Conv2d" not in text


def test_chosen_samples_stay_in_order() -> None:
    half = BatchTransform(nn.Identity(), fraction=0.5)
    x = torch.rand(4, 3, 2, 2)
    assert half.choose_samples(x, torch.tensor([1.0, 2.0, 0.0, 3.0])).tolist() == [1, 3]
    orders = [half.choose_samples(x).tolist() for _ in range(10)]
    assert all(order == sorted(order) for order in orders)
