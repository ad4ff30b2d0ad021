"""What an attack does to its caller: nothing. One test a row of the property matrix."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import types
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.modules.module as module_hooks
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

from ijsat_aug import JointSpaceAdv, RobustMixup
from ijsat_aug.attack.hidden import around_others
from ijsat_aug.attack.model import ModelHandle, unwrap
from ijsat_aug.attack.traces import RESTLESS, attributes_kept

VARIANTS = {
    "pixel": {"eta": 0, "steps": 2},
    "latent": {"eps": 0, "steps": 2},
    "joint": {"steps": 2},
    "l2": {"steps": 2, "norm": "l2", "latent_norm": "l2", "eps": 0.3},
    "linear": {"method": "linear"},
    "best": {"steps": 2, "best": True},
    "friendly": {"steps": 3, "tau": 0, "eps": 0.2},
    "kl": {"steps": 2, "objective": "kl"},
    "prediction": {"steps": 2, "target": "prediction"},
    "train mode": {"steps": 2, "model_mode": "train"},
}


@pytest.fixture(params=list(VARIANTS))
def options(request: pytest.FixtureRequest) -> dict:
    return {"eps": 4 / 255, "generator": 0, **VARIANTS[request.param]}


@pytest.fixture
def mixed(network: nn.Sequential) -> nn.Sequential:
    """Some modules in eval, some parameters frozen, gradients here and there."""
    network[1].eval()
    network[3].weight.requires_grad_(False)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    return network


def state(net: nn.Module) -> dict:
    return {
        "modes": [m.training for m in net.modules()],
        "trainable": [p.requires_grad for p in net.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "tensors": [t.clone() for t in (*net.parameters(), *net.buffers())],
        "identities": [id(t) for t in (*net.parameters(), *net.buffers())],
        "hooks": [(len(m._forward_hooks), len(m._backward_hooks)) for m in net.modules()],
    }


def same(a: dict, b: dict) -> bool:
    def equal(x, y) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y

    return all(len(a[k]) == len(b[k]) and all(map(equal, a[k], b[k])) for k in a)


def test_the_model_is_as_before(mixed, options, digits, labels, flow) -> None:
    before = state(mixed)
    out, _ = JointSpaceAdv(mixed, flow, **options)(digits[:8], labels[:8])
    assert same(before, state(mixed))
    assert not torch.equal(out, digits[:8])


def test_also_after_an_exception(mixed, options, digits, labels, flow) -> None:
    calls = []

    def explode(module: nn.Module, inputs: object) -> None:
        calls.append(module)
        if len(calls) == 2 or options.get("method") == "linear":
            raise KeyboardInterrupt

    handle = mixed[8].register_forward_pre_hook(explode)
    before = state(mixed)
    with pytest.raises(KeyboardInterrupt):
        JointSpaceAdv(mixed, flow, **options)(digits[:8], labels[:8])
    handle.remove()
    assert same(before, state(mixed))
    assert torch.is_grad_enabled()


def test_the_batch_is_as_before(network, options, digits, labels, flow) -> None:
    x, y = digits[:8].clone(), labels[:8].clone()
    out, same_labels = JointSpaceAdv(network, flow, **options)(x, y)
    assert torch.equal(x, digits[:8])
    assert same_labels is y
    assert torch.equal(y, labels[:8])
    assert out.data_ptr() != x.data_ptr()


def test_global_random_state_is_untouched_with_a_generator(
    network, options, digits, labels, flow
) -> None:
    before = torch.get_rng_state()
    first, _ = JointSpaceAdv(network, flow, **options)(digits[:8], labels[:8])
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    again, _ = JointSpaceAdv(network, flow, **options)(digits[:8], labels[:8])
    assert torch.equal(first, again)
    given = {**options, "generator": torch.Generator().manual_seed(0)}
    assert torch.equal(first, JointSpaceAdv(network, flow, **given)(digits[:8], labels[:8])[0])


def test_the_torch_seed_fixes_the_result_without_one(
    network, options, digits, labels, flow
) -> None:
    adv = JointSpaceAdv(network, flow, **{**options, "generator": None})
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(adv(digits[:8], labels[:8])[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_works_inside(context, network, options, digits, labels, flow) -> None:
    expected, _ = JointSpaceAdv(network, flow, **options)(digits[:8], labels[:8])
    with context():
        x, y = digits[:8].clone(), labels[:8].clone()
        out, _ = JointSpaceAdv(network, flow, **options)(x, y)
    assert torch.equal(out, expected)
    assert not out.requires_grad
    nn.Conv2d(1, 1, 1)(out).sum().backward()  # a training step can use it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_outside_and_training_inside_it(
    dtype, network, options, digits, labels, flow
) -> None:
    """The casts of frozen weights must not stay in autocast's cache (pytorch#65766)."""
    x, y = digits[:8], labels[:8]
    with torch.autocast("cpu", dtype):
        out, _ = JointSpaceAdv(network, flow, **options)(x, y)
        loss = nn.functional.cross_entropy(network(out), y)
    loss.backward()
    assert out.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    if "eta" in options:
        assert (out - x).abs().max() <= options["eps"] + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_precisions(dtype, network, options, digits, labels, flow) -> None:
    out, _ = JointSpaceAdv(network.to(dtype), flow, **options)(digits[:8], labels[:8])
    assert out.dtype == torch.float32
    assert not torch.equal(out, digits[:8])
    if options.get("eta") == 0:
        assert (out - digits[:8]).abs().max() <= options["eps"] + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_batches_of_other_precisions(dtype, network, options, digits, labels, flow) -> None:
    x = digits[:8].to(dtype)
    out, _ = JointSpaceAdv(network.to(dtype), flow, **options)(x, labels[:8])
    assert out.dtype == dtype
    assert out.min() >= 0
    assert out.max() <= 1
    assert not torch.equal(out, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_amp_dtype_is_for_the_attack_alone(dtype, network, digits, labels, flow) -> None:
    seen = []
    network[3].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    adv = JointSpaceAdv(network, flow, eps=8 / 255, eta=0, amp_dtype=dtype, steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = adv(digits[:8], labels[:8])
        network(out)
    assert seen == [dtype, dtype, torch.bfloat16]
    assert out.dtype == torch.float32
    assert (out - digits[:8]).abs().max() <= 8 / 255 + 1e-7


def test_layouts_come_back(network, options, digits, labels, flow) -> None:
    expected, _ = JointSpaceAdv(network, flow, **options)(digits[:8], labels[:8])
    wide = torch.zeros(16, 1, 8, 8)
    wide[::2] = digits[:8]
    layouts = {
        "strided": wide[::2],
        "channels_last": digits[:8].contiguous(memory_format=torch.channels_last),
        "transposed": digits[:8].transpose(2, 3).contiguous().transpose(2, 3),
        "leaf": digits[:8].clone().requires_grad_(),
        "non-leaf": digits[:8].clone().requires_grad_() * 1,
    }
    for name, x in layouts.items():
        out, _ = JointSpaceAdv(network, flow, **options)(x, labels[:8])
        # Convolutions of another layout round otherwise, which can turn a sign around.
        assert (out - expected).abs().gt(1e-4).float().mean() < 0.02, name
        assert not out.requires_grad, name
        assert out.stride() == torch.empty_like(x).stride(), name


def test_channels_last_inside_is_the_same_attack(network, digits, labels, flow) -> None:
    formats = []
    network[0].register_forward_pre_hook(
        lambda m, i: formats.append(i[0].is_contiguous(memory_format=torch.channels_last))
    )
    options = {"eps": 4 / 255, "steps": 2, "generator": 0}
    plain, _ = JointSpaceAdv(network, flow, **options)(digits[:8], labels[:8])
    last = JointSpaceAdv(network, flow, memory_format=torch.channels_last, **options)
    out, _ = last(digits[:8], labels[:8])
    assert (out - plain).abs().gt(1e-4).float().mean() < 0.02
    assert out.is_contiguous()
    assert all(formats[2:])


class NoNumber(torch.autograd.Function):
    """The identity, whose gradient is NaN where ``bad``."""

    @staticmethod
    def forward(ctx, x: Tensor, bad: Tensor) -> Tensor:
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.bad, torch.nan, g), None


class Poisoned(nn.Module):
    """A model with a NaN gradient (and a fine loss), or bad logits, where a corner is bright."""

    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x: Tensor) -> Tensor:
        bad = x[:, 0, 0, 0] > 0.7
        if self.how == "gradient":
            return self.net(NoNumber.apply(x, bad[:, None, None, None]))
        logits = self.net(x)
        return torch.where(bad[:, None], float(self.how), logits)


