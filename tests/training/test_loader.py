"""AugmentedLoader: the loader's own behaviour, and a fresh model for every batch."""

from __future__ import annotations

import copy
import itertools
import pickle
import types
import weakref
from collections import UserDict, namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
)

from ijsat_aug import AugmentedLoader, JointSpaceAdv, RobustMixup
from ijsat_aug.training import CapturedTransform, collate

Pair = namedtuple("Pair", "image label")
X, Y = torch.rand(8, 1, 8, 8), torch.arange(8)


@pytest.fixture
def data(digits, labels) -> TensorDataset:
    return TensorDataset(digits[:50], labels[:50])


def test_it_is_the_loader_with_other_batches(data, network) -> None:
    plain = DataLoader(data, batch_size=16, shuffle=True, num_workers=1)
    loader = AugmentedLoader(plain, RobustMixup(network, num_classes=10), "cpu")
    assert len(loader) == len(plain) == 4
    assert loader.dataset is data
    assert loader.sampler is plain.sampler
    assert loader.batch_sampler is plain.batch_sampler
    assert loader.batch_size == 16
    for _ in range(2):
        sizes = [(len(x), tuple(t.shape)) for x, t in loader]
        assert sizes == [(16, (16, 10))] * 3 + [(2, (2, 10))]
    with pytest.raises(AttributeError, match="nonsense"):
        _ = loader.nonsense


def test_a_packed_sequence_keeps_its_sizes_on_the_cpu() -> None:
    words = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    ((_, moved),) = AugmentedLoader([(X, words)], lambda batch: batch, "meta")
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")


