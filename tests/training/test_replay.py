"""Batches that are shown twice: the attack along the gradient of the step that training does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ijsat_aug import AugmentedLoader, JointSpaceAdv, RobustMixup
from ijsat_aug.functional import joint_space_adv


def loader(digits: Tensor, labels: Tensor, count: int = 24, size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(digits[:count], labels[:count]), batch_size=size)


def shown(augmented, net: nn.Module, scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """The batches that a training loop sees."""
    seen = []
    for x, y in augmented:
        (scale * F.cross_entropy(net(x), y)).backward()
        seen.append((x.detach().clone(), y))
    return seen


@pytest.mark.parametrize(("eps", "eta"), [(0.05, 0.0), (0.0, 0.05), (0.05, 0.05)])
@pytest.mark.parametrize("scale", [1.0, 4096.0])
def test_it_is_the_linear_attack(eps, eta, scale, net, digits, labels, flow) -> None:
    """With the loss and the mode that the attack would have used; a scaled loss is the same."""
    adv = JointSpaceAdv(None, flow, eps=eps, eta=eta, random_start=False)
    seen = shown(AugmentedLoader(loader(digits, labels), adv, replay=2), net, scale)
    assert len(seen) == 6
    for (x, y), (moved, same) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(y, same)
        method = "linear" if eta else "exact"
        expected = joint_space_adv(x, y, net, flow, eps=eps, eta=eta, method=method)
        # Where a gradient is nearly zero, its sign is chance.
        assert ((moved - expected).abs() > 1e-5).float().mean() < 0.02
        assert (moved - x).abs().max() > 0.01
        loss = [F.cross_entropy(net(images), y) for images in (x, moved)]
        assert loss[1] > loss[0]
    spaces = ("latent",) * (eta > 0) + ("pixel",) * (eps > 0)
    assert adv.last.keys() == {"fallback", *(f"{space}_norm" for space in spaces)}


def test_the_model_is_asked_by_training_alone(net, digits, labels, flow) -> None:
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    adv = JointSpaceAdv(net, flow)
    seen = shown(AugmentedLoader(loader(digits, labels), adv, replay=2), net)
    assert len(calls) == len(seen) == 6


def test_ijsat_moves_the_blends(net, digits, labels, flow) -> None:
    mix = RobustMixup(net, num_classes=10, attack=JointSpaceAdv(net, flow, eps=0.02), generator=0)
    augmented = AugmentedLoader(loader(digits, labels), mix, replay=2)
    plain = RobustMixup(num_classes=10, eps=0, generator=0)
    seen = shown(augmented, net)
    for i, ((x, y), (moved, same)) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        if i == 0:  # the same weights: the first blend is that of plain mixup
            blend, target = plain(digits[:8], labels[:8])
            assert torch.equal(x, blend)
            assert torch.equal(y, target)
        assert torch.equal(y, same)
        assert F.cross_entropy(net(moved), y) > F.cross_entropy(net(x), y)
    assert {"lam", "latent_norm", "pixel_norm"} <= mix.last.keys()


def test_normalised_batches(net, digits, labels, flow) -> None:
    class Normalised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(x * 0.25 + 0.5)

    plain = JointSpaceAdv(None, flow, eps=0.02, random_start=False)
    adv = JointSpaceAdv(None, flow, eps=0.02, random_start=False, mean=0.5, std=0.25)
    one = shown(AugmentedLoader(loader(digits, labels), plain, replay=2), net)
    batches = loader((digits - 0.5) / 0.25, labels)
    two = shown(AugmentedLoader(batches, adv, replay=2), Normalised())
    for (x, _), (z, _) in zip(one, two, strict=True):
        assert ((z * 0.25 + 0.5 - x).abs() > 1e-4).float().mean() < 0.02


def test_three_showings_start_anew(net, digits, labels) -> None:
    adv = JointSpaceAdv(eta=0, eps=0.1, random_start=False)
    seen = shown(AugmentedLoader(loader(digits, labels), adv, replay=3), net)
    assert len(seen) == 9
    for i in range(0, 9, 3):
        for moved, _ in seen[i + 1 : i + 3]:
            assert (moved - seen[i][0]).abs().max() <= 0.1 + 1e-6


def test_where_it_is_spent(net, digits, labels) -> None:
    def moved(first: Tensor, second: Tensor) -> Tensor:
        return (first != second).flatten(1).any(1)

    adv = JointSpaceAdv(eta=0, eps=0.1, fraction=0.25, choose="hardest")
    for (x, y), (new, _) in zip(*[iter(shown(AugmentedLoader(loader(digits, labels), adv, replay=2), net))] * 2, strict=True):  # fmt: skip  # noqa: E501
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(leaf), y), leaf)
        hardest = g.flatten(1).norm(dim=1).topk(2).indices
        assert moved(x, new).nonzero().flatten().tolist() == sorted(hardest.tolist())
    some = JointSpaceAdv(eta=0, eps=0.1, fraction=0.25, generator=0)
    seen = shown(AugmentedLoader(loader(digits, labels), some, replay=2), net)
    places = [moved(a, b).nonzero().flatten().tolist() for (a, _), (b, _) in zip(seen[::2], seen[1::2], strict=True)]  # fmt: skip  # noqa: E501
    assert [len(p) for p in places] == [2, 2, 2]
    assert len({tuple(p) for p in places}) > 1
    with pytest.raises(ValueError, match="replay=2"):
        adv.bind(net)(digits[:8], labels[:8])


def test_every_few_batches_and_some_epochs(net, digits, labels) -> None:
    adv = JointSpaceAdv(net, eta=0, eps=0.1)
    x = digits[:24]

    def attacked(augmented) -> list[bool]:
        return [
            not any(torch.equal(images, part) for part in x.split(8))
            for images, _ in shown(augmented, net)
        ]

    augmented = AugmentedLoader(loader(digits, labels), adv, every=2)
    assert attacked(augmented) == [True, False, True]
    twice = AugmentedLoader(loader(digits, labels), adv, every=2, replay=2)
    assert len(twice) == 5
    assert attacked(twice) == [False, True, False, False, True]

    some = AugmentedLoader(loader(digits, labels), adv, epochs=(1, 2))
    assert [attacked(some) for _ in range(3)] == [[False] * 3, [True] * 3, [False] * 3]
    some.set_epoch(1)
    assert attacked(some) == [True] * 3
    always_as_long = AugmentedLoader(loader(digits, labels), adv, epochs=(1, None), replay=2)
    assert [len(shown(always_as_long, net)) for _ in range(2)] == [6, 6]


def test_batches_in_between_are_mixed(net, digits, labels) -> None:
    mix = RobustMixup(net, num_classes=10, eps=0.1, generator=0)
    seen = shown(AugmentedLoader(loader(digits, labels), mix, every=3), net)
    plain = RobustMixup(num_classes=10, eps=0)
    assert all(y.shape == (8, 10) for _, y in seen)
    for (_, y), part in list(zip(seen, digits[:24].split(8), strict=True))[1:]:
        lam = mix.last["lam"] if y is seen[-1][1] else None
        if lam is not None:
            blend = plain.replay(part, F.one_hot(labels[16:24], 10).float(), {"lam": lam})[0]
            assert torch.allclose(seen[-1][0], blend)


def test_evaluation_mode_is_the_identity(net, digits, labels) -> None:
    adv = JointSpaceAdv(eta=0, eps=0.1).eval()
    seen = [x for x, _ in AugmentedLoader(loader(digits, labels), adv, replay=2)]
    assert len(seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_a_sample_without_a_finite_gradient_stays(net, digits, labels, flow) -> None:
    adv = JointSpaceAdv(None, flow, eps=0.05)
    augmented = iter(AugmentedLoader(loader(digits, labels), adv, replay=2))
    x, y = next(augmented)
    losses = F.cross_entropy(net(x), y, reduction="none")
    (losses * torch.tensor([1, float("nan"), 1, 1, 1, 1, 1, 1])).sum().backward()
    moved, _ = next(augmented)
    same = (moved == digits[:8]).flatten(1).all(1)
    assert same.tolist() == [False, True] + [False] * 6
    assert adv.last["fallback"].tolist() == same.tolist()


def test_a_loop_may_change_its_images_in_place(net, digits, labels) -> None:
    adv = JointSpaceAdv(eta=0, eps=0.1)
    for x, y in AugmentedLoader(loader(digits, labels), adv, replay=2):
        x.mul_(0.9)
        F.cross_entropy(net(x), y).backward()


def test_mistakes(net, digits, labels, flow) -> None:
    batches = loader(digits, labels)
    with pytest.raises(ValueError, match="came back without a gradient"):
        list(AugmentedLoader(batches, JointSpaceAdv(eta=0), replay=2))
    for options, message in (
        ({"steps": 2}, "steps=1"),
        ({"target": "prediction"}, 'target="label"'),
        ({"objective": "kl", "random_start": True}, 'objective="ce"'),
        ({"best": True}, "best=False"),
        ({"tau": 0}, "tau=None"),
        ({"targeted": True}, "targeted=False"),
    ):
        adv = JointSpaceAdv(net, eta=0, **options)
        with pytest.raises(ValueError, match=message):
            shown(AugmentedLoader(batches, adv, replay=2), net)
    for mix in (
        RobustMixup(num_classes=10, eps=0),
        RobustMixup(net, num_classes=10, attack=lambda x, y: x),
        RobustMixup(net, num_classes=10, order="attack-mix"),
    ):
        with pytest.raises(ValueError, match="a replay of RobustMixup"):
            shown(AugmentedLoader(batches, mix, replay=2), net)
    with pytest.raises(TypeError, match="one of ours"):
        AugmentedLoader(batches, lambda batch: batch, replay=2)
    for name in ("replay", "every"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
            AugmentedLoader(batches, JointSpaceAdv(eta=0), **{name: 0})
    with pytest.raises(ValueError, match="in order"):
        AugmentedLoader(batches, JointSpaceAdv(eta=0), epochs=(3, 2))
    with pytest.raises(ValueError, match="choose must be"):
        JointSpaceAdv(eta=0, choose="best")


def moves(mix: RobustMixup, net: nn.Module, digits: Tensor, labels: Tensor) -> list[list[int]]:
    """The samples that the second showing of each batch moved."""
    seen = shown(AugmentedLoader(loader(digits, labels), mix, replay=2), net)
    pairs = zip(seen[::2], seen[1::2], strict=True)
    return [(a != b).flatten(1).any(1).nonzero().flatten().tolist() for (a, _), (b, _) in pairs]


@pytest.mark.parametrize(("options", "count"), [({"p": 0.0}, 0), ({"fraction": 0.25}, 2), ({}, 8)])
def test_a_replay_moves_the_blends_alone(options, count, net, digits, labels) -> None:
    mix = RobustMixup(net, num_classes=10, eps=0.1, generator=0, **options)
    mix.climb.random_start = False
    mixed = []
    calm = mix.calm

    def spied(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        blends, soft, index = calm(images, targets)
        mixed.append((blends != images).flatten(1).any(1).nonzero().flatten().tolist())
        return blends, soft, index

    mix.calm = spied
    found = moves(mix, net, digits, labels)
    assert found == mixed
    assert [len(one) for one in found] == [count] * 3
    if 0 < count < 8:
        assert mix.last["pixel_norm"].count_nonzero() == count


def test_two_loops_of_one_transform_move_their_own_blends(net, digits, labels) -> None:
    mix = RobustMixup(net, num_classes=10, eps=0.1, fraction=0.5, generator=0)
    mix.climb.random_start = False
    loops = [AugmentedLoader(loader(digits, labels, size=s), mix, replay=2) for s in (8, 6)]
    shown: list[list[Tensor]] = [[], []]
    for batches in zip(*loops, strict=False):
        for (x, y), seen in zip(batches, shown, strict=True):
            F.cross_entropy(net(x), y).backward()
            seen.append(x.detach().clone())
    for seen, size in zip(shown, (8, 6), strict=True):
        for number, (calm, moved) in enumerate(zip(seen[::2], seen[1::2], strict=False)):
            images = digits[number * size : (number + 1) * size]
            changed = [(a != b).flatten(1).any(1) for a, b in ((calm, images), (moved, calm))]
            assert torch.equal(*changed)
            assert changed[0].sum() == size // 2


def test_batches_of_inference_mode(net, digits, labels, flow) -> None:
    with torch.inference_mode():
        images = digits[:8].clone()
    adv = JointSpaceAdv(net, flow)
    seen = shown(AugmentedLoader([(images, labels[:8])], adv, replay=2), net)
    (calm, _), (moved, _) = seen
    assert torch.equal(calm, digits[:8])
    assert not torch.equal(moved, calm)


def test_an_attack_that_rests_does_so_in_a_replay(net, digits, labels) -> None:
    mix = RobustMixup(net, num_classes=10, eps=0.1)
    mix.climb.eval()
    assert moves(mix, net, digits, labels) == [[]] * 3


def test_the_hardest_blends_move(net, digits, labels) -> None:
    attack = JointSpaceAdv(net, eta=0, eps=0.1, fraction=0.5, choose="hardest", random_start=False)
    mix = RobustMixup(net, num_classes=10, attack=attack)
    assert [len(one) for one in moves(mix, net, digits, labels)] == [4] * 3


def test_what_stands_beside_images_is_not_forgotten_where_nothing_attacks(net, digits, labels):
    batch = {"image": digits[:8], "label": labels[:8], "mask": torch.zeros(8, 8, 8)}
    mix = RobustMixup(net, num_classes=10)
    for plan in ({"epochs": (5, None)}, {"replay": 2}, {"every": 2}):
        with pytest.raises(ValueError, match="mask"):
            next(iter(AugmentedLoader([batch], mix, **plan)))


def test_weights_that_a_model_chooses_need_it_at_rest_too(digits, labels) -> None:
    mix = RobustMixup(num_classes=10, draws=4)
    with pytest.raises(ValueError, match="has no model yet"):
        next(iter(AugmentedLoader(loader(digits, labels), mix, epochs=(5, None))))


def test_rounding_outside_the_range_is_no_move() -> None:
    x = (torch.tensor([-5e-4, 0.5]).expand(2, 1, 1, 2) - 0.5) / 0.25
    adv = JointSpaceAdv(eta=0, eps=0.1, random_start=False, mean=0.5, std=0.25)
    out = adv.follow(x, None, torch.tensor([0.0, 1.0]).expand(2, 1, 1, 2))
    assert torch.equal(out[..., 0], x[..., 0])


def test_the_gradient_of_a_normalised_batch_becomes_one_of_pixels() -> None:
    std = torch.tensor([0.1, 0.2, 0.4])
    adv = JointSpaceAdv(
        eta=0, eps=0.01, norm="l2", random_start=False, mean=[0.5] * 3, std=std.tolist()
    )
    out = adv.follow(torch.zeros(1, 3, 1, 1), None, torch.ones(1, 3, 1, 1))
    assert torch.allclose(out.flatten() * std, 0.01 * F.normalize(1 / std, dim=0), atol=1e-6)


def test_what_has_no_finite_gradient_stays_and_has_not_moved(digits) -> None:
    adv = JointSpaceAdv(eta=0, eps=0.05)
    gradient = torch.ones(2, 1, 8, 8)
    gradient[1] = torch.nan
    out = adv.follow(digits[:2], None, gradient)
    assert torch.equal(out[1], digits[1])
    assert adv.last["fallback"].tolist() == [False, True]
    assert (adv.last["pixel_norm"] > 0).tolist() == [True, False]


def test_what_has_no_finite_gradient_is_not_the_hardest(digits) -> None:
    adv = JointSpaceAdv(eta=0, eps=0.1, fraction=0.5, choose="hardest", random_start=False)
    gradient = torch.ones(4, 1, 8, 8) * torch.tensor([torch.nan, 3, 1, 2])[:, None, None, None]
    out = adv.follow(digits[:4], None, gradient)
    assert (out != digits[:4]).flatten(1).any(1).tolist() == [False, True, False, True]


class Plane:
    """A manifold that needs the labels of a batch."""

    shape, latent_dim, needs_labels = (1, 8, 8), 64, True

    def __init__(self, labels: Tensor | None = None) -> None:
        self.labels = labels

    def encode(self, x: Tensor) -> Tensor:
        return x.flatten(1) * (1 + self.labels[:, None])

    def decode(self, z: Tensor) -> Tensor:
        return (z / (1 + self.labels[:, None])).unflatten(1, self.shape)

    def of_labels(self, labels: Tensor) -> Plane:
        return Plane(labels)


def test_a_conditional_flow_gets_the_labels(digits) -> None:
    adv = JointSpaceAdv(None, Plane(), eps=0, eta=0.1, random_start=False)
    x, y = 0.25 + digits[:4] / 2, torch.arange(4)
    out = adv.follow(x, y, torch.ones(4, 1, 8, 8))
    assert torch.allclose((out - x).flatten(1).amax(1), 0.1 / (1 + y), atol=1e-5)


def test_an_attack_of_the_users_rests_too(digits, labels) -> None:
    calls = []
    mix = RobustMixup(num_classes=10, attack=lambda x, t: calls.append(1) or x)
    list(AugmentedLoader(loader(digits, labels, 12, 4), mix, every=2))
    assert len(calls) == 2


def test_the_last_showing_asks_for_no_gradient(net, digits, labels) -> None:
    asked = []
    for x, y in AugmentedLoader(loader(digits, labels, 8), JointSpaceAdv(eta=0), replay=3):
        asked.append(x.requires_grad)
        F.cross_entropy(net(x), y).backward()
    assert asked == [True, True, False]


@pytest.mark.parametrize("epochs", [None, (1, None)])
def test_labels_inside_an_item_are_those_of_all_showings(epochs, net, digits, labels) -> None:
    info = {"cls": labels[:4], "path": ["a", "b", "c", "d"]}
    adv = JointSpaceAdv(eta=0, labels_getter=lambda batch: batch[1]["cls"])
    shown = []
    for x, found in AugmentedLoader([(digits[:4], info)], adv, replay=2, epochs=epochs):
        F.cross_entropy(net(x), found["cls"]).backward()
        shown.append(found)
    assert len(shown) == 2
    assert all(found["path"] == info["path"] for found in shown)