@pytest.mark.parametrize("how", ["gradient", "nan", "inf"])
def test_a_poisoned_sample_comes_back_and_poisons_nobody(
    how, network, options, digits, labels, flow
) -> None:
    if options.get("model_mode") == "train":
        pytest.skip("with batch statistics the samples of a batch do see each other")
    x = digits[:6].clone()
    x[2, :, 0, 0] = 1
    options = options | {"generator": None, "random_start": options.get("objective") == "kl"}
    adv = JointSpaceAdv(Poisoned(network, how), flow, **options)
    out, _ = adv(x, labels[:6])
    assert torch.equal(out[2], x[2])
    known = options.get("best", False) and how == "gradient"  # the worst that the model saw
    assert adv.last["fallback"].tolist() == [i == 2 and not known for i in range(6)]
    assert out.isfinite().all()
    if options["random_start"]:
        return
    others = [0, 1, 3, 4, 5]
    alone, _ = JointSpaceAdv(network, flow, **options)(x[others], labels[:6][others])
    assert (out[others] - alone).abs().gt(1e-5).float().mean() < 0.01


def test_a_flow_that_explodes_poisons_nobody(network, digits, labels, flow) -> None:
    class Exploding:
        shape, latent_dim = flow.shape, flow.latent_dim

        def encode(self, x: Tensor) -> Tensor:
            return flow.encode(x)

        def decode(self, z: Tensor) -> Tensor:
            bomb = torch.zeros(len(z), 1, 1, 1)
            bomb[1] = torch.inf
            return flow.decode(z) + bomb - (bomb if z.requires_grad else 0)

    adv = JointSpaceAdv(network, Exploding(), eta=0.05, steps=2)
    out, _ = adv(digits[:4], labels[:4])
    assert torch.equal(out[1], digits[1])
    assert adv.last["fallback"].tolist() == [False, True, False, False]
    assert not torch.equal(out[0], digits[0])


