"""On a GPU everything is as on a CPU, nothing waits for the GPU, and a step fits a CUDA graph."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from ijsat_aug import AugmentedLoader, JointSpaceAdv, RobustMixup, load_flow
from ijsat_aug.flows.checkpoint import load_state
from ijsat_aug.flows.data import load_images
from ijsat_aug.flows.fold import freeze
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.flows.glow import GlowConfig
from ijsat_aug.flows.recipe import Recipe
from ijsat_aug.training import (
    AdversarialWeightPerturbation,
    CapturedStep,
    CapturedTransform,
    MARTLoss,
    TRADESLoss,
    convert_split_batchnorm,
)
from ijsat_aug.transforms.batch import BatchTransform

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What torch remarks on streams, contexts and flags of the moment is no failure of ours.
    pytest.mark.filterwarnings("default"),
]

DEVICE = torch.device("cuda")
FLOWS = ("digits", "fashion-mnist", "cifar10-fast", "cifar10")


@contextmanager
def no_sync() -> Iterator[None]:
    """Whatever makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def on_gpu(tree: Any) -> Any:
    """Every tensor of a tree on the GPU."""
    return pytree.tree_map(lambda leaf: leaf.to(DEVICE) if isinstance(leaf, Tensor) else leaf, tree)


def colour_network() -> nn.Sequential:
    """A network for 32 pixels in colour, with all that an attack could disturb."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1),
        nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(32, 10),
    )  # fmt: skip


def colour_batch(seed: int = 0, count: int = 16) -> tuple[Tensor, Tensor]:
    """Samples of a flow, and classes, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    x = load_flow("cifar10-fast").sample(count, 0.7, generator)
    return x.to(DEVICE), torch.randint(10, (count,), generator=generator).to(DEVICE)


def share_of_equal(a: Tensor, b: Tensor, within: float = 1e-3) -> float:
    """A sign of a gradient near zero may turn; all other values agree."""
    return float(((a.double().cpu() - b.double().cpu()).abs() <= within).double().mean())


