"""CapturedTransform where there is no GPU: the transform itself, or with a graph that is played.

A played graph records the operations of a capture with the tensors that they met, and a replay does
them again into the same tensors: what a CUDA graph does. On a GPU: tests/test_cuda.py.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from ijsat_aug import AugmentedLoader, JointSpaceAdv, RobustMixup, load_flow
from ijsat_aug.flows import Tiles
from ijsat_aug.training import CapturedStep, CapturedTransform
from ijsat_aug.transforms.batch import BatchTransform

Make = Callable[[nn.Module], BatchTransform]


class Recorder(TorchDispatchMode):
    """What was done, with which tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        self.done.append((op, args, kwargs, result))
        return result


class PlayedGraph:
    """A CUDA graph on a CPU."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def capture_begin(self, **options: Any) -> None:
        self.recorder.__enter__()

    def capture_end(self) -> None:
        self.recorder.__exit__(None, None, None)

    @torch.no_grad()
    def replay(self) -> None:
        for op, args, kwargs, before in self.recorder.done:
            given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for old, new in zip(tensors(before), tensors(op(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in given:
                    old.data.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors say that they are on a GPU, whose graphs are played."""

    @contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PlayedGraph)
    monkeypatch.setattr(torch.cuda, "device", nothing)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(CapturedStep, "_aside", nothing)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def named() -> dict[str, Any]:
    return {"image": torch.rand(4, 1, 8, 8), "label": torch.arange(4), "path": list("abcd")}


def batch(seed: int, count: int = 4) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=draws), torch.arange(count)


def pixels(net: nn.Module) -> JointSpaceAdv:
    return JointSpaceAdv(net, eta=0, eps=8 / 255, random_start=False, generator=0)


def jointly(net: nn.Module) -> JointSpaceAdv:
    return JointSpaceAdv(net, "digits", steps=2, best=True, fraction=0.5, generator=0)


def mixed(net: nn.Module) -> RobustMixup:
    return RobustMixup.preset("accuracy", net, "digits", num_classes=10, generator=0)


def ijsat(net: nn.Module) -> RobustMixup:
    attack = JointSpaceAdv(net, "digits", generator=0)
    return RobustMixup(net, num_classes=10, attack=attack, mode="append", generator=0)


def pair() -> tuple[CapturedTransform, JointSpaceAdv]:
    """Two of one network, the first captured."""
    net = network()
    return CapturedTransform(pixels(net)), pixels(net)