def test_a_sample_alone_is_the_sample_in_a_batch(network, options, digits, labels, flow) -> None:
    if options.get("model_mode") == "train" or options.get("objective") == "kl":
        pytest.skip("batch statistics; a random start")
    options = options | {"random_start": False}
    together, _ = JointSpaceAdv(network, flow, **options)(digits[:7], labels[:7])
    for i in range(7):
        alone, _ = JointSpaceAdv(network, flow, **options)(digits[i : i + 1], labels[i : i + 1])
        assert (alone[0] - together[i]).abs().gt(1e-4).float().mean() < 0.05


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_batch_size(count, network, options, digits, labels, flow) -> None:
    x = digits[:count]
    out, y = JointSpaceAdv(network, flow, **options)(x, labels[:count])
    assert out.shape == x.shape
    assert y.shape == (count,)


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda m: m])
def test_wrappers_are_taken_off(wrap: Callable, network, digits, labels, flow) -> None:
    wrapped = wrap(network)
    adv = JointSpaceAdv(wrapped, flow, steps=2, generator=0)
    assert adv.model is (network if wrapped is network else wrapped.module)
    before = state(wrapped)
    adv(digits[:8], labels[:8])
    assert same(before, state(wrapped))


# torch.compile itself looks at .grad of its inputs, and mutes this unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_model_stays_compiled_and_keeps_its_gradients(
    network, digits, labels, flow
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend)
    x, y = digits[:8], labels[:8]
    nn.functional.cross_entropy(compiled(x), y).backward()
    trained = len(graphs)
    adv = JointSpaceAdv(compiled, flow, eps=4 / 255, steps=3, generator=0)
    assert adv.model is compiled
    for _ in range(4):
        out, _ = adv(x, y)
        compiled.zero_grad()
        nn.functional.cross_entropy(compiled(out), y).backward()
        assert all(p.grad is not None for p in network.parameters())
    assert len(graphs) <= trained + 2
    network_out, _ = JointSpaceAdv(network, flow, eps=4 / 255, steps=3, generator=0)(x, y)
    again, _ = JointSpaceAdv(compiled, flow, eps=4 / 255, steps=3, generator=0)(x, y)
    assert (again - network_out).abs().gt(1e-4).float().mean() < 0.02
    torch._dynamo.reset()


def test_it_is_no_part_of_what_holds_it(network, flow, digits, labels) -> None:
    adv = JointSpaceAdv(network, flow, steps=2, generator=0)
    holder = nn.ModuleDict({"net": network, "augment": adv})
    assert len(holder.state_dict()) == len(network.state_dict())
    assert not list(adv.parameters())
    holder.eval()
    assert not adv.training
    holder.train()
    twin = copy.deepcopy(adv)
    assert twin.model is network
    assert twin.flow is flow
    assert torch.equal(twin(digits[:4], labels[:4])[0], adv(digits[:4], labels[:4])[0])


def test_a_pickle_holds_the_settings_and_the_random_state(network, flow, digits, labels) -> None:
    for source in (0, torch.Generator().manual_seed(0), None):
        adv = JointSpaceAdv(network, flow, steps=2, eps=0.01, generator=source)
        adv(digits[:4], labels[:4])
        data = pickle.dumps(adv)
        assert len(data) < 2e6
        other = pickle.loads(data)
        assert other.model is None
        assert other.threat == adv.threat
        if source is None:
            continue
        other.bind(network)
        assert torch.equal(other(digits[:4], labels[:4])[0], adv(digits[:4], labels[:4])[0])


def test_train_mode_uses_batch_statistics(network, digits, labels) -> None:
    modes = []
    network[1].register_forward_pre_hook(lambda m, i: modes.append(m.training))
    for mode in ("train", "eval"):
        JointSpaceAdv(network, eta=0, model_mode=mode)(digits[:8], labels[:8])
    assert modes == [True, False]