# The flow


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.cpu().double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("memory", ["tape", "low"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_is_as_exact_as_on_a_cpu(name: str, memory: Any) -> None:
    """Measured against float64, from which TF32 would be a hundred times as far."""
    truth = freeze(*load_state(name), dtype=torch.float64)
    flows = [load_flow(name, memory=memory), load_flow(name).to(DEVICE, memory=memory)]
    x = flows[0].sample(8, 0.7, torch.Generator().manual_seed(0))
    z = truth.encode(x) + 0.05 * torch.randn(8, truth.latent_dim, dtype=torch.float64)
    push = torch.randn(x.shape)

    def passes(flow: FrozenGlow) -> list[Tensor]:
        here = z.to(flow.device, flow.dtype).requires_grad_()
        image = flow.decode(here)
        (g,) = torch.autograd.grad(image, here, push.to(image))
        latents, tape = flow.encode_with_tape(x.to(flow.device))
        return [image.detach(), g, latents, flow.vjp(tape, push.to(image))]

    exact = passes(truth)
    cpu, gpu = ([error(f, e) for f, e in zip(passes(f), exact, strict=True)] for f in flows)
    for one, other, least in zip(cpu, gpu, (1e-6, 1e-3, 1e-6, 1e-3), strict=True):
        assert other <= max(5 * one, least), (cpu, gpu)


@pytest.mark.parametrize("name", FLOWS)
def test_bf16_networks_keep_the_round_trip_and_the_direction(name: str) -> None:
    exact = load_flow(name).to(DEVICE)
    low = load_flow(name).to(DEVICE, compute_dtype=torch.bfloat16)
    x = exact.sample(8, 0.7, torch.Generator(DEVICE).manual_seed(0))
    assert low.encode(x).dtype == torch.float32
    assert (low.decode(low.encode(x)) - x).abs().max() <= 0.03
    push = torch.randn_like(x)
    slopes = [flow.vjp(flow.encode_with_tape(x)[1], push) for flow in (exact, low)]
    assert float((slopes[0].sign() == slopes[1].sign()).float().mean()) >= 0.93


@pytest.mark.parametrize("setting", ["matmul", "convolutions", "autocast"])
def test_the_users_precision_does_not_reach_the_flow(setting: str) -> None:
    conv: Any = getattr(torch.backends.cudnn, "conv", None)
    if setting == "convolutions" and conv is None:
        pytest.skip("torch < 2.9 has no precision of convolutions alone")
    before = torch.get_float32_matmul_precision()
    before_conv = None if conv is None else conv.fp32_precision
    flow = load_flow("cifar10").to(DEVICE)
    x = torch.rand(8, *flow.shape, device=DEVICE)
    try:
        if setting == "matmul":
            torch.set_float32_matmul_precision("high")
        if setting == "convolutions":
            conv.fp32_precision = "ieee"  # alone: torch's own contexts then raise
        with torch.autocast("cuda", torch.bfloat16, enabled=setting == "autocast"):
            assert (flow.decode(flow.encode(x)) - x).abs().max() <= 2e-5
    finally:
        torch.set_float32_matmul_precision(before)
        if conv is not None:
            conv.fp32_precision = before_conv


@pytest.mark.parametrize("options", [{"steps": 3}, {"steps": 1}, {"steps": 1, "mean": 0.5}])
def test_a_zero_budget_returns_the_batch_bit_for_bit(options: dict, flow: FrozenGlow, net) -> None:
    """Also where the flow is asked: its radius is zero, to float32."""
    std = {"std": 0.25} if "mean" in options else {}
    adv = JointSpaceAdv(
        net.to(DEVICE), flow, eps=0, eta=1e-30, random_start=False, method="exact", **options, **std
    )
    x = torch.rand(8, 1, 8, 8, device=DEVICE)
    x = (x - 0.5) / 0.25 if std else x
    assert torch.equal(adv(x), x)
    assert adv.last["latent_norm"].is_cuda


# The attack


ATTACKS = {
    "pixels": {"eta": 0, "eps": 0.1, "steps": 3},
    "pixels, l2": {"eta": 0, "eps": 0.5, "norm": "l2", "steps": 3},
    "linear": {"eps": 0.1},
    "linear, l2": {"eps": 0.5, "norm": "l2", "latent_norm": "l2"},
    "latent, linear": {"eps": 0},
    "latent, 3 steps": {"eps": 0, "steps": 3},
    "exact": {"eps": 0.1, "method": "exact"},
    "exact, 3 steps": {"eps": 0.1, "steps": 3},
    "exact, 3 steps, l2": {"eps": 0.5, "norm": "l2", "latent_norm": "l2", "steps": 3},
    "prediction": {"eps": 0.1, "target": "prediction", "best": True, "steps": 2},
    "kl": {"eps": 0.1, "objective": "kl"},
    "normalised": {"eps": 0.1, "mean": 0.5, "std": 0.25},
    "friendly": {"eps": 0.1, "steps": 3, "tau": 0},
    "other class": {"eps": 0.1, "target": "random", "targeted": True},
}


def agree(one: BatchTransform, two: BatchTransform, x: Tensor, y: Tensor) -> None:
    """The same parameters lead to the same batch on CPU and GPU."""
    expected, targets, params = one.augment(x, y)
    found, labels, _ = two.augment(*on_gpu((x, y, params)))
    assert found.device.type == labels.device.type == DEVICE.type
    assert found.dtype == x.dtype
    torch.testing.assert_close(labels.cpu(), targets, atol=1e-6, rtol=0)
    assert not torch.equal(expected[: len(x)], x) or one.mode == "append"
    assert share_of_equal(found, expected) >= 0.98
    assert one.last.keys() == two.last.keys()
    assert not any(bool(t.last["fallback"].any()) for t in (one, two))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", ATTACKS)
def test_the_attack_agrees_with_a_cpu(
    kind: str, soft: bool, net: nn.Module, flow: FrozenGlow, digits: Tensor, labels: Tensor
) -> None:
    """In float64 but for the flow, so that only signs next to zero may differ."""
    x, y = digits[:32].double(), labels[:32]
    if "mean" in ATTACKS[kind]:
        x = (x - 0.5) / 0.25
    if soft:
        y = torch.lerp(*(F.one_hot(t, 10).float() for t in (y, y.roll(1))), 0.3)
    nets = net.double(), copy.deepcopy(net).to(DEVICE)
    agree(*(JointSpaceAdv(n, flow, **ATTACKS[kind]) for n in nets), x, y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.3, "draws": 3},
        {"lam_steps": 2, "rho": 0.2},
        {"mode": "append"},
        {"fraction": 0.5},
        {"order": "attack-mix"},
        {"label": "geometric"},
        {"space": "latent"},
        {"space": "spherical"},
    ],
)
@pytest.mark.parametrize("joint", [False, True])
def test_robust_mixup_agrees_with_a_cpu(
    joint: bool, options: dict, net: nn.Module, flow: FrozenGlow, digits: Tensor, labels: Tensor
) -> None:
    options |= {"flow": flow} if "space" in options else {}
    nets = net.double(), copy.deepcopy(net).to(DEVICE)
    attack = (lambda n: JointSpaceAdv(n, flow, steps=3)) if joint else lambda n: None
    mixes = (RobustMixup(n, num_classes=10, attack=attack(n), **options) for n in nets)
    agree(*mixes, digits[:32].double(), labels[:32])


