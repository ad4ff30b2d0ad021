"""Properties that hold for any image, budget and setting."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ijsat_aug import load_flow
from ijsat_aug.attack.balls import BALLS
from ijsat_aug.transforms import JointSpaceAdv

NORMS = st.sampled_from(["linf", "l2"])


def random_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    )


def random_images(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 8, 8, generator=generator)
    return (2 * x - 0.5).clamp(0, 1)  # a quarter black, a quarter white


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 5),
    eps=st.floats(0, 1),
    eta=st.floats(0, 2),
    norm=NORMS,
    latent_norm=NORMS,
    steps=st.integers(0, 4),
    step=st.none() | st.floats(0, 3),
    update=st.sampled_from(["joint", "alternating", "sequential"]),
    objective=st.sampled_from(["ce", "margin"]),
    finish=st.sampled_from([{}, {"best": True}, {"tau": 0}, {"tau": 1}]),
    random_start=st.booleans(),
    soft=st.booleans(),
)
def test_budgets_range_and_detachment(
    seed, count, eps, eta, norm, latent_norm, steps, step, update, objective, finish, random_start,
    soft,
) -> None:  # fmt: skip
    # one step cannot move both in turn
    assume(steps != 1 or update == "joint" or not (eps and eta))
    x = random_images(seed, count)
    y = torch.rand(count, 5).softmax(1) if soft else torch.randint(5, (count,))
    adv = JointSpaceAdv(
        random_network(seed), load_flow("digits"), eps=eps, eta=eta, norm=norm,
        latent_norm=latent_norm, steps=steps, step_size=step, latent_step_size=step,
        update=update, objective=objective, random_start=random_start, generator=seed, **finish,
    )  # fmt: skip
    out, same = adv(x, y)
    assert same is y
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert not out.requires_grad
    assert out.isfinite().all()
    assert out.min() >= 0
    assert out.max() <= 1
    if eps == eta == 0:
        assert torch.equal(out, x)
        return
    if "pixel_norm" in adv.last:
        assert (adv.last["pixel_norm"] <= eps * (1 + 1e-6) + 1e-6).all()
    if "latent_norm" in adv.last:
        assert (adv.last["latent_norm"] <= eta * (1 + 1e-6) + 2e-6).all()
    if eta == 0:
        assert (BALLS[norm](x, eps).distance(out) <= eps * (1 + 1e-6) + 1e-6).all()
    if finish == {"best": True} and steps:
        assert (adv.last["loss"] >= adv.last["loss_start"]).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 6), steps=st.integers(1, 3))
def test_order_in_the_batch_does_not_matter(seed, count, steps) -> None:
    net, x = random_network(seed), random_images(seed, count)
    y, order = torch.randint(5, (count,)), torch.randperm(count)
    adv = JointSpaceAdv(net, load_flow("digits"), steps=steps, eps=0.05, random_start=False)
    there, _ = adv(x, y)
    back, _ = adv(x[order], y[order])
    assert (there[order] - back).abs().gt(1e-3).float().mean() < 0.05