def test_a_pending_backward_pass_survives(network, options, digits, labels, flow) -> None:
    """The clean forward first, then the attack, then the backward: as TRADES does."""
    clean = network(digits[:8])
    JointSpaceAdv(network, flow, **options)(digits[:8], labels[:8])
    nn.functional.cross_entropy(clean, labels[:8]).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_buffers_that_the_model_replaces_come_back(network, digits, labels) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.net(x)

    model = Counting()
    buffer = model.calls
    JointSpaceAdv(model, eta=0, model_mode="train")(digits[:8], labels[:8])
    assert model.calls is buffer
    assert float(buffer) == 0


def test_models_of_mixed_precision_get_the_batch_as_it_is(network, digits, labels) -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
            self.net = network

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) / self.temperature.float()

    out, _ = JointSpaceAdv(Tempered(), eta=0)(digits[:8], labels[:8])
    assert not torch.equal(out, digits[:8])


class Shifted(nn.Module):
    """A network behind a normalisation, which may work in place, as torchvision's own can."""

    def __init__(self, net: nn.Module, inplace: bool) -> None:
        super().__init__()
        self.net, self.inplace = net, inplace

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(0.5) if self.inplace else x - 0.5)


def test_a_model_may_change_its_input(network, options, digits, labels, flow) -> None:
    x = digits[:8].clone()
    plain, inside = (
        JointSpaceAdv(Shifted(network, inplace), flow, **options)(x, labels[:8])[0]
        for inplace in (False, True)
    )
    assert torch.equal(plain, inside)
    assert not torch.equal(plain, x)
    assert torch.equal(x, digits[:8])


def test_a_model_that_changes_its_input_now_and_then_is_told(network, digits, labels) -> None:
    shifted = Shifted(network, inplace=False)
    attack = JointSpaceAdv(shifted, "digits")
    attack(digits[:8], labels[:8])
    shifted.inplace = True
    with pytest.raises(ValueError, match="changed its input in place, which it had not done"):
        attack(digits[:8], labels[:8])


@pytest.mark.parametrize("options", [{}, {"lam_steps": 2, "rho": 0.3}, {"draws": 3}], ids=str)
def test_a_model_may_change_blends(options, network, digits, labels) -> None:
    x = digits[:8].clone()
    plain, inside = (
        RobustMixup(Shifted(network, inplace), num_classes=10, generator=0, **options)(
            x, labels[:8]
        )
        for inplace in (False, True)
    )
    assert torch.equal(plain[0], inside[0])
    assert torch.equal(plain[1], inside[1])
    assert torch.equal(x, digits[:8])


_GLOBAL: dict[str, nn.Module] = {}


def _by_name(x: Tensor) -> Tensor:
    return _GLOBAL["net"](x)


def test_any_callable_is_a_model(network, digits, labels) -> None:
    expected, _ = JointSpaceAdv(network, eta=0, steps=2, generator=0)(digits[:8], labels[:8])
    before = state(network)

    class Holder:
        def __init__(self) -> None:
            self.heads, self.name, self.itself = [network], "holder", self

        def __call__(self, x: Tensor) -> Tensor:
            return self.heads[0](x)

        def ask(self, x: Tensor) -> Tensor:
            return self(x)

    def apply(net: nn.Module, x: Tensor) -> Tensor:
        return net(x)

    def outer(x: Tensor) -> Tensor:
        return closed(x)

    @functools.wraps(apply)
    def wrapper(x: Tensor) -> Tensor:
        return network(x)

    holder, heads = Holder(), {"a": network}
    _GLOBAL.update(net=network)
    closed = lambda x: {"logits": network(x)}  # noqa: E731
    models = (
        network.forward, closed, outer, functools.partial(network), holder, holder.ask,
        functools.partial(apply, network), functools.partial(lambda x, net: net(x), net=network),
        lambda x: holder(x), lambda x: heads["a"](x),
        lambda x, m=network: m(x), lambda x, *, m=network: m(x), lambda x: _GLOBAL["net"](x),
        lambda x: _by_name(x), wrapper,
    )  # fmt: skip
    for model in models:  # each in train mode, and frozen while it is attacked
        out, _ = JointSpaceAdv(model, eta=0, steps=2, generator=0)(digits[:8], labels[:8])
        assert torch.equal(out, expected)
        assert same(before, state(network))