# What a step leaves behind


TRANSFORMS: dict[str, Callable[[nn.Module], BatchTransform]] = {
    "JointSpaceAdv": lambda net: JointSpaceAdv(net, "cifar10-fast", generator=0),
    "3 steps, bf16": lambda net: JointSpaceAdv(
        net, load_flow("cifar10-fast", DEVICE, compute_dtype=torch.bfloat16), steps=3,
        amp_dtype=torch.bfloat16, generator=0,
    ),
    "train mode": lambda net: JointSpaceAdv(net, "cifar10-fast", model_mode="train", generator=0),
    "RobustMixup": lambda net: RobustMixup(net, num_classes=10, generator=0),
    "IJSAT": lambda net: RobustMixup(
        net, num_classes=10, attack=JointSpaceAdv(net, "cifar10-fast", fraction=0.5), generator=0
    ),
    "appended": lambda net: RobustMixup(net, num_classes=10, mode="append", generator=0),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_model_and_random_state_are_as_before(kind: str, dtype: torch.dtype) -> None:
    net = colour_network().to(DEVICE)
    x, y = colour_batch()
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    flags = [(m, m.training) for m in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state(), torch.cuda.get_rng_state()
    out, _ = TRANSFORMS[kind](net)(x, y)
    again, _ = TRANSFORMS[kind](net)(x, y)
    assert (out.device, out.dtype, out.requires_grad) == (x.device, dtype, False)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.isfinite().all()
    assert not torch.equal(out[-len(x) :], x)
    assert share_of_equal(out, again) >= 0.98
    assert all(m.training == flag for m, flag in flags)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    now = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(random, now, strict=True))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 3])
def test_budgets_hold(norm: Any, steps: int) -> None:
    eps, eta = (0.03, 0.02) if norm == "linf" else (0.5, 1.0)
    x, y = colour_batch()
    adv = JointSpaceAdv(
        colour_network().to(DEVICE), "cifar10-fast", eps=eps, eta=eta, norm=norm,
        latent_norm=norm, steps=steps,
    )  # fmt: skip
    out, _ = adv(x, y)
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert 0.5 * eps <= float(adv.last["pixel_norm"].max()) <= eps * (1 + 1e-5)
    assert 0.5 * eta <= float(adv.last["latent_norm"].max()) <= eta * (1 + 1e-4)
    assert float((adv.last["loss"] - adv.last["loss_start"]).mean()) >= 0 or steps == 1


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "autocast"])
def test_contexts_change_nothing(context: str, net, flow: FrozenGlow, digits, labels) -> None:
    x, y = on_gpu((digits[:32], labels[:32]))
    adv = JointSpaceAdv(net.to(DEVICE), flow, eps=0.1, steps=3)
    expected, _, params = adv.augment(x, y)
    inside: Any = {
        "no_grad": torch.no_grad, "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cuda", torch.bfloat16),
    }[context]  # fmt: skip
    with inside():
        out, _, _ = adv.augment(x, y, params)
        fresh, _ = adv(x, y)
    assert out.dtype == fresh.dtype == torch.float32
    assert not torch.equal(fresh, x)
    least = 0.8 if context == "autocast" else 0.98  # bf16 turns some signs
    assert share_of_equal(out, expected) >= least
    assert share_of_equal(out, x) < least