def follow(
    make: Make,
    change: Callable[[nn.Module, BatchTransform], object] = lambda net, transform: None,
    net: nn.Module | None = None,
) -> None:
    """Both do the same, before and after something changes, while the model is trained."""
    net = network() if net is None else net
    twin = copy.deepcopy(net)
    captured, called = CapturedTransform(make(net)), make(twin)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.5, momentum=0.9) for n in (net, twin)]
    kept = []
    for seed in range(14):
        if seed == 7:
            assert captured._step.captured
            change(net, captured.transform)
            change(twin, called)
        ours, theirs = captured(batch(seed)), called(batch(seed))
        kept.append((ours, theirs))
        for n, optimizer in zip((net, twin), optimizers, strict=True):
            F.cross_entropy(n(theirs[0]), theirs[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in kept:  # nor is a batch overwritten by a later one
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert captured._step.captured


@pytest.mark.parametrize("make", [pixels, jointly, mixed, ijsat])
def test_it_does_what_the_transform_does(played: None, make: Make) -> None:
    follow(make)


def eps(net: nn.Module, transform: Any) -> None:
    transform.threat = replace(transform.threat, eps=transform.threat.eps * 1.001)


def another_model(net: nn.Module, transform: BatchTransform) -> None:
    torch.manual_seed(7)
    transform.bind(network())


def another_layer(net: Any, transform: BatchTransform) -> None:
    net[2] = nn.Tanh()


def other_places(net: nn.Module, transform: BatchTransform) -> None:
    state = {name: -value for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [eps, another_model, another_layer, other_places])
def test_a_change_is_seen(played: None, change: Callable[..., None]) -> None:
    follow(pixels, change)


class Tempered(nn.Module):
    """A model with a number and a tensor beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.sign, self.shift = network(), 1.0, torch.zeros(10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.sign * self.inner(x) + self.shift
        return logits


@pytest.mark.parametrize("change", [{"sign": -1.0}, {"shift": 100 * torch.eye(10)[0]}])
def test_a_change_of_what_the_model_holds_is_seen(played: None, change: dict[str, Any]) -> None:
    follow(pixels, lambda net, _: vars(net).update(change), Tempered())


def test_a_new_graph_is_asked_for(played: None) -> None:
    """An objective of one's own is Python, of which nothing is known."""
    sign = [1.0]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return sign[0] * F.cross_entropy(logits, labels, reduction="none")

    net = network()
    captured = CapturedTransform(
        JointSpaceAdv(net, eta=0, eps=0.1, random_start=False, objective=loss)
    )
    x, y = batch(0)
    there = [captured(x, y)[0] - x for _ in range(6)][-1]
    sign[0] = -1.0
    torch.testing.assert_close(captured(x, y)[0] - x, there)
    captured.reset()
    inside = (x > 0.1) & (x < 0.9)
    torch.testing.assert_close((captured(x, y)[0] - x)[inside], -there[inside])


@pytest.mark.filterwarnings("ignore:the flow takes images")
def test_a_flow_in_tiles_stays_while_sizes_change(played: None) -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(8), network())
    tiles = Tiles(load_flow("digits"), (12, 12))
    captured = CapturedTransform(JointSpaceAdv(net, tiles, generator=0))
    called = JointSpaceAdv(net, tiles, generator=0)
    for seed in range(14):
        x, y = torch.rand(2, 1, 16 if seed == 6 else 12, 12), torch.arange(2)
        torch.testing.assert_close(captured(x, y)[0], called(x, y)[0])
        gc.collect()
        assert captured._step.captured == (seed in (4, 5, 6, 11, 12, 13))


def test_what_it_tells_is_not_overwritten(played: None) -> None:
    captured = CapturedTransform(ijsat(network()))
    told = []
    for seed in range(9):
        captured(batch(seed))
        facts = {**captured.transform.last, **captured.attack.last}
        told.append((facts, {name: fact.clone() for name, fact in facts.items()}))
    for facts, as_they_were in told:
        assert facts.keys() == as_they_were.keys()
        assert all(torch.equal(fact, as_they_were[name]) for name, fact in facts.items())


def test_what_led_to_a_batch_is_let_go(played: None) -> None:
    captured = CapturedTransform(RobustMixup(network(), num_classes=10))
    teacher, seen = nn.Linear(64, 10), []
    for seed in range(8):
        x = batch(seed)[0].requires_grad_()
        seen.append(weakref.ref(x))
        images, labels = captured(x, teacher(x.flatten(1)).softmax(1))
        assert not images.requires_grad
        assert not labels.requires_grad
        del x, images, labels
    gc.collect()
    assert [ref() for ref in seen] == [None] * 8


def test_it_goes_with_its_owner(played: None) -> None:
    captured = CapturedTransform(pixels(network()))
    gc.disable()
    try:
        ref = weakref.ref(captured._step)
        del captured
        assert ref() is None
    finally:
        gc.enable()


def test_the_shape_of_most_batches_is_captured(played: None) -> None:
    """Also where each second one is the smaller rest of an epoch."""
    captured, called = pair()
    for seed in range(12):
        given = batch(seed, 3 if seed % 2 else 4)
        torch.testing.assert_close(captured(given)[0], called(given)[0])
    assert captured._step.captured


def test_strides_and_types_are_those_of_the_batch(played: None) -> None:
    from torchvision import tv_tensors

    captured, called = pair()
    for seed in range(6):
        x, y = batch(seed)
        image = tv_tensors.Image(x)
        ours, theirs = captured(image, y)[0], called(image, y)[0]
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours.as_subclass(Tensor), theirs.as_subclass(Tensor))


def test_inference_mode_does_not_matter(played: None) -> None:
    captured, called = pair()
    for seed in range(8):
        with torch.inference_mode(seed < 6):
            given = batch(seed)
            torch.testing.assert_close(captured(given)[0], called(given)[0])
    assert captured._step.captured