def test_buffers_that_change_in_eval_mode_come_back_too(network, digits, labels) -> None:
    """As observers of a training that will be quantised, or a model that counts its calls."""

    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(64, 10)
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.register_buffer("largest", torch.zeros(()))
            self.register_buffer("still", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.largest = torch.maximum(self.largest, x.detach().max())
            return super().forward(x.flatten(1))

    net = Counting()
    net(digits[:8] / 2)
    before, largest = state(net), net.largest
    attack = JointSpaceAdv(net, eta=0, eps=0.3, steps=3)
    for _ in range(2):
        attack(digits[:8], labels[:8])
        assert same(before, state(net))
        assert net.largest is largest
    assert RESTLESS[net] == {"calls", "largest"}
    assert not any(RESTLESS[part] for part in network.modules() if part in RESTLESS)


def test_dropout_of_train_mode_is_seeded(network, digits, labels) -> None:
    options = {"eta": 0, "steps": 2, "model_mode": "train", "random_start": False}
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(50 + len(outs))
        before = torch.get_rng_state()
        outs.append(JointSpaceAdv(network, generator=seed, **options)(digits[:8], labels[:8])[0])
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_a_foreign_flow_runs_in_full_precision(network, digits, labels) -> None:
    seen = []

    class Rotation:
        shape, latent_dim = (1, 8, 8), 64
        matrix = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]

        def encode(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.matrix

        def decode(self, z: Tensor) -> Tensor:
            x = z @ self.matrix.T
            seen.append(x.dtype)
            return x.unflatten(1, self.shape)

    for method in ("exact", "linear"):
        adv = JointSpaceAdv(network, Rotation(), eta=0.01, method=method, amp_dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            adv(digits[:4], labels[:4])
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_in_float16_samples_move_that_the_model_is_sure_of(norm, network, digits, labels) -> None:
    """Where the gradient of their loss would be zero at the image, for want of small numbers."""
    x, y = digits[:64], labels[:64]
    margin = 14 * nn.functional.one_hot(y, 10)

    def sure(images: Tensor) -> Tensor:
        return network(images) + margin.to(images.dtype)

    options = {"eta": 0, "eps": 0.1, "norm": norm, "random_start": False}
    steps = [
        JointSpaceAdv(sure, amp_dtype=dtype, **options)(x, y)[0] - x
        for dtype in (torch.float32, torch.float16)
    ]

    class Inside(nn.Module):  # as accelerate makes of a model
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.float16):
                return sure(images).to(torch.float16).float()

    inside = Inside()
    for model in (inside, lambda images: inside(images)):
        steps.append(JointSpaceAdv(model, **options)(x, y)[0] - x)
    for step in steps:
        assert (step != 0).flatten(1).any(1).all()
    exact, *low = (step.flatten(1) for step in steps)
    for other in low:
        assert nn.functional.cosine_similarity(exact, other).min() > 0.9


def test_in_float16_one_number_a_sample_is_enough(network, digits, labels) -> None:
    def odd(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(
            output, target.to(output) % 2, reduction="none"
        )

    adv = JointSpaceAdv(lambda x: network(x)[:, 0], eta=0, objective=odd, amp_dtype=torch.float16)
    assert not torch.equal(adv(digits[:8], labels[:8])[0], digits[:8])


def test_buffers_that_begin_to_change_later_are_put_back_from_then_on(digits, labels) -> None:
    """Also those that are written to by a kernel that does not count it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(64, 10)
            self.live = False

        def forward(self, x: Tensor) -> Tensor:
            if self.live:
                self.norm.train()
            return self.head(self.norm(x).flatten(1))

    net = Net()
    attack = JointSpaceAdv(net, eta=0)
    attack(digits[:4], labels[:4])
    net.live = True
    attack(digits[:4], labels[:4])
    before = state(net)  # the first time nobody could know
    attack(digits[:4], labels[:4])
    assert same(before, state(net))


def test_what_a_pass_keeps_in_attributes_is_put_back(digits, labels) -> None:
    """A cache that evaluation fills, the size of the last images, losses that a step adds up."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 10)
            self.size, self.biases, self.losses = 8, {}, []
            self.register_buffer("grid", torch.linspace(0, 1, 8), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.size != x.shape[-1]:
                self.size = x.shape[-1]
                self.grid = torch.linspace(0, 1, self.size)
            if not self.training and "bias" not in self.biases:
                self.biases["bias"] = self.head.bias * 2
            self.losses.append(x.mean())
            return self.head((x * self.grid).mean((2, 3))) + self.biases.get("bias", 0)

    net = Net()
    kept = net.biases, net.losses
    large = nn.functional.interpolate(digits[:4], 16)
    JointSpaceAdv(net, eta=0, steps=2)(large, labels[:4])
    assert (net.size, net.biases, net.losses) == (8, {}, [])
    assert net.biases is kept[0]
    assert net.losses is kept[1]
    net(digits[:4])
    sum(net.losses).requires_grad_().backward()


def test_cached_weights_keep_their_gradients(digits, labels) -> None:
    net = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(64, 10)))
    with parametrize.cached():
        x, y = JointSpaceAdv(net, eta=0)(digits[:4], labels[:4])
        nn.functional.cross_entropy(net(x), y).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["script", "trace", "freeze"])