# No waiting, and graphs


def test_the_watch_sees_a_sync() -> None:
    with pytest.raises(RuntimeError, match=r"[Ss]ynchroniz"), no_sync():
        torch.ones(1, device=DEVICE).item()


@pytest.mark.parametrize(
    "make",
    [
        *TRANSFORMS.values(),
        lambda net: JointSpaceAdv.preset("accuracy", net),
        lambda net: RobustMixup.preset("accuracy", net, num_classes=10),
        lambda net: RobustMixup.preset("robust", net, num_classes=10),
        lambda net: RobustMixup(net, num_classes=10, draws=2, lam_steps=1, mean=0, std=1),
        lambda net: JointSpaceAdv(net, "cifar10-fast", p=0.999, fraction=0.5, objective="margin"),
        lambda net: JointSpaceAdv(
            net, "cifar10-fast", target="random", targeted=True, norm="l2", eps=0.5
        ),
    ],
    ids=[*TRANSFORMS, "accuracy", "accuracy, mixed", "robust", "weights", "some", "targeted"],
)
def test_a_step_never_waits_for_the_gpu(make: Callable[[nn.Module], BatchTransform]) -> None:
    """From the second batch on: the first one is looked at."""
    net = colour_network().to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    transform = make(net)
    x, y = colour_batch()

    def step() -> None:
        images, labels = transform(x, y)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    step()
    with no_sync():
        step()
    assert transform.last


def test_a_calm_batch_never_waits_but_the_first_attack_is_looked_at() -> None:
    mix = RobustMixup.preset("accuracy", colour_network().to(DEVICE), num_classes=10)
    adv = JointSpaceAdv(colour_network().to(DEVICE), "cifar10-fast")
    x, y = colour_batch()
    for transform in (mix, adv):
        transform.calm(x, y)
        with no_sync():
            transform.calm(x, y)
    with pytest.raises(ValueError, match="knows the classes 0 to 9"):
        adv(x, y + 10)


def test_a_larger_image_never_waits_either() -> None:
    """Through the pyramid."""
    net = colour_network().to(DEVICE)
    adv = JointSpaceAdv(net, "cifar10-fast")
    x, y = torch.rand(4, 3, 96, 64, device=DEVICE), torch.arange(4, device=DEVICE)
    with pytest.warns(UserWarning, match="low band"):
        adv(x, y)
    with no_sync():
        out, _ = adv(x, y)
    assert not torch.equal(out, x)