def test_the_model_is_fresh_for_every_batch(data) -> None:
    """The transform of batch k sees the weights after k training steps."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    seen = []

    def transform(batch):
        seen.append(float(net[1].bias[0].detach()))
        return batch

    loader = AugmentedLoader(DataLoader(data, batch_size=10, num_workers=1), transform, "cpu")
    with torch.no_grad():
        net[1].bias.zero_()
        for _ in loader:
            net[1].bias.add_(1)
    assert seen == [0, 1, 2, 3, 4]


def test_unsized_loaders_and_epochs(data) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ((torch.rand(1, 8, 8), i) for i in range(6))

    loader = AugmentedLoader(DataLoader(Stream(), batch_size=4), lambda batch: batch)
    assert [len(x) for x, _ in loader] == [4, 2]
    with pytest.raises(TypeError):
        len(loader)
    generator = AugmentedLoader((torch.rand(2, 1) for _ in range(3)), lambda batch: batch * 0)
    assert [float(b.sum()) for b in generator] == [0, 0, 0]
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    sharded = AugmentedLoader(DataLoader(data, batch_size=5, sampler=sampler), lambda batch: batch)
    sharded.set_epoch(3)
    assert sampler.epoch == 3


@pytest.mark.parametrize("make", [tuple, list, lambda items: Pair(*items)])
def test_batches_keep_their_structure_on_the_way_to_the_device(make) -> None:
    batch = make([torch.rand(2, 1, 4, 4), {"label": torch.ones(2), "path": ["a", "b"]}])
    (out,) = AugmentedLoader([batch], lambda batch: batch, "meta")
    assert type(out) is type(batch)
    assert out[0].device.type == "meta"
    assert out[1]["label"].device.type == "meta"
    assert out[1]["path"] == ["a", "b"]


def test_a_worker_that_lost_the_model_is_told_where_it_is(data) -> None:
    """As a spawned one has, into which a pickle brings no model."""
    for transform in (JointSpaceAdv(None, eta=0), RobustMixup(num_classes=10)):
        loader = DataLoader(
            data, batch_size=8, collate_fn=collate(transform), num_workers=1,
            multiprocessing_context="fork",
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"stale copy.*AugmentedLoader"):
            next(iter(loader))


def test_collate_runs_here_and_refuses_workers(data, network) -> None:
    function = collate(RobustMixup(network, num_classes=10))
    x, t = next(iter(DataLoader(data, batch_size=8, collate_fn=function)))
    assert x.shape == (8, 1, 8, 8)
    assert t.shape == (8, 10)
    loader = DataLoader(
        data, batch_size=8, collate_fn=function, num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(ValueError, match=r"stale copy.*AugmentedLoader"):
        next(iter(loader))


def test_a_transform_must_be_callable(data) -> None:
    with pytest.raises(TypeError, match=r"as in AugmentedLoader\(.*got str"):
        AugmentedLoader(DataLoader(data), "mixup")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got RobustMixup"):
        AugmentedLoader(DataLoader(data), RobustMixup)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_arrive_complete_and_in_order(data) -> None:
    loader = AugmentedLoader(DataLoader(data, batch_size=7), lambda batch: batch, "cuda")
    batches = list(loader)
    assert all(x.is_cuda and y.is_cuda for x, y in batches)
    assert torch.equal(torch.cat([x.cpu() for x, _ in batches]), data.tensors[0])


def test_copies_pickles_and_attributes(data) -> None:
    inner = DataLoader(data, batch_size=10)
    loader = AugmentedLoader(inner, RobustMixup(num_classes=10, eps=0), "cpu")
    for twin in (copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert isinstance(twin, AugmentedLoader)
        assert next(iter(twin))[1].shape == (10, 10)
    loader.mixup_enabled = False  # as timm's script does
    assert inner.mixup_enabled is False
    assert AugmentedLoader(iter([1]), lambda batch: batch)  # true, though it has no length


def test_an_interrupted_pass_loses_no_batch(data) -> None:
    stream = iter(range(6))
    for batch in AugmentedLoader(stream, lambda batch: batch, "cpu"):
        if batch == 2:
            break
    assert next(stream) == 3


@pytest.mark.parametrize("where", ["batch_sampler", "dataset"])
def test_epochs_reach_whoever_counts_them(where, data) -> None:
    class Batches:
        epoch = 0

        def __iter__(self):
            yield [0, 1]

        def __len__(self):
            return 1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    class Data(TensorDataset):
        epoch = 0
        set_epoch = Batches.set_epoch

    batches, dataset = Batches(), Data(*data.tensors)
    inner = DataLoader(dataset, batch_sampler=batches) if where == "batch_sampler" else (
        DataLoader(dataset, batch_size=2)
    )  # fmt: skip
    AugmentedLoader(inner, lambda batch: batch).set_epoch(5)
    assert (batches if where == "batch_sampler" else dataset).epoch == 5


def test_a_resumed_training_hears_the_epoch_from_its_sampler(data, network) -> None:
    """torchvision's, timm's and Lightning's scripts tell the sampler alone."""
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    mix = RobustMixup(network, num_classes=10, eps=0.1)
    loader = AugmentedLoader(DataLoader(data, 25, sampler=sampler), mix, epochs=(2, 3))

    def attacked(told: int | None = None) -> bool:
        if told is not None:
            sampler.set_epoch(told)
        list(loader)
        return "loss" in mix.last

    assert [attacked(e) for e in (2, 3)] == [True, False]
    assert [attacked(e) for e in (0, 1, 2)] == [False, False, True]  # once more from the start
    assert not attacked()  # nobody tells it: the third
    loader.set_epoch(2)
    assert attacked()
    assert sampler.epoch == 2


def test_a_loader_of_every_epoch_hears_it_too(data, network) -> None:
    """Wrapped anew after the sampler was told, as where a script makes its loaders in the loop."""
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    inner = DataLoader(data, 25, sampler=sampler)
    attacked = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        mix = RobustMixup(network, num_classes=10, eps=0.1)
        next(iter(AugmentedLoader(inner, mix, epochs=(2, 3))))
        attacked.append("loss" in mix.last)
    assert attacked == [False, False, True, False]


def test_epochs_are_a_pair(data, network) -> None:
    with pytest.raises(TypeError, match=r"epochs must be \(first, end\), got 3"):
        AugmentedLoader(DataLoader(data), RobustMixup(network, num_classes=10), epochs=3)
    for wrong in (0, (), (None, 5), (0.5, 2)):
        with pytest.raises(TypeError, match="epochs must be"):
            AugmentedLoader(DataLoader(data), RobustMixup(network, num_classes=10), epochs=wrong)


def test_a_plan_is_not_assigned(data, network) -> None:
    """The loader inside would take it, and nothing would come of it."""
    loader = AugmentedLoader(DataLoader(data), RobustMixup(network, num_classes=10))
    for name in ("replay", "every", "epochs"):
        with pytest.raises(AttributeError, match=f"{name} of an AugmentedLoader is not set"):
            setattr(loader, name, 2)