def test_a_scripted_model_is_a_model(kind, network, digits, labels) -> None:
    x, y = digits[:4], labels[:4]
    expected = JointSpaceAdv(network, eta=0, generator=0)(x, y)[0]
    network = network if kind == "script" else network.eval()
    scripted = torch.jit.trace(network, x) if kind == "trace" else torch.jit.script(network)
    scripted = torch.jit.freeze(scripted) if kind == "freeze" else scripted
    before = {name: value.clone() for name, value in scripted.state_dict().items()}
    for _ in range(2):
        moved = JointSpaceAdv(scripted, eta=0, generator=0)(x, y)[0]
    assert (moved != expected).float().mean() < 0.02  # a sign where there is hardly a gradient
    after = scripted.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", ["expanded", "sparse", "csr"])
def test_buffers_that_nothing_can_be_written_to(kind, network, digits, labels) -> None:
    buffer = torch.ones(1).expand(10, 8) if kind == "expanded" else torch.eye(10).to_sparse()
    buffer = buffer.to_sparse_csr() if kind == "csr" else buffer
    network.register_buffer("extra", buffer)
    for mode in ("eval", "train"):
        JointSpaceAdv(network, eta=0, model_mode=mode)(digits[:4], labels[:4])
    assert network.extra is buffer


def test_weights_that_another_step_made(digits, labels) -> None:
    """As those of the inner steps of meta-learning."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    weight = net[1].weight
    del net[1].weight
    net[1].weight = weight * 2
    moved, _ = JointSpaceAdv(net, eta=0)(digits[:4], labels[:4])
    nn.functional.cross_entropy(net(moved), labels[:4]).backward()
    assert weight.grad is not None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recurrent_layers_go_backward_on_cudnn(dropout, digits, labels) -> None:
    """In training mode, which is no other where there is no dropout."""
    seen = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 16, 2, batch_first=True, dropout=dropout)
            self.head = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.rnn.training))
            return self.head(self.rnn(x[:, 0])[0][:, -1])

    net = Net().eval()
    JointSpaceAdv(net, eta=0)(digits[:4], labels[:4])
    assert seen == [(False, not dropout)]
    assert not net.rnn.training


def test_a_model_that_changed_its_input_once_may_do_so_again(digits) -> None:
    calls = []

    def model(x: Tensor) -> Tensor:
        calls.append(1)
        return (x.sub_(0.5) if len(calls) != 2 else x - 0.5).flatten(1)

    x = digits[:4].clone()
    JointSpaceAdv(model, eta=0, steps=3, random_start=False)(x, torch.arange(4))
    assert len(calls) == 3
    assert torch.equal(x, digits[:4])


def test_a_batch_of_inference_mode_is_not_written_on() -> None:
    """Its changes are not counted: only a copy is safe, also after calls that changed nothing."""
    writes = []
    handle = ModelHandle(lambda x: (x.sub_(1) if writes else x).flatten(1))
    handle(torch.rand(1, 1, 2, 2))
    writes.append(1)
    with torch.inference_mode():
        x = torch.ones(1, 1, 2, 2)
        handle(x)
    assert x.min() == 1


def test_a_wrapper_that_was_compiled_is_taken_off() -> None:
    net = nn.Linear(2, 2)
    assert unwrap(torch.compile(nn.DataParallel(net), backend="eager")) is net


def test_a_cache_under_another_key_comes_back() -> None:
    net = nn.Flatten()
    net.cache = {"bias": torch.ones(2)}
    with attributes_kept([net]):
        net.cache["other"] = net.cache.pop("bias")
    assert list(net.cache) == ["bias"]


class _Deep:
    """Holds a model further away than is looked, as a trainer does."""

    def __init__(self, net: nn.Module) -> None:
        self.task = types.SimpleNamespace(net=net)
        self.parts = types.SimpleNamespace(task=self.task)

    def ask(self, x: Tensor) -> Tensor:
        return self.parts.task.net(x)


class _InAList(nn.Module):
    """A module that PyTorch does not know the parts of."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.parts = [net]

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](x)


def _hidden(kind: str, net: nn.Module) -> Callable:
    imported = types.ModuleType("imported")
    imported.net = net
    deep = _Deep(net)
    return {
        "of an imported module": lambda x: imported.net(x),
        "of a trainer's task": lambda x: deep.parts.task.net(x),
        "behind a method": deep.ask,
        "in a list": _InAList(net),
    }[kind]