GRAPHS: dict[str, Callable[[nn.Module], BatchTransform]] = {
    "accuracy": lambda net: JointSpaceAdv.preset("accuracy", net),
    "accuracy, mixed": lambda net: RobustMixup.preset("accuracy", net, num_classes=10),
    "3 steps": lambda net: JointSpaceAdv(net, "cifar10-fast", steps=3, amp_dtype=torch.bfloat16),
    "3 steps, mixed": lambda net: RobustMixup(
        net, num_classes=10, attack=JointSpaceAdv(net, "cifar10-fast", steps=3)
    ),
    "appended": lambda net: RobustMixup(
        net, num_classes=10, attack=JointSpaceAdv(net, "cifar10-fast"), mode="append"
    ),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_step_is_a_cuda_graph(kind: str) -> None:
    """Attack and training step in one graph, fed with new batches, as step by step."""
    net = colour_network().to(DEVICE)
    net = convert_split_batchnorm(net) if kind == "appended" else net
    net[8].p = 0.0  # the graph's dropout draws other numbers
    twin = copy.deepcopy(net)

    def stepper(net: nn.Module) -> tuple[BatchTransform, Callable[..., tuple[Tensor, Tensor]]]:
        transform = GRAPHS[kind](net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)

        def step(x: Tensor, y: Tensor, params: Any) -> tuple[Tensor, Tensor]:
            images, labels, _ = transform.augment(x, y, params)
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return images, loss.detach()

        return transform, step

    def batch(transform: BatchTransform, seed: int) -> tuple[Any, ...]:
        x, y = colour_batch(seed)
        return x, y, transform.draw(x, transform.as_labels(x, y))

    transform, graph_step = stepper(net)
    static = pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch(transform, 0)
    )
    outcome: list[Tensor] = []

    def run() -> None:
        outcome[:] = graph_step(*static)

    replay = captured(run)
    net.load_state_dict(twin.state_dict())
    transform_twin, eager_step = stepper(twin)
    for seed in (1, 2, 3):
        fresh = batch(transform_twin, seed)
        for old, new in zip(pytree.tree_leaves(static), pytree.tree_leaves(fresh), strict=True):
            old.copy_(new)
        replay()
        images, loss = eager_step(*fresh)
        assert not torch.equal(images[-16:], fresh[0])
        assert share_of_equal(outcome[0], images) >= 0.95, seed
        torch.testing.assert_close(outcome[1], loss, rtol=2e-2, atol=1e-3)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("outside", [False, True])
def test_a_captured_step_trains_as_a_called_one(outside: bool) -> None:
    """Also with a last batch that is smaller, and called on a stream of the user's."""
    net = colour_network().to(DEVICE)
    net[8].p = 0.0
    twin = copy.deepcopy(net)

    def stepper(net: nn.Module) -> tuple[BatchTransform, Callable[..., Tensor]]:
        transform = GRAPHS["accuracy, mixed"](net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

        def step(x: Tensor, y: Tensor, params: Any) -> Tensor:
            images, labels, _ = transform.augment(x, y, params)
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return transform, step

    transform, step = stepper(net)
    captured_step = CapturedStep(step)
    _, called = stepper(twin)
    stream = torch.cuda.Stream()
    for seed in range(8):
        x, y = colour_batch(seed)
        x, y = (x[:5], y[:5]) if seed == 6 else (x, y)
        params = transform.draw(x, y)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream) if outside else nullcontext():
            loss = captured_step(x, y, params)
        torch.cuda.synchronize()
        torch.testing.assert_close(loss, called(x, y, params), rtol=2e-2, atol=1e-3)
    assert captured_step.captured


def test_a_step_whose_batches_are_left_as_they_are_is_captured() -> None:
    net = colour_network().to(DEVICE)
    mix = RobustMixup(net, num_classes=10, p=0)
    step = CapturedStep(lambda x, y, params: net(mix.augment(x, y, params)[0]).sum())
    for seed in range(5):
        x, y = colour_batch(seed)
        step(x, y, mix.draw(x, y))
    assert step.captured


# The outer loop


def test_a_loader_moves_shows_twice_and_attacks() -> None:
    net = colour_network().to(DEVICE).eval()
    x, y = (t.cpu() for t in colour_batch(count=40))
    inner = DataLoader(TensorDataset(x, y), batch_size=16, pin_memory=True)
    loader = AugmentedLoader(inner, JointSpaceAdv(flow="cifar10-fast", eps=0.02), "cuda", replay=2)
    shown, losses = [], []
    for images, classes in loader:
        assert images.is_cuda
        assert classes.is_cuda
        loss = F.cross_entropy(net(images), classes)
        loss.backward()
        shown.append(images.detach().cpu())
        losses.append(float(loss.detach()))
    assert len(shown) == len(loader) == 6
    assert torch.equal(torch.cat(shown[::2]), x)
    moved = (torch.cat(shown[1::2]) - x).flatten(1).abs().amax(1)
    assert bool((moved > 0).all())
    assert sum(losses[1::2]) > sum(losses[::2])