@pytest.mark.parametrize("every", [1, 3])
def test_appended_batches_keep_their_size_when_the_attack_rests(every, data, network) -> None:
    adv = JointSpaceAdv(network, "digits", mode="append")
    loader = AugmentedLoader(DataLoader(data, 10), adv, every=every, epochs=(0, 1))
    for _ in range(2):
        for x, y in loader:
            assert x.shape == (20, 1, 8, 8)
            assert torch.equal(y[:10], y[10:])
    assert torch.equal(x[:10], x[10:])  # the second epoch
    with pytest.raises(ValueError, match='needs mode="replace"'):
        AugmentedLoader(DataLoader(data, 10), adv, replay=2)


def test_mappings_keep_their_kind(data) -> None:
    batch = UserDict(x=torch.ones(2), names=["a", "b"])
    (out,) = AugmentedLoader([batch], lambda batch: batch, "cpu")
    assert isinstance(out, UserDict)
    assert torch.equal(out["x"], batch["x"])


def test_one_line_in_an_ordinary_loop(data, network) -> None:
    loader = DataLoader(data, batch_size=25, shuffle=True)
    loader = AugmentedLoader(loader, RobustMixup(network, num_classes=10), "cpu")  # the line
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    before = int(network[1].num_batches_tracked)
    for x, y in loader:
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert int(network[1].num_batches_tracked) == before + 2


def test_a_loader_around_another_hears_the_epoch_too(data, network) -> None:
    sampler = DistributedSampler(data, 1, 0)
    attack = JointSpaceAdv(network, eta=0)
    inner = AugmentedLoader(DataLoader(data, 25, sampler=sampler), lambda batch: batch)
    outer = AugmentedLoader(inner, attack, epochs=(7, None))
    sampler.set_epoch(7)
    next(iter(outer))
    assert attack.last
    assert outer.epoch == inner.epoch


def test_it_hears_the_epoch_of_accelerate(data, network) -> None:
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.Accelerator(cpu=True).prepare(DataLoader(data, 25, shuffle=True))
    attack = JointSpaceAdv(network, eta=0)
    loader = AugmentedLoader(prepared, attack, epochs=(3, 5))
    attacked = []
    prepared.set_epoch(2)
    for _ in range(4):
        attack.last = {}
        for _ in loader:
            pass
        attacked.append(bool(attack.last))
    assert attacked == [False, True, True, False]


def test_a_look_at_the_first_batch_begins_no_epoch(data, network) -> None:
    """As a check of shapes, or a grid of pictures; also where an epoch is cut short."""
    mix = RobustMixup(network, num_classes=10)
    loader = AugmentedLoader(DataLoader(data, batch_size=8), mix, epochs=(1, 2))
    for _ in range(3):
        next(iter(loader))
        assert "loss" not in mix.last
    attacked = []
    for _ in range(3):
        for number, _ in enumerate(loader):
            if number == 1:
                break
        attacked.append("loss" in mix.last)
    assert attacked == [False, True, False]
    short = AugmentedLoader(DataLoader(data, batch_size=len(data)), mix, epochs=(1, None))
    assert ["loss" in mix.last for _ in range(2) for _ in short] == [False, True]


def test_a_sampler_in_a_batch_sampler_is_told(digits, labels) -> None:
    class Plain:
        """Batches of a sampler, which count no epochs themselves."""

        def __init__(self, sampler) -> None:
            self.sampler = sampler

        def __iter__(self):
            yield from BatchSampler(self.sampler, 4, drop_last=False)

        def __len__(self) -> int:
            return 2

    data = TensorDataset(digits[:8], labels[:8])
    sampler = DistributedSampler(data, 1, 0)
    loader = AugmentedLoader(DataLoader(data, batch_sampler=Plain(sampler)), lambda batch: batch)
    loader.set_epoch(5)
    assert sampler.epoch == 5