HIDDEN = ["of an imported module", "of a trainer's task", "behind a method", "in a list"]


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_hidden_model_is_frozen_too(kind: str, mode: str, network, digits, labels) -> None:
    x, y = digits[:8], labels[:8]
    network.append(nn.Dropout(0.5))
    options = {"eta": 0, "steps": 2, "model_mode": mode, "generator": 0}
    plain = JointSpaceAdv(network, **options)
    expected = [plain(x, y)[0] for _ in range(2)]
    before, hooks = state(network), len(module_hooks._global_forward_pre_hooks)
    hidden = JointSpaceAdv(_hidden(kind, network), **options)
    assert network not in hidden.handle.modules
    for out in expected:
        assert torch.equal(hidden(x, y)[0], out)
        assert same(before, state(network))
    assert network in hidden.handle.modules
    assert len(module_hooks._global_forward_pre_hooks) == hooks


def test_a_hidden_model_is_as_before_when_it_fails(network, digits, labels) -> None:
    def fail(module: nn.Module, inputs: tuple) -> None:
        raise RuntimeError("no more")

    before = state(network)
    adv = JointSpaceAdv(_hidden("in a list", network), eta=0, generator=0)
    hook = network[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no more"):
        adv(digits[:8], labels[:8])
    hook.remove()
    assert same(before, state(network))
    assert not module_hooks._global_forward_pre_hooks
    adv(digits[:8], labels[:8])
    assert same(before, state(network))


def test_hidden_collectives_are_refused(network, digits, labels) -> None:
    adv = JointSpaceAdv(_hidden("in a list", nn.DataParallel(network)), eta=0)
    with pytest.raises(ValueError, match="call the module inside it"):
        adv(digits[:8], labels[:8])


def test_what_another_thread_calls_is_left_alone(network, digits, labels) -> None:
    deep, modes = _Deep(nn.Dropout().train()), []

    def ask(x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(deep.ask, x).result()
        modes.append(deep.task.net.training)
        return network(x)

    JointSpaceAdv(ask, eta=0, steps=2)(digits[:8], labels[:8])
    assert modes == [True, True]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_model_is_not_compiled_again_to_be_watched(network, digits, labels) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    x, y = digits[:8], labels[:8]
    torch._dynamo.reset()
    whole, inside, function = (copy.deepcopy(network) for _ in range(3))
    inside.compile(backend=backend)
    models = (
        torch.compile(whole, backend=backend), nn.Sequential(inside),
        torch.compile(lambda x: function(x), backend=backend),
    )  # fmt: skip
    for model in models:
        graphs.clear()
        adv = JointSpaceAdv(model, eta=0, steps=3)
        for _ in range(2):
            adv(x, y)
        assert len(graphs) <= 1  # torch 2.6 does not compile what is inside
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.filterwarnings("ignore:Using `torch.compile\\(module\\)` when there are global hooks")
@pytest.mark.parametrize("kind", ["method", "in a list", "function"])
def test_models_with_compiled_parts_are_watched_all_the_same(kind, network, digits, labels) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(backend=backend, fullgraph=True)

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network
            self.body = compiled(self._body)

        def _body(self, x: Tensor) -> Tensor:
            return self.net(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    torch._dynamo.reset()
    net = compiled(network)
    model = {"method": Part(), "in a list": _InAList(net), "function": lambda x: net(x)}[kind]
    x, y = digits[:8], labels[:8]
    before = state(network)
    adv = JointSpaceAdv(model, eta=0, steps=2, generator=0)
    plain = JointSpaceAdv(network, eta=0, steps=2, generator=0)
    for _ in range(3):
        assert (adv(x, y)[0] - plain(x, y)[0]).abs().gt(1e-4).float().mean() < 0.02
        assert same(before, state(network))
    assert 1 <= len(graphs) <= 2
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_function_behind_which_nothing_is_found_is_told(network, digits, labels) -> None:
    torch._dynamo.reset()
    deep = _Deep(network.eval())
    model = torch.compile(lambda x: deep.parts.task.net(x), backend="eager")
    adv = JointSpaceAdv(model, eta=0)
    with pytest.warns(UserWarning, match="compiled function, behind which no module is found"):
        adv(digits[:8], labels[:8])
    adv(digits[:8], labels[:8])  # once
    torch._dynamo.reset()


def test_what_a_caller_changes_for_a_call_is_its_own_to_put_back(network, digits, labels) -> None:
    deep = _Deep(network)
    other = {k: v + 7 if v.is_floating_point() else v for k, v in network.state_dict().items()}

    def in_eval_mode(x: Tensor) -> Tensor:
        net = deep.task.net
        was = net.training
        net.eval()
        out = net(x)
        net.train(was)
        return out

    def with_other_weights(x: Tensor) -> Tensor:
        return torch.func.functional_call(deep.task.net, other, x)

    def with_a_switch(x: Tensor) -> Tensor:
        deep.task.net.switch = False
        out = deep.task.net(x)
        deep.task.net.switch = True
        return out

    network.switch = True
    before = state(network)
    for model in (in_eval_mode, with_other_weights, with_a_switch):
        for steps in (1, 3):
            JointSpaceAdv(model, eta=0, steps=steps)(digits[:8], labels[:8])
            assert same(before, state(network))
            assert network.switch


def test_a_callable_that_calls_another_model_later_is_watched_again(
    network, digits, labels
) -> None:
    deep = _Deep(network)
    adv = JointSpaceAdv(deep.ask, eta=0, steps=2)
    adv(digits[:8], labels[:8])
    deep.task.net = copy.deepcopy(network)
    before = state(deep.task.net)
    adv(digits[:8], labels[:8])
    assert same(before, state(deep.task.net))


def test_a_hidden_model_that_is_called_twice_in_a_pass(network, digits, labels) -> None:
    deep = _Deep(network)
    before = state(network)
    adv = JointSpaceAdv(lambda x: deep.parts.task.net(x) + deep.parts.task.net(1 - x), eta=0)
    adv(digits[:8], labels[:8])
    assert same(before, state(network))


def test_an_own_attack_finds_a_hidden_model_frozen(network, digits, labels) -> None:
    deep, modes = _Deep(network), []
    before = state(network)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        deep.ask(x)
        network[1].register_forward_pre_hook(lambda module, _: modes.append(module.training))
        deep.ask(x)
        return x

    RobustMixup(deep.ask, num_classes=10, attack=attack)(digits[:8], labels[:8])
    network[1]._forward_pre_hooks.clear()
    assert modes == [False]
    assert same(before, state(network))


def test_two_watch_one_hidden_module(network, digits, labels) -> None:
    hidden = _hidden("in a list", network)
    before = state(network)
    adv = JointSpaceAdv(hidden, eta=0)
    mix = RobustMixup(hidden, num_classes=10, attack=lambda x, t: adv(x, t))
    for _ in range(2):
        mix(digits[:8], labels[:8])
        assert same(before, state(network))


def test_the_module_inside_a_wrapper_may_be_called(network, digits, labels) -> None:
    wrapped = nn.DataParallel(network)
    JointSpaceAdv(lambda x: wrapped.module(x), eta=0)(digits[:8], labels[:8])
    own = RobustMixup(wrapped, num_classes=10, attack=lambda x, t: x + 0 * wrapped(x).sum())
    with pytest.raises(ValueError, match=r"of a DataParallel: call the module inside"):
        own(digits[:8], labels[:8])
    with pytest.raises(ValueError, match=r"call the module inside it"):
        JointSpaceAdv(lambda x: wrapped(x), eta=0)(digits[:8], labels[:8])


class _Answers(dict):
    __getattr__ = dict.__getitem__


def test_objects_that_answer_with_errors_of_their_own(network, digits, labels) -> None:
    config = _Answers(temperature=2.0)
    JointSpaceAdv(lambda x: network(x) / config.temperature, eta=0)(digits[:8], labels[:8])


def test_a_copy_pickles_no_model_and_holds_none(network, digits, labels) -> None:
    mix = RobustMixup(network, num_classes=10)
    twin = copy.deepcopy(mix)
    twin(digits[:8], labels[:8])
    assert len(pickle.dumps(twin)) < 10_000  # with what it tells of its last batch
    seen = weakref.ref(network_copy := copy.deepcopy(network))
    holder = copy.deepcopy(RobustMixup(network_copy, num_classes=10)).bind(network)
    del network_copy
    gc.collect()
    assert holder.model is network
    assert seen() is None


def test_synchronised_statistics_are_no_matter_of_one_process(digits, labels) -> None:
    model = nn.Sequential(nn.SyncBatchNorm(1), nn.Flatten(), nn.Linear(64, 10))
    adv = JointSpaceAdv(model, eta=0, p=0.5, model_mode="train")
    whole = JointSpaceAdv(model, eta=0, model_mode="train")
    for attack in (adv, RobustMixup(num_classes=10, p=0.5, attack=whole)):
        with pytest.raises(ValueError, match="SyncBatchNorm waits in every pass"):
            attack(digits[:8], labels[:8])


def test_statistics_come_back_in_train_mode_after_an_attack_in_eval_mode(
    network, digits, labels
) -> None:
    """What an attack in eval mode learnt of a module says nothing of train mode."""
    before = state(network)
    for model_mode in ("eval", "train"):
        adv = JointSpaceAdv(network, eta=0, model_mode=model_mode)
        adv(digits[:8], labels[:8])
        assert same(before, state(network))


def test_a_module_that_calls_itself_has_one_block() -> None:
    told: list[str] = []

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor, again: bool = True) -> torch.Tensor:
            x = self(x, False) if again else x
            told.append("outer" if again else "inner")
            return x

    @contextmanager
    def around(module: nn.Module):
        told.append("begin")
        yield
        told.append("end")

    net = Twice()
    with around_others([], around):
        net(torch.ones(1))
        net(torch.ones(1))
    assert told == ["begin", "inner", "outer", "end"] * 2
