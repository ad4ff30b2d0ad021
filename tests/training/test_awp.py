"""AWP against a plain reference; exact restoration."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ijsat_aug.training import AdversarialWeightPerturbation


def reference_gradients(net: nn.Module, x: Tensor, y: Tensor, gamma: float) -> list[Tensor]:
    """Perturb a proxy by gamma |w| g / |g| a layer, and take its gradient (Wu et al.)."""
    proxy = copy.deepcopy(net)
    names = [n for n, p in proxy.named_parameters() if p.requires_grad and p.ndim > 1]
    saved = copy.deepcopy(proxy.state_dict())
    F.cross_entropy(proxy(x), y).backward()
    proxy.load_state_dict({k: v for k, v in saved.items() if "running" in k or "num_" in k}, False)
    with torch.no_grad():
        for name, p in proxy.named_parameters():
            if name in names:
                p.add_(gamma * p.norm() * p.grad / p.grad.norm())
    proxy.zero_grad()
    F.cross_entropy(proxy(x), y).backward()
    return [p.grad for p in proxy.parameters()]


@pytest.fixture
def net(network: nn.Sequential) -> nn.Sequential:
    network[6].p = 0.0
    return network


def test_gradients_are_those_of_the_perturbed_weights(net, digits, labels) -> None:
    x, y = digits[:32], labels[:32]
    expected = reference_gradients(net, x, y, 0.02)
    awp = AdversarialWeightPerturbation(net, gamma=0.02)
    with awp(lambda: F.cross_entropy(net(x), y)) as loss:
        loss.backward()
    for p, g in zip(net.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-5)


def test_a_step_inside_the_block_stays(net, digits, labels) -> None:
    """As the authors' loop steps: at the perturbed weights, which are put back after it."""
    before = copy.deepcopy(dict(net.named_parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    awp = AdversarialWeightPerturbation(net, gamma=0.02)
    with awp(lambda: F.cross_entropy(net(digits), labels)) as loss:
        loss.backward()
        optimizer.step()
    for name, p in net.named_parameters():
        assert torch.allclose(p, before[name] - 0.1 * p.grad, atol=1e-6)
        assert not torch.equal(p, before[name])


def test_weights_come_back_bit_for_bit(net, digits, labels) -> None:
    before = copy.deepcopy(net.state_dict())
    awp = AdversarialWeightPerturbation(net, gamma=0.1)
    with awp(lambda: F.cross_entropy(net(digits), labels)) as loss:
        inside = [p.detach().clone() for p in net.parameters()]
        loss.backward()
    for (name, p), perturbed in zip(net.named_parameters(), inside, strict=True):
        assert torch.equal(p, before[name])
        moved = (perturbed - p).norm() / p.norm()
        assert moved.item() == pytest.approx(0.1 if p.ndim > 1 else 0.0, rel=1e-3)
    assert int(net[1].num_batches_tracked) == int(before["1.num_batches_tracked"]) + 1
    with pytest.raises(KeyboardInterrupt), awp(lambda: F.cross_entropy(net(digits), labels)):
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_the_loss_is_higher_there(net, digits, labels) -> None:
    net.eval()
    losses = []
    for gamma in (0.0, 0.01, 0.05):
        awp = AdversarialWeightPerturbation(net, gamma=gamma)
        with awp(lambda: F.cross_entropy(net(digits), labels)) as loss:
            losses.append(loss.item())
    assert losses == sorted(set(losses))


def test_autocast_belongs_inside(net, digits, labels) -> None:
    awp = AdversarialWeightPerturbation(net)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="open autocast inside the loss function"),
        awp(lambda: F.cross_entropy(net(digits), labels)),
    ):
        pass

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(net(digits), labels)

    with awp(loss) as value:
        value.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    with pytest.raises(ValueError, match="gamma"):
        AdversarialWeightPerturbation(net, gamma=-1)


