"""Other manifolds under the real attack: normflows models, a generator, an autoencoder."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from torch import Tensor, nn

from ijsat_aug import JointSpaceAdv, RobustMixup
from ijsat_aug.flows import Decoder, Manifold, NormflowsManifold
from ijsat_aug.flows.glow import from_unit, to_unit
from ijsat_aug.functional import joint_space_adv, robust_mixup
from tests.conftest import trained_glow


@pytest.fixture
def net(network: nn.Sequential) -> nn.Sequential:
    return network.eval()


def realnvp(digits: Tensor) -> nf.NormalizingFlow:
    """A RealNVP that a user trained on flat digits for a moment."""
    mask = torch.arange(64) % 2
    flows = []
    for k in range(4):
        s, t = (nf.nets.MLP([64, 64, 64], init_zeros=True) for _ in range(2))
        flows += [nf.flows.MaskedAffineFlow(mask if k % 2 else 1 - mask, t, s)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(64, trainable=False), flows)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(30):
        x = digits.flatten(1) + torch.rand(len(digits), 64) / 16
        loss = model.forward_kld(x - 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def climbs(adv: JointSpaceAdv, x: Tensor, y: Tensor) -> Tensor:
    out, _ = adv(x, y)
    loss = nn.functional.cross_entropy
    assert loss(adv.model(out), y) > loss(adv.model(x), y)
    assert not adv.last["fallback"].any()
    assert out.min() >= 0
    assert out.max() <= 1
    return out


def test_a_flat_realnvp(net, digits, labels) -> None:
    model = realnvp(digits).train()
    manifold = NormflowsManifold(
        model, (1, 8, 8), flat=True, to_model=lambda x: x - 0.5, from_model=lambda u: u + 0.5
    )
    assert isinstance(manifold, Manifold)
    x, y = digits[:20], labels[:20]
    assert torch.allclose(manifold.decode(manifold.encode(x)), x, atol=1e-4)
    adv = JointSpaceAdv(net, manifold, eps=0, eta=0.1, steps=3, random_start=False)
    climbs(adv, x, y)
    linear = JointSpaceAdv(net, manifold, eps=0, eta=0.1, method="linear")
    climbs(linear, x, y)
    assert model.training  # the user's own is left alone
    assert all(p.grad is None or p.requires_grad for p in model.parameters())
    standard = manifold.standardised(digits)
    z = standard.encode(digits)
    assert (z.mean(0).abs() < 1e-3).all()
    assert torch.allclose(standard.decode(z), digits, atol=1e-4)
    assert torch.equal(manifold.to("cpu").encode(x), manifold.encode(x))


def test_a_multiscale_glow_equals_the_frozen_one(net, digits, labels, flow) -> None:
    config, model = trained_glow("digits")
    bins = config.bins
    manifold = NormflowsManifold(
        model, (1, 8, 8),
        to_model=lambda x: to_unit(x, bins), from_model=lambda u: from_unit(u, bins),
    )  # fmt: skip
    x, y = digits[:8], labels[:8]
    z = manifold.encode(x)
    assert z.shape == (8, 64)
    assert torch.allclose(manifold.decode(z), flow.decode(flow.encode(x)), atol=1e-4)
    climbs(JointSpaceAdv(net, manifold, eps=0, eta=0.05, random_start=False), x, y)
    mixed, _ = robust_mixup(x, y, lam=0.5, num_classes=10, space="latent", flow=manifold)
    assert mixed.shape == x.shape
    mix = RobustMixup(net, num_classes=10, attack=JointSpaceAdv(net, manifold, eta=0.05))
    assert mix(x, y)[1].shape == (8, 10)


def test_a_class_conditional_flow_gets_its_labels(net, digits, labels) -> None:
    """The transform of latents depends on the class."""

    class Shift(nf.flows.Flow):
        def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            return z + context[:, None] / 10, torch.zeros(len(z))

        def inverse(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            return x - context[:, None] / 10, torch.zeros(len(x))

    model = nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(64), [Shift()])
    manifold = NormflowsManifold(model, (1, 8, 8), flat=True).given(labels[:6].float())
    x, y = digits[:6], labels[:6]
    z = manifold.encode(x)
    assert torch.allclose(z, x.flatten(1) - y[:, None] / 10, atol=1e-6)
    assert torch.allclose(manifold.decode(z), x, atol=1e-6)
    climbs(JointSpaceAdv(net, manifold, eps=0, eta=0.05, random_start=False), x, y)


def generator() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid(),
        nn.Unflatten(1, (1, 8, 8)),
    ).requires_grad_(False)  # fmt: skip


def test_a_generator_with_known_latents(net) -> None:
    """As OM-ImageNet: images come with the latents that made them."""
    make, z = generator(), torch.randn(10, 3, 4)
    x, y = make(z), torch.arange(10)
    manifold = Decoder(make, (1, 8, 8), (3, 4))
    out = joint_space_adv(x, y, net, manifold.at(z), eta=0.3, steps=4)
    loss = nn.functional.cross_entropy
    assert loss(net(out), y) > loss(net(x), y)
    moved = manifold.at(z)
    still = joint_space_adv(
        x, y, net, moved, eta=0.3, steps=0, latent_start=torch.full((10, 12), 0.1)
    )
    assert torch.allclose(still, make(z + 0.1), atol=1e-6)  # still on the generator's manifold
    with pytest.raises(ValueError, match=r"\.at\(latents\)"):
        joint_space_adv(x, y, net, manifold, eta=0.3)
    with pytest.raises(ValueError, match="do not go together"):
        joint_space_adv(x[:3], y[:3], net, moved, eta=0.3)
    with pytest.raises(ValueError, match=r"\(B, 3, 4\)"):
        manifold.at(torch.randn(10, 12))


def test_an_autoencoder_misses_the_image_and_no_move_is_no_change(net, digits, labels) -> None:
    encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 12)).requires_grad_(False)
    make = nn.Sequential(generator()).requires_grad_(False)
    manifold = Decoder(make, (1, 8, 8), (12,), encode=encode)
    x, y = digits[:10], labels[:10]
    assert (manifold.decode(manifold.encode(x)) - x).abs().max() > 0.1
    still = joint_space_adv(x, y, net, manifold, eta=0.3, steps=0, latent_start=torch.zeros(10, 12))
    assert torch.allclose(still, x, atol=1e-6)
    climbs(JointSpaceAdv(net, manifold, eps=0, eta=0.5, steps=3, random_start=False), x, y)


def test_mistakes() -> None:
    with pytest.raises(TypeError, match="one of normflows"):
        NormflowsManifold(nn.Linear(2, 2), (1, 8, 8))
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(64), [nf.flows.Permute(64)])
    with pytest.raises(ValueError, match="belong together"):
        NormflowsManifold(model, (1, 8, 8), flat=True, to_model=lambda x: x)
