"""What an attack costs, in counted operations: forwards, backwards, weight gradients, the loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ijsat_aug import FrozenGlow
from ijsat_aug.transforms.functional import joint_space_adv


class Count(TorchDispatchMode):
    """Counts aten operations, syncs with the host, and backward passes of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.weight_gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        self.ops[name] += 1
        if name == "aten.convolution_backward":
            self.weight_gradients += bool(args[-1][1])
        return func(*args, **(kwargs or {}))

    @property
    def syncs(self) -> int:
        return sum(self.ops[f"aten.{n}"] for n in ("_local_scalar_dense", "nonzero", "item"))


def counted(run: Callable[[], object]) -> Count:
    with Count() as count:
        run()
    return count


def minimal_step(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """The model's own work: forward, loss, backward to the image."""

    def run() -> None:
        leaf = x.detach().requires_grad_()
        loss = F.cross_entropy(network(leaf), y, reduction="none")
        torch.autograd.grad(loss, leaf, torch.ones(len(x)))

    return run


def per_step(attack: Callable[[int], object]) -> tuple[float, int]:
    """Operations and syncs of one more step."""
    few, many = counted(lambda: attack(2)), counted(lambda: attack(12))
    return (many.ops.total() - few.ops.total()) / 10, many.syncs - few.syncs


@pytest.fixture
def frozen(network: nn.Sequential) -> nn.Sequential:
    return network.eval()


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 6),
        ({"mean": 0.0, "std": 1.0}, 9),  # the normalisation, forth and back
        ({"norm": "l2"}, 18),  # two norms of the gradient, one of the move, box and ball apart
        ({"best": True}, 13),
    ],
)
def test_the_loop_adds_few_operations_and_no_sync(options, limit, frozen, digits, labels) -> None:
    x, y = digits[:4], labels[:4]
    own = counted(minimal_step(frozen.requires_grad_(False), x, y)).ops
    own_total = own.total() - 2  # the leaf and the ones are the loop's
    total, syncs = per_step(
        lambda steps: joint_space_adv(x, y, frozen, eps=0.1, steps=steps, **options)
    )
    assert total - own_total <= limit
    assert syncs == 0


@pytest.mark.parametrize(
    ("options", "limit"), [({}, 24), ({"norm": "l2", "latent_norm": "l2"}, 46)]
)
def test_the_joint_loop_adds_few_operations_to_model_and_flow(
    options, limit, frozen, digits, labels, flow
) -> None:
    x, y = digits[:4], labels[:4]
    z = flow.encode(x)

    def minimal() -> None:
        leaf = z.detach().requires_grad_()
        loss = F.cross_entropy(frozen(flow.decode(leaf)), y, reduction="none")
        torch.autograd.grad(loss, leaf, torch.ones(len(x)))

    frozen.requires_grad_(False)
    own = counted(minimal).ops.total()
    total, syncs = per_step(
        lambda steps: joint_space_adv(x, y, frozen, flow, eps=0.1, eta=0.05, steps=steps, **options)
    )
    # The updates of two variables, and 12 for add and clip, forth and back, twice.
    assert total - own <= limit
    assert syncs == 0


@pytest.mark.parametrize("budget", [{"eps": 0.1}, {"eta": 0.05}, {"eps": 0.1, "eta": 0.05}])
@pytest.mark.parametrize("steps", [1, 3])
def test_exactly_steps_forwards_and_backwards(budget, steps, network, digits, labels, flow) -> None:
    x, y = digits[:4], labels[:4]
    forwards: list[int] = []
    network.register_forward_hook(lambda m, i, o: forwards.append(1))
    count = counted(lambda: joint_space_adv(x, y, network, flow, steps=steps, **budget))
    assert len(forwards) == steps
    assert count.ops["aten._log_softmax_backward_data"] == steps
    assert count.ops["aten.convolution_backward"] == 2 * steps  # the flow's gradient has none
    assert count.weight_gradients == 0
    assert count.ops["aten.native_batch_norm_backward"] == 2 * steps
    if "eta" not in budget:
        assert count.ops["aten.mm"] == steps  # of the linear layer: to its input alone


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"best": True}, 1),
        ({"objective": "kl", "start": True}, 1),
        ({"labels": None}, 0),
        ({"labels": None, "start": True}, 1),
        ({"tau": 100}, 0),
    ],
)
def test_what_costs_a_forward_more(options, extra, network, digits, labels) -> None:
    x = digits[:4]
    forwards: list[int] = []
    network.register_forward_hook(lambda m, i, o: forwards.append(1))
    y = options.pop("labels", labels[:4])
    start = 0.01 * torch.randn_like(x) if options.pop("start", False) else None
    joint_space_adv(x, y, network, eps=0.1, steps=3, pixel_start=start, **options)
    assert len(forwards) == 3 + extra


def flow_calls(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], flow: FrozenGlow
) -> Counter[str]:
    calls: Counter[str] = Counter()

    def counting(name: str) -> None:
        method = getattr(FrozenGlow, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(FrozenGlow, name, call)

    for name in ("encode", "encode_with_tape", "decode", "vjp"):
        counting(name)
    run()
    return calls


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"encode": 1, "decode": 7, "vjp": 6}),
        ({"latent_steps": 2}, {"encode": 1, "decode": 3, "vjp": 2}),
        ({"update": "alternating"}, {"encode": 1, "decode": 4, "vjp": 3}),
        ({"update": "sequential", "latent_steps": 1}, {"encode": 1, "decode": 2, "vjp": 1}),
        ({"method": "linear"}, {"encode_with_tape": 1, "decode": 1, "vjp": 1}),
        # ... and one more decode at the end for those who went on different ways.
        ({"latent_steps": 2, "tau": 100}, {"encode": 1, "decode": 4, "vjp": 2}),
        ({"start": True}, {"encode": 1, "decode": 8, "vjp": 6}),
    ],
)
def test_a_pixel_step_does_not_call_the_flow(
    options, expected, network, digits, labels, flow, monkeypatch
) -> None:
    x, y = digits[:4], labels[:4]
    start = 0.01 * torch.randn(4, 64) if options.pop("start", False) else None
    calls = flow_calls(
        monkeypatch,
        lambda: joint_space_adv(
            x, y, network, flow, eps=0.01, eta=0.02, steps=6, latent_start=start, **options
        ),
        flow,
    )
    assert calls == expected


def test_friendly_batches_shrink(network, digits, labels) -> None:
    network.eval()
    x, y = digits[:64], labels[:64].clone()
    y[:32] = (y[:32] + 1) % 10  # wrong from the start
    sizes: list[int] = []
    network.register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    out = joint_space_adv(x, y, network, eps=0.2, steps=10, tau=0)
    assert sizes[0] == 64
    assert sizes[1] <= 34
    assert sizes == sorted(sizes, reverse=True)
    assert torch.equal(out[:32], x[:32])
    # Whoever was left alone is wrong by as little as possible, and stays wrong.
    wrong = network(out).argmax(1) != y
    hard = joint_space_adv(x, y, network, eps=0.2, steps=10)
    assert torch.equal(wrong, wrong | (network(hard).argmax(1) != y))
    loss = [F.cross_entropy(network(o[32:]), y[32:]).item() for o in (out, hard)]
    assert loss[0] < loss[1]
    patient = joint_space_adv(x, y, network, eps=0.2, steps=10, tau=100)
    assert torch.equal(patient, hard)