def test_losses_of_adversarial_training_and_weight_perturbation() -> None:
    net = colour_network().to(DEVICE)
    x, y = colour_batch()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    awp = AdversarialWeightPerturbation(net, gamma=0.01)
    for loss_of, objective in ((TRADESLoss(), "kl"), (MARTLoss(), "ce")):
        worse, _ = JointSpaceAdv(net, "cifar10-fast", objective=objective, steps=2)(x, y)
        before = [p.detach().clone() for p in net.parameters()]
        with awp(lambda w=worse, f=loss_of: f(net(x), net(w), y)) as loss:
            assert loss.isfinite()
            loss.backward()
        assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.isfinite().all() for p in net.parameters())
        assert not all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_split_batchnorm_keeps_two_statistics() -> None:
    net = convert_split_batchnorm(colour_network()).to(DEVICE)
    attack = JointSpaceAdv(net, "cifar10-fast", eps=0.3)
    images, labels = RobustMixup(net, num_classes=10, attack=attack, mode="append")(*colour_batch())
    loss = F.cross_entropy(net(images), labels)
    loss.backward()
    assert loss.isfinite()
    norm: Any = net[1]
    assert norm.num_batches_tracked == norm.auxiliary.num_batches_tracked == 1
    assert not torch.allclose(norm.running_var, norm.auxiliary.running_var)
    assert norm.auxiliary.weight.grad.is_cuda


# Evaluation, and training of flows


def test_an_evaluation_agrees_with_a_cpu_and_resumes(tmp_path, net, flow, digits, labels) -> None:
    pytest.importorskip("pyautoattack")
    from ijsat_aug.evaluation import evaluate, make_threat
    from ijsat_aug.evaluation.autoattack import auto_attack

    quick = make_threat("autoattack=4/255", shape=(1, 8, 8))
    quick = dataclasses.replace(quick, attack=auto_attack("linf", 4 / 255, queries=20))
    asked: Any = {
        "threats": ["linf=0.1@5", quick, "jsa=0.1@5", "stadv@5"], "flow": flow,
        "corruptions": ["contrast", "gaussian_noise"],
    }  # fmt: skip
    x, y = digits[:16], labels[:16]
    cpu = evaluate(net, x, y, **asked | {"threats": ["linf=0.1@5", "jsa=0.1@5", "stadv@5"]})
    gpu = evaluate(net.to(DEVICE), x, y, folder=tmp_path, **asked)
    assert gpu.results.keys() == cpu.results.keys() | {"autoattack"}
    for name, result in cpu.results.items():
        pairs = zip(result.correct, gpu.results[name].correct, strict=True)
        assert sum(one != two for one, two in pairs) <= 2, name
    assert gpu.accuracy("autoattack") <= gpu.accuracy("clean")
    again = evaluate(net, x, y, folder=tmp_path, **asked)
    assert again.results == gpu.results


def test_a_flow_trains_and_resumes(tmp_path) -> None:
    pytest.importorskip("accelerate")
    from ijsat_aug.flows.trainer import train_flow

    config = GlowConfig(shape=(1, 8, 8), levels=2, steps=2, hidden=16, bins=17, logit=0.05)
    recipe = Recipe(
        epochs=1, batch_size=128, lr=4e-3, warmup=2, every=4, held_out=0.1, ema=0.9,
        precision="bf16",
    )  # fmt: skip
    data = load_images("digits")
    first = load_flow(train_flow(data, config, tmp_path, recipe, quiet=True)).info
    recipe = dataclasses.replace(recipe, epochs=3)
    flow = load_flow(train_flow(data, config, tmp_path, recipe, resume=True, quiet=True))
    last = flow.info
    assert (first["training"]["steps"], last["training"]["steps"]) == (10, 30)
    assert last["training"]["skipped_steps"] == 0
    assert torch.cuda.get_device_name() in last["training"]["hardware"]
    bits = [info["metrics"]["bits_per_dim"]["held_out"] for info in (first, last)]
    assert bits[1] < bits[0] - 0.1
    assert last["metrics"]["round_trip"]["real"] < 1e-4
    flow = flow.to(DEVICE)
    assert flow.sample(2).is_cuda


