"""Where the joint-space attack must be something known: PGD, analytic optima, the identity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ijsat_aug import JointSpaceAdv
from ijsat_aug.attack import unit_ball
from ijsat_aug.transforms.functional import joint_space_adv
from tests.conftest import IdentityFlow


class NoFlow:
    """A flow that must not be touched."""

    shape, latent_dim = (1, 8, 8), 64

    def encode(self, x: Tensor) -> Tensor:
        raise AssertionError("the flow was called")

    decode = encode


@pytest.mark.parametrize("name", ["PGD", "PGDL2"])
@pytest.mark.parametrize("random_start", [False, True])
def test_without_latent_budget_it_is_pgd(name, random_start, network, digits, labels) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    network.eval()
    x, y = digits[:24], labels[:24]
    eps, size = (0.1, 0.02) if name == "PGD" else (1.5, 0.3)
    # Its guard of 1e-10 shortens the steps of confident samples; ours never does.
    guard = {} if name == "PGD" else {"eps_for_division": 0.0}
    reference = getattr(torchattacks, name)(
        network, eps=eps, alpha=size, steps=10, random_start=random_start, **guard
    )
    torch.manual_seed(3)
    expected = reference(x, y)
    torch.manual_seed(3)
    start = _their_start(name, x, eps) if random_start else None
    norm = "linf" if name == "PGD" else "l2"
    ours = joint_space_adv(
        x, y, network, NoFlow(), eps=eps, norm=norm, steps=10, step_size=size, pixel_start=start
    )
    # A sign that flips at a gradient of 1e-9 would be a whole step: none does on these images.
    assert torch.allclose(ours, expected, atol=1e-5)
    assert not torch.allclose(ours, x, atol=0.01)


def _their_start(name: str, x: Tensor, eps: float) -> Tensor:
    if name == "PGD":
        return torch.empty_like(x).uniform_(-eps, eps)
    delta = torch.empty_like(x).normal_()
    flat = delta.view(x.size(0), -1)
    n = flat.norm(p=2, dim=1).view(x.size(0), 1, 1, 1)
    r = torch.zeros_like(n).uniform_(0, 1)
    return delta * (r / n * eps)


def test_no_budget_at_all_is_the_identity(network, digits, labels) -> None:
    x = digits[:5]
    assert torch.equal(joint_space_adv(x, labels[:5], network, NoFlow(), steps=3), x)
    assert torch.equal(joint_space_adv(x, None, network, steps=0, eps=0.1), x)


def test_no_steps_is_the_random_start(network, digits, labels, flow) -> None:
    x = digits[:6]
    start = 0.1 * unit_ball("linf", tuple(x.shape), torch.rand, torch.randn)
    out = joint_space_adv(x, labels[:6], network, eps=0.1, steps=0, pixel_start=start)
    assert torch.allclose(out, (x + start).clamp(0, 1), atol=1e-6)
    latent = 0.05 * unit_ball("linf", (6, 64), torch.rand, torch.randn)
    out = joint_space_adv(x, None, network, flow, eta=0.05, steps=0, latent_start=latent)
    assert torch.allclose(out, flow.decode(flow.encode(x) + latent).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 5])
def test_without_pixel_budget_it_is_the_on_manifold_attack(
    norm, steps, network, digits, labels, flow
) -> None:
    """OM-FGSM and OM-PGD, written out."""
    network.eval()
    # Away from black and white, where clipping has no part in it.
    x, y, eta = 0.25 + 0.5 * digits[:12], labels[:12], 0.05 if norm == "linf" else 0.2
    size = eta / 2
    z0 = flow.encode(x)
    r = x - flow.decode(z0)
    z = z0.clone()
    for _ in range(steps):
        leaf = z.detach().requires_grad_()
        loss = nn.functional.cross_entropy(
            network((flow.decode(leaf) + r).clamp(0, 1)), y, reduction="sum"
        )
        (g,) = torch.autograd.grad(loss, leaf)
        if norm == "linf":
            z = torch.maximum(torch.minimum(z + size * g.sign(), z0 + eta), z0 - eta)
        else:
            away = z + size * g / g.norm(dim=1, keepdim=True) - z0
            z = z0 + away * (eta / away.norm(dim=1, keepdim=True)).clamp(max=1)
    expected = (flow.decode(z) + r).clamp(0, 1)
    ours = joint_space_adv(
        x, y, network, flow, eta=eta, latent_norm=norm, steps=steps, latent_step_size=size
    )
    assert expected.min() > 0
    assert expected.max() < 1
    assert torch.allclose(ours, expected, atol=2e-5)
    assert (flow.encode(ours) - z0).abs().max() > eta / 10


class Linear(nn.Module):
    """Two classes; the loss of class 0 grows along ``w``."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w.flatten()
        return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.mark.parametrize("objective", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_model_the_optimum_is_reached(norm, objective) -> None:
    w = torch.randn(3, 4, 4, dtype=torch.float64)
    x = 0.4 + 0.2 * torch.rand(5, 3, 4, 4, dtype=torch.float64)
    eps = 0.1
    best = w.sign() if norm == "linf" else w / w.norm()
    out = joint_space_adv(
        x, torch.zeros(5, dtype=torch.long), Linear(w), eps=eps, norm=norm, steps=4,
        objective=objective,
    )  # fmt: skip
    assert torch.allclose(out - x, (eps * best).expand_as(x), atol=1e-9)


@dataclass(frozen=True)
class LinearFlow:
    """x = A z + b."""

    a: Tensor
    b: Tensor
    shape: tuple[int, int, int]

    @property
    def latent_dim(self) -> int:
        return len(self.a)

    def encode(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.a, (x.flatten(1) - self.b).T).T

    def decode(self, z: Tensor) -> Tensor:
        return (z @ self.a.T + self.b).unflatten(1, self.shape)


@pytest.mark.parametrize("method", ["exact", "linear"])
@pytest.mark.parametrize("norms", [("linf", "l2"), ("l2", "linf"), ("l2", "l2"), ("linf", "linf")])
def test_with_a_linear_flow_the_ellipsoid_is_reached(norms, method) -> None:
    """The maximum of <w, x'> is eps ||w||* + eta ||A^T w||*, dual norms."""
    norm, latent_norm = norms
    a = 0.05 * torch.randn(12, 12, dtype=torch.float64)
    flow = LinearFlow(a, torch.full((12,), 0.5, dtype=torch.float64), (3, 2, 2))
    w = torch.randn(3, 2, 2, dtype=torch.float64)
    x = 0.45 + 0.1 * torch.rand(6, 3, 2, 2, dtype=torch.float64)
    eps, eta = 0.02, 0.05
    out = joint_space_adv(
        x, torch.zeros(6, dtype=torch.long), Linear(w), flow, eps=eps, eta=eta, norm=norm,
        latent_norm=latent_norm, steps=5, method=method,
    )  # fmt: skip
    dual = {"linf": lambda v: v.abs().sum(), "l2": lambda v: v.norm()}
    gain = eps * dual[norm](w) + eta * dual[latent_norm](a.T @ w.flatten())
    reached = ((out - x) * w).flatten(1).sum(1)
    assert torch.allclose(reached, gain.expand(6), rtol=1e-6)


def test_with_the_identity_as_flow_it_is_the_sum_of_two_pixel_balls(digits) -> None:
    w = torch.randn(1, 8, 8)
    x = 0.3 + 0.4 * digits[:4]
    out = joint_space_adv(
        x, torch.zeros(4, dtype=torch.long), Linear(w), IdentityFlow(), eps=0.05, eta=0.07, steps=3
    )
    assert torch.allclose(out, x + 0.12 * w.sign(), atol=1e-6)


@pytest.mark.parametrize("update", ["joint", "alternating", "sequential"])
def test_joint_space_is_worse_than_each_space(update, network, digits, labels, flow) -> None:
    """On average over trained networks and images, at equal steps."""
    network.eval()
    x, y = digits, labels

    def loss(**budget: float) -> float:
        out = joint_space_adv(x, y, network, flow, steps=10, update=update, **budget)
        return nn.functional.cross_entropy(network(out), y).item()

    pixel, latent = loss(eps=8 / 255), loss(eta=0.046)
    joint = loss(eps=8 / 255, eta=0.046)
    assert joint > 1.2 * max(pixel, latent)
    assert min(pixel, latent) > 1.5 * loss()


@pytest.mark.data
def test_joint_space_is_worse_than_each_space_on_cifar(cifar_test) -> None:
    from benchmarks.real_data import cifar10
    from ijsat_aug import load_flow
    from ijsat_aug.flows.probe import probe_network

    images, classes = cifar10(batches=1)
    network = probe_network(images[:2000] / 255, classes[:2000], steps=100)
    x, y = cifar_test[:16], cifar10(train=False)[1][:16]
    flow = load_flow("cifar10")

    def loss(**budget: float) -> float:
        out = joint_space_adv(x, y, network, flow, steps=4, **budget)
        return float(nn.functional.cross_entropy(network(out), y))

    pixel, latent = loss(eps=2 / 255), loss(eta=0.02)
    assert loss(eps=2 / 255, eta=0.02) > max(pixel, latent)
    assert min(pixel, latent) > loss()
    assert math.isfinite(pixel)


def test_linear_is_one_exact_step_without_the_decode(network, digits, labels, flow) -> None:
    network.eval()
    x, y = digits[:32], labels[:32]
    options = {"eps": 4 / 255, "eta": 0.046}
    exact = joint_space_adv(x, y, network, flow, latent_steps=1, steps=3, **options)
    linear = joint_space_adv(x, y, network, flow, method="linear", steps=3, **options)
    close = (exact - linear).abs().flatten(1).amax(1) < 1e-4
    assert close.float().mean() > 0.9  # elsewhere a sign near zero fell the other way


@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_a_start_outside_the_balls_is_brought_into_them(eps, net, digits, flow) -> None:
    x = digits[:4]

    def start(by: float) -> Tensor:
        return joint_space_adv(
            x, None, net, flow, eps=eps, eta=0.1, steps=0,
            pixel_start=by * eps * torch.ones_like(x),
            latent_start=torch.full((4, 64), by * 0.1),
        )  # fmt: skip

    assert torch.allclose(start(9.0), start(1.0), atol=1e-6)
    assert not torch.allclose(start(0.5), start(1.0), atol=1e-3)


def test_what_does_not_move_stays_bit_for_bit(net, digits, labels) -> None:
    x = (digits - 0.4914) / 0.247
    scale = {"mean": 0.4914, "std": 0.247}
    adv = JointSpaceAdv(net, eta=0, eps=0.1, step_size=0.0, random_start=False, **scale)
    assert torch.equal(adv(x, labels)[0], x)


def test_dropout_in_the_functional_form_has_a_seed(network, digits, labels) -> None:
    network[6].p = 0.5
    state = torch.get_rng_state()
    one, two, other = (
        joint_space_adv(digits, labels, network, eps=0.1, steps=2, model_mode="train", seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