def test_a_failing_loss_changes_nothing(net, digits, labels) -> None:
    before = copy.deepcopy(net.state_dict())

    def fails() -> Tensor:
        F.cross_entropy(net(digits), labels)  # BatchNorm counts
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), AdversarialWeightPerturbation(net)(fails):
        pass
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_weights_come_back_when_the_perturbation_itself_fails(net, digits, labels) -> None:
    before = copy.deepcopy(net.state_dict())
    awp = AdversarialWeightPerturbation(net)
    awp.gamma = torch.ones(3)  # does not fit the second weight's shape
    with pytest.raises(RuntimeError), awp(lambda: F.cross_entropy(net(digits), labels)):
        pass
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_weights_come_back_when_the_way_there_is_interrupted() -> None:
    calls: list[int] = []

    class Last(nn.Parameter):
        def copy_(self, other: Tensor) -> Tensor:  # type: ignore[override]
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return super().copy_(other)

    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = Last(net[1].weight.detach())
    before = [p.detach().clone() for p in net.parameters()]
    awp = AdversarialWeightPerturbation(net, gamma=0.5)
    with pytest.raises(KeyboardInterrupt), awp(lambda: net(torch.ones(1, 3)).sum()):
        pass
    assert all(map(torch.equal, net.parameters(), before))


def test_a_frozen_model_has_nothing_to_perturb(net, digits, labels) -> None:
    net.requires_grad_(False)
    awp = AdversarialWeightPerturbation(net)
    with (
        pytest.raises(ValueError, match="no trainable weight matrix"),
        awp(lambda: F.cross_entropy(net(digits), labels)),
    ):
        pass


@pytest.mark.parametrize(
    ("weight", "value"),
    [(0.5, float("inf")), (0.5, float("nan")), (2.0, 0.0), (0.5, 1e-30)],
    ids=["infinite", "not a number", "none", "tiny"],
)
def test_a_gradient_that_says_nothing_costs_no_weights(weight: float, value: float) -> None:
    """A GradScaler skips the step of such a batch, and training goes on from the same weights."""
    net = nn.Linear(400, 400, bias=False)
    nn.init.constant_(net.weight, weight)
    before = net.weight.detach().clone()
    x = torch.full((3, 400), value)
    moved = []

    def loss() -> Tensor:
        moved.append((net.weight - before).norm() / before.norm())
        return net(x).square().mean() if value != 1e-30 else net(x).mean()

    with AdversarialWeightPerturbation(net, gamma=0.01)(loss) as found:
        found.backward()
    assert torch.equal(net.weight, before)
    assert float(moved[1].detach()) == pytest.approx(0.01 if value == 1e-30 else 0, rel=1e-3)


def test_a_buffer_that_is_put_anew_counts_once() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.linear(x)

    model, x = Counting(), torch.randn(8, 4)
    with AdversarialWeightPerturbation(model)(lambda: model(x).square().mean()) as loss:
        loss.backward()
    assert model.calls == 1


def test_cached_weights_are_no_stale_ones(digits, labels) -> None:
    net = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(64, 10)))
    awp = AdversarialWeightPerturbation(net, gamma=0.5)

    def loss() -> Tensor:
        return F.cross_entropy(net(digits[:8]), labels[:8])

    with awp(loss) as expected:
        expected.backward()
    with parametrize.cached():
        calm = loss()
        with awp(loss) as found:
            found.backward()
    assert torch.equal(found, expected)
    assert found > calm


def test_sparse_gradients(digits, labels) -> None:
    class Net(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.levels, self.head = nn.Embedding(17, 8, sparse=sparse), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.levels((16 * x).long().flatten(1)).mean(1))

    losses = []
    for net in (Net(False), Net(True)):
        awp = AdversarialWeightPerturbation(net, gamma=0.5)
        with awp(lambda net=net: F.cross_entropy(net(digits[:8]), labels[:8])) as loss:
            loss.backward()
        losses.append(loss)
    assert net.levels.weight.grad.is_sparse
    assert torch.allclose(*losses)


def test_a_step_back_to_the_old_weight_is_a_step_too() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    awp = AdversarialWeightPerturbation(model, gamma=0.5)
    with awp(lambda: model.weight.sum()), torch.no_grad():
        move = model.weight - torch.tensor([[1.0, 2.0]])
        model.weight[0, 0] -= move[0, 0]
    assert torch.allclose(model.weight, torch.tensor([[1.0 - move[0, 0], 2.0]]))