def jointly(net: nn.Module) -> JointSpaceAdv:
    return JointSpaceAdv(net, "cifar10-fast", steps=2, best=True, fraction=0.5, generator=0)


def mixed(net: nn.Module) -> RobustMixup:
    return RobustMixup.preset("accuracy", net, num_classes=10, generator=0)


def appended(net: nn.Module) -> RobustMixup:
    attack = JointSpaceAdv(net, "cifar10-fast", generator=0)
    return RobustMixup(net, num_classes=10, attack=attack, mode="append", lam_steps=1, generator=0)


@pytest.mark.parametrize("make", [jointly, mixed, appended])
def test_a_captured_transform_moves_as_a_called_one(make: Any) -> None:
    net = colour_network().to(DEVICE)
    twin = copy.deepcopy(net)
    captured_one, called = CapturedTransform(make(net)), make(twin)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    kept = []
    for seed in range(12):
        batch = colour_batch(seed)
        if seed == 9:  # the weights move to another place
            net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        twin.load_state_dict(net.state_dict())
        ours, theirs = captured_one(batch), called(*batch)
        kept.append((ours[0], ours[0].clone()))
        assert share_of_equal(ours[0], theirs[0]) >= 0.95, seed
        torch.testing.assert_close(ours[1], theirs[1])
        assert captured_one.transform.last.keys() == called.last.keys()
        facts = (captured_one.transform.last["loss"], called.last["loss"])
        torch.testing.assert_close(*facts, rtol=1e-2, atol=1e-2, equal_nan=True)
        F.cross_entropy(net(ours[0]), ours[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert captured_one._step.captured == (seed in (4, 5, 6, 7, 8)), seed
    for images, as_they_were in kept:  # no batch is overwritten by a later one
        assert torch.equal(images, as_they_were)


def test_a_captured_loader_takes_every_batch_and_new_settings() -> None:
    net = colour_network().to(DEVICE)
    batches = [colour_batch(seed) for seed in range(7)]
    batches.append(tuple(part[:3] for part in batches[0]))  # type: ignore[arg-type]
    mix, called = (RobustMixup(net, num_classes=10, generator=0) for _ in range(2))
    ours = AugmentedLoader(batches, mix, captured=True)
    for eps in (1 / 255, 8 / 255):
        for one in (mix, called):
            assert isinstance(one.attack, JointSpaceAdv)
            one.attack.threat = dataclasses.replace(one.attack.threat, eps=eps)
        for (x, y), (a, b) in zip(ours, map(called, batches), strict=True):
            assert share_of_equal(x, a) >= 0.95
            torch.testing.assert_close(y, b)
        assert ours._graph is not None
        assert ours._graph._step.captured


# Last: a capture that failed is not sure to leave the device as it was.


def test_what_cannot_be_captured_is_told() -> None:
    step = CapturedStep(lambda x: x * 2 if x.sum() > 0 else x)
    x = torch.ones(2, device=DEVICE)
    for _ in range(3):
        step(x)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        step(x)
    with pytest.raises(ValueError, match="move it first"):
        step(x, torch.ones(2))
    assert nn.Dropout(0.5)(x).shape == (2,)  # the generator has left the capture


def test_a_capture_that_was_interrupted_has_ended() -> None:
    calls = []

    def step(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return x * 2

    captured, x = CapturedStep(step), torch.ones(2, device=DEVICE)
    for _ in range(3):
        captured(x)
    with pytest.raises(KeyboardInterrupt):
        captured(x)
    assert nn.Dropout(0.5)(x).shape == (2,)
    assert captured(x).tolist() == [2, 2]