def test_it_is_told_that_nothing_is_captured(played: None) -> None:
    net = network()
    captured = CapturedTransform(pixels(net))
    given = batch(0, 2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(60):
            captured.threat = replace(captured.threat, eps=0.01 + step / 1000)
            captured(given)
    assert [str(each.message).partition(":")[0] for each in told] == [
        "captured=True has captured nothing in 50 batches"
    ]


def test_a_batch_that_rests_is_left_alone(played: None) -> None:
    captured = CapturedTransform(RobustMixup(network(), num_classes=10, p=0.5, generator=0))
    called = RobustMixup(captured.model, num_classes=10, p=0.5, generator=0)
    for seed in range(14):
        for a, b in zip(captured(batch(seed)), called(batch(seed)), strict=True):
            torch.testing.assert_close(a, b)
    assert captured._step.captured


# Without a GPU


def test_without_a_gpu_it_is_the_transform() -> None:
    net, given = network(), named()
    mix, called = (RobustMixup(net, num_classes=10, generator=0) for _ in range(2))
    captured = CapturedTransform(mix)
    for _ in range(6):
        ours, theirs = captured(given), called(given)
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["label"], theirs["label"])
    assert mix.last.keys() == captured.last.keys() == called.last.keys()


def test_a_loader_takes_the_transform_that_it_has_now() -> None:
    net = network()
    loader = AugmentedLoader([named()], RobustMixup(net, num_classes=10), captured=True)
    ((first, _, _),) = (one.values() for one in loader)
    assert first.shape == (4, 1, 8, 8)
    loader.transform = JointSpaceAdv(net, "digits")
    ((_, labels, _),) = (one.values() for one in loader)
    assert torch.equal(labels, torch.arange(4))  # which the blends of the first would not keep
    assert repr(loader).endswith("device=None, captured=True)")
    again = AugmentedLoader(loader.loader, CapturedTransform(loader.transform), every=2)
    assert repr(again) == repr(loader)


def test_batches_between_are_those_of_the_transform() -> None:
    net, batches = network(), [batch(seed) for seed in range(4)]
    ours, theirs = (
        AugmentedLoader(
            batches, RobustMixup(net, num_classes=10, generator=0), every=2, captured=captured
        )
        for captured in (True, False)
    )
    for ones, others in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def test_a_copy_makes_a_graph_of_its_own() -> None:
    captured = CapturedTransform(RobustMixup(network(), num_classes=10))
    twin = copy.deepcopy(captured)
    assert twin.transform is not captured.transform
    sent = pickle.loads(pickle.dumps(captured))
    assert sent.model is None
    with pytest.raises(AttributeError, match="colour"):
        _ = captured.colour


def own(images: Tensor, targets: Tensor) -> Tensor:
    return images


class Darker(BatchTransform):
    """A transform of the user's own."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda net: JointSpaceAdv(net, "digits", model_mode="train"), "draws in the model"),
        (lambda net: JointSpaceAdv(net, "digits", tau=1), "tau=None"),
        (lambda net: RobustMixup(net, num_classes=10, attack=own), "CapturedStep"),
        (lambda net: RobustMixup(net, attack=JointSpaceAdv(net, "digits", tau=0)), "tau=None"),
        (lambda net: JointSpaceAdv(lambda x: net(x), "digits"), "make an nn.Module of it"),
        (Darker, "only JointSpaceAdv and RobustMixup can be captured, not Darker"),
        (lambda net: own, "not function"),
        (lambda net: v2.Compose([JointSpaceAdv(net, eta=0)]), "not Compose"),
    ],
)
def test_what_no_graph_repeats_is_refused(make: Callable[[nn.Module], Any], words: str) -> None:
    transform = make(network())
    with pytest.raises((TypeError, ValueError), match=words):
        CapturedTransform(transform)
    with pytest.raises((TypeError, ValueError), match=words):
        AugmentedLoader([named()], transform, captured=True)


def test_a_replay_has_nothing_to_capture() -> None:
    transform = JointSpaceAdv(network(), "digits", random_start=False)
    with pytest.raises(ValueError, match="leave one of them out"):
        AugmentedLoader([named()], transform, captured=True, replay=2)


def test_what_returns_the_transform_returns_the_captured_one(network) -> None:
    mix = CapturedTransform(RobustMixup(num_classes=10))
    assert mix.bind(network) is mix
    assert mix.model is network
    assert mix.train() is mix.eval() is mix.to("cpu") is mix
    assert not mix.training