class _TellingItself:
    """A loader that tells its sampler the epoch when it begins, as those of Fabric do."""

    def __init__(self) -> None:
        self.sampler, self.passes = types.SimpleNamespace(epoch=0), 0
        self.sampler.set_epoch = lambda epoch: setattr(self.sampler, "epoch", epoch)

    def __iter__(self) -> Iterator[Any]:
        self.sampler.set_epoch(self.passes)
        self.passes += 1
        return iter([(X, Y)] * 2)

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(("start", "expected"), [(None, [3, 4]), (3, [0, 1])])
def test_what_a_loader_tells_its_own_sampler_is_no_news(start, expected, network) -> None:
    loader = AugmentedLoader(_TellingItself(), JointSpaceAdv(network, eta=0), epochs=(3, 5))
    if start is not None:
        loader.set_epoch(start)
    attacked = [p for p in range(6) if not torch.equal(next(iter(list(loader)))[0], X)]
    assert attacked == expected


@pytest.mark.parametrize("epochs", [(0, None), (5, None)])
def test_what_a_loop_does_to_a_showing_the_next_one_does_not_see(epochs, network) -> None:
    x, y = X.clone(), torch.nn.functional.one_hot(Y, 10).float()
    loader = AugmentedLoader([(x, y)], JointSpaceAdv(eta=0), replay=2, epochs=epochs)
    seen = []
    for images, labels in loader:
        seen.append((images.detach().mean(), labels.sum()))
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        with torch.no_grad():
            images.mul_(0.5)
            labels.mul_(0.5)
    assert seen[1][0] > 0.9 * seen[0][0]
    assert seen[1][1] == seen[0][1]


@pytest.mark.parametrize("epochs", [(0, None), (5, None)])
def test_nobody_holds_the_batch_while_the_model_is_trained(epochs, network) -> None:
    alive = []

    def collated(samples: list[Any]) -> Any:
        x = X.clone()
        alive.append(weakref.ref(x))
        return [x, Y]

    batches = DataLoader(range(4), batch_size=2, collate_fn=collated)
    for _ in AugmentedLoader(batches, RobustMixup(network, num_classes=10, eps=0.1), epochs=epochs):
        assert all(one() is None for one in alive)
    assert len(alive) == 2


def test_a_graph_that_was_given_is_the_one_that_works(network) -> None:
    captured = CapturedTransform(JointSpaceAdv(network, eta=0))
    assert AugmentedLoader([], captured)._graph is captured


def test_the_plan_can_be_read(network) -> None:
    loader = AugmentedLoader([], JointSpaceAdv(network, eta=0), every=3, epochs=(1, None))
    assert (loader.every, loader.epochs, loader.replay, loader.captured) == (3, (1, None), 1, False)


def test_an_epoch_that_is_told_while_it_runs_stays_what_it_was_told() -> None:
    loader = AugmentedLoader([torch.rand(2, 1, 4, 4)] * 3, lambda batch: batch)
    for number, _ in enumerate(loader):
        if number == 0:
            loader.set_epoch(7)
    assert loader.epoch == 7


def test_a_loader_without_an_end_is_told_its_epochs(data, network) -> None:
    attack = JointSpaceAdv(network, eta=0)
    endless = itertools.cycle(DataLoader(data, batch_size=8))
    loader = AugmentedLoader(endless, attack, epochs=(2, 3))
    attacked = []
    for number, _ in enumerate(itertools.islice(loader, 8)):
        attacked.append(bool(attack.last))
        attack.last = {}
        if number % 2:
            loader.set_epoch(number // 2 + 1)
    assert attacked == [False] * 4 + [True] * 2 + [False] * 2


def test_an_epoch_that_is_told_beside_the_only_batch_stays_too() -> None:
    loader = AugmentedLoader([torch.rand(2, 1, 4, 4)], lambda batch: batch)
    for _ in loader:
        loader.set_epoch(7)
    assert loader.epoch == 7


def test_a_reader_in_the_background_is_told_once(data, network) -> None:
    """There it would attack the model in the middle of a training step."""
    loader = AugmentedLoader(DataLoader(data, batch_size=8), JointSpaceAdv(network, eta=0))
    with ThreadPoolExecutor(1) as background:
        with pytest.warns(UserWarning, match="read in another thread than it was made in"):
            batches = background.submit(list, loader).result()
        assert len(batches) == len(loader)
        background.submit(list, loader).result()
        elsewhere = pickle.loads(pickle.dumps(AugmentedLoader([torch.ones(1)], torch.neg)))
        background.submit(list, elsewhere).result()  # made in a thread that is not here
