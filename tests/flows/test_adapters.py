"""Other manifolds under the real attack: normflows models, a generator, an autoencoder."""

from __future__ import annotations

import pickle

import normflows as nf
import pytest
import torch
from torch import Tensor, nn

from ijsat_aug import JointSpaceAdv, RobustMixup
from ijsat_aug.flows import (
    Decoder,
    GlowConfig,
    Manifold,
    NormflowsManifold,
    Pyramid,
    Tiles,
    calibrate,
    round_trip,
)
from ijsat_aug.flows.glow import from_unit, to_unit
from ijsat_aug.functional import joint_space_adv, robust_mixup
from tests.conftest import random_glow, trained_glow


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
    assert loss(adv.model(out.float()), y) > loss(adv.model(x.float()), y)
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
    assert manifold.decode(torch.zeros(2, 64)).shape == (2, 1, 8, 8)  # before any encode
    z = manifold.encode(x)
    assert z.shape == (8, 64)
    assert torch.allclose(manifold.decode(z), flow.decode(flow.encode(x)), atol=1e-4)
    climbs(JointSpaceAdv(net, manifold, eps=0, eta=0.05, random_start=False), x, y)
    mixed, _ = robust_mixup(x, y, lam=0.5, num_classes=10, space="latent", flow=manifold)
    assert mixed.shape == x.shape
    mix = RobustMixup(net, num_classes=10, attack=JointSpaceAdv(net, manifold, eta=0.05))
    assert mix(x, y)[1].shape == (8, 10)


def conditional() -> nf.ConditionalNormalizingFlow:
    """Splines whose shape depends on the class, with all weights away from zero."""
    torch.manual_seed(0)
    flows = [
        nf.flows.CoupledRationalQuadraticSpline(
            64, 1, 32, num_context_channels=10, tail_bound=1, reverse_mask=bool(k)
        )
        for k in range(2)
    ]  # fmt: skip
    model = nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(64), flows)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rows(labels: Tensor) -> Tensor:
    """Classes or probabilities as probabilities."""
    soft = labels.is_floating_point()
    return labels if soft else nn.functional.one_hot(labels, 10).float()


def test_a_conditional_flow_of_a_given_context(net, digits, labels) -> None:
    x, y = digits[:9], labels[:9]
    manifold = NormflowsManifold(conditional(), (1, 8, 8), flat=True).given(rows(y))
    z = manifold.encode(x)
    assert torch.allclose(manifold.decode(z), x, atol=1e-4)
    assert not torch.allclose(manifold.given(rows(y.roll(1))).decode(z), x, atol=1e-2)
    options = {"eps": 0, "eta": 0.1, "random_start": False}
    climbs(JointSpaceAdv(net, manifold, **options), x, y)
    climbs(JointSpaceAdv(net, manifold, steps=3, tau=0, **options), x, y)
    with pytest.raises(ValueError, match="3 images and 9 contexts do not go together"):
        JointSpaceAdv(net, manifold, fraction=1 / 3, **options)(x, y)
    with pytest.raises(ValueError, match="1 images and 9 contexts"):
        manifold.decode(z[:1])
    without = NormflowsManifold(conditional(), (1, 8, 8), flat=True)
    with pytest.raises(ValueError, match=r"give the batch's context, \.given\("):
        without.encode(x)
    with pytest.raises(ValueError, match=r"give the batch's context, \.given\("):
        JointSpaceAdv(net, without, **options)(x, y)


def test_a_conditional_flow_gets_the_labels_of_the_batch(net, digits, labels) -> None:
    x, y = digits[:30], labels[:30]
    manifold = NormflowsManifold(conditional(), (1, 8, 8), flat=True, from_labels=rows)
    options = {"eps": 0, "eta": 0.1, "random_start": False}
    out = climbs(JointSpaceAdv(net, manifold, **options), x, y)
    known = JointSpaceAdv(net, manifold.given(rows(y)), **options)
    assert torch.equal(out, known(x, y)[0])
    soft, _ = JointSpaceAdv(net, manifold, **options)(x, rows(y))
    assert torch.allclose(soft, out, atol=1e-5)
    friendly = climbs(JointSpaceAdv(net, manifold, steps=3, tau=0, **options), x, y)
    assert not torch.equal(friendly, out)
    some, _ = JointSpaceAdv(net, manifold, fraction=0.5, generator=0, **options)(x, y)
    moved = (some != x).flatten(1).any(1)
    assert 12 <= moved.sum() <= 15
    assert torch.allclose(some[moved], out[moved], atol=1e-5)
    mix = RobustMixup(net, num_classes=10, attack=JointSpaceAdv(net, manifold, eta=0.1))
    assert mix(x, y)[1].shape == (30, 10)
    for kind in (manifold.given(rows(y)), Pyramid(manifold.given(rows(y)), (16, 16))):
        with pytest.raises(ValueError, match="no latents between two images"):
            robust_mixup(x, y, lam=0.0, num_classes=10, space="latent", flow=kind)
    with pytest.raises(ValueError, match="no latents between two images"):
        RobustMixup(net, num_classes=10, space="latent", flow=manifold)
    with pytest.raises(ValueError, match="the flow needs the labels of the batch, which has none"):
        JointSpaceAdv(net, manifold, **options)(x)
    with pytest.raises(ValueError, match=r"give the batch's context, \.given\("):
        manifold.encode(x)


def test_latents_that_are_no_numbers_are_no_scale() -> None:
    parts = [nf.flows.Permute(4)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), parts)
    manifold = NormflowsManifold(
        model, (1, 2, 2), flat=True, to_model=torch.logit, from_model=torch.sigmoid
    )
    images = torch.rand(5, 1, 2, 2)
    images[0, 0, 0, 0] = 0
    with pytest.raises(ValueError, match="logit of a black pixel"):
        manifold.standardised(images)


def test_what_is_made_in_inference_mode_has_gradients() -> None:
    parts = [nf.flows.Permute(4), nf.flows.AffineConstFlow(4)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), parts)
    images = torch.rand(5, 1, 2, 2)
    with torch.inference_mode():
        manifold = NormflowsManifold(model, (1, 2, 2), flat=True).standardised(images)
        moved = manifold.to("meta")
    z = manifold.encode(images).requires_grad_()
    manifold.decode(z).sum().backward()
    assert z.grad is not None
    assert not any(p.is_inference() for p in moved.model.parameters())


@pytest.mark.parametrize("kind", [Pyramid, Tiles])
def test_a_conditional_flow_of_another_size(kind, net, digits, labels) -> None:
    """Every sample as if it were alone with its label, also when samples rest."""
    x = nn.functional.interpolate(digits[:6], (12, 9), mode="bilinear", antialias=True)
    y = labels[:6]
    small = nn.Sequential(nn.AdaptiveAvgPool2d(8), net).eval()
    manifold = kind(
        NormflowsManifold(conditional(), (1, 8, 8), flat=True, from_labels=rows), (12, 9)
    )
    given = manifold.of_labels(y)
    z = given.encode(x)
    one = given.of_samples(torch.tensor([4]))
    assert torch.allclose(one.encode(x[4:5]), z[4:5], atol=1e-5)
    assert torch.allclose(
        manifold.of_labels(y[4:5]).decode(z[4:5]), given.decode(z)[4:5], atol=1e-5
    )
    options = {"eps": 0, "eta": 0.1, "random_start": False}
    climbs(JointSpaceAdv(small, manifold, steps=3, tau=0, **options), x, y)


def test_classes_of_the_base_density_alone_change_no_latent(net, digits, labels) -> None:
    """normflows' MultiscaleFlow and ClassCondFlow use the class in their base, and nowhere else."""
    x, y = digits[:6], labels[:6]
    config = GlowConfig(shape=(1, 8, 8), levels=2, steps=2, hidden=8, bins=17, num_classes=10)
    glow = random_glow(config)
    assert glow.class_cond
    base = nf.distributions.ClassCondDiagGaussian(64, 10)
    shallow = nf.ClassCondFlow(base, realnvp(digits).flows)
    for model, options in ((glow, {}), (shallow, {"flat": True})):
        plain = NormflowsManifold(model, (1, 8, 8), from_labels=rows, **options)
        z = plain.encode(x)
        assert torch.allclose(plain.decode(z), x, atol=1e-4)
        assert torch.equal(plain.given(y).encode(x), z)
        climbs(JointSpaceAdv(net, plain.given(y), eps=0, eta=0.1, random_start=False), x, y)
        JointSpaceAdv(net, plain, eta=0.1)(x)  # without labels


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_under_autocast_no_move_is_no_change(method, net, digits, labels) -> None:
    x, y = digits[:10], labels[:10]
    flow = NormflowsManifold(realnvp(digits), (1, 8, 8), flat=True)
    wide = nn.functional.interpolate(x, (12, 9), mode="bilinear", antialias=True)
    small = nn.Sequential(nn.AdaptiveAvgPool2d(8), net).eval()
    options = {"eps": 0, "eta": 1e-7, "method": method, "random_start": False}
    for model, manifold, images in ((net, flow, x), (small, Pyramid(flow, (12, 9)), wide)):
        adv = JointSpaceAdv(model, manifold, amp_dtype=torch.bfloat16, **options)
        assert (adv(images, y)[0] - images).abs().max() < 2e-5


def test_double_precision(net, digits, labels) -> None:
    x, y = digits[:6].double(), labels[:6]
    encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    manifolds = [
        NormflowsManifold(realnvp(digits), (1, 8, 8), flat=True),
        NormflowsManifold(realnvp(digits), (1, 8, 8), flat=True).standardised(digits),
        Decoder(generator(), (1, 8, 8), (12,), encode=encode),
    ]
    for manifold in manifolds:
        z = manifold.encode(x)
        assert z.dtype == manifold.decode(z).dtype == torch.float64
        out = climbs(JointSpaceAdv(net, manifold, eps=0, eta=0.3, random_start=False), x, y)
        assert out.dtype == torch.float64


def test_a_manifold_without_radius_is_calibrated(net, digits, labels) -> None:
    x, y = digits[:64], labels[:64]
    manifold = NormflowsManifold(realnvp(digits), (1, 8, 8), flat=True)
    with pytest.raises(ValueError, match=r"flows\.calibrate\(flow, images\)\['recommended'\]"):
        JointSpaceAdv(net, manifold)
    table = calibrate(manifold, x, y, network=net, etas=(0.02, 0.05, 0.1, 0.2))
    eta = table["recommended"]["linf"]
    still = JointSpaceAdv(net, manifold, eps=0, eta=eta, random_start=False)
    rms = (still(x, y)[0] - x).square().mean((1, 2, 3)).sqrt().median()
    assert rms == pytest.approx(8 / 255, rel=0.3)
    assert max(round_trip(manifold, x).values()) < 1e-4


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
    with pytest.raises(ValueError, match="5 images and 10 latents"):
        JointSpaceAdv(net, moved, eta=0.3, fraction=0.5)(x, y)
    own = net(x).argmax(1)
    friendly = joint_space_adv(x, own, net, moved, eta=0.3, steps=4, tau=0)
    assert loss(net(friendly), own) > loss(net(x), own)
    again = pickle.loads(pickle.dumps(moved))
    assert torch.equal(again.encode(x), moved.encode(x))
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


def test_the_users_generator_is_left_alone(net, digits, labels) -> None:
    """Training statistics of a generator in train mode would move with every decode."""
    encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12)).train()
    make = nn.Sequential(nn.Linear(12, 64), nn.BatchNorm1d(64), nn.Unflatten(1, (1, 8, 8))).train()
    before = [b.clone() for m in (encode, make) for b in m.buffers()]
    manifold = Decoder(make, (1, 8, 8), (12,), encode=encode)
    z = manifold.encode(digits[:8])
    assert torch.allclose(manifold.decode(z)[:1], manifold.decode(z[:1]), atol=1e-6)
    climbs(JointSpaceAdv(net, manifold, eps=0, eta=0.3, steps=2), digits[:8], labels[:8])
    after = [b for m in (encode, make) for b in m.buffers()]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert all(p.grad is None and p.requires_grad for p in make.parameters())
    assert make.training


def test_everything_moves_to_the_device() -> None:
    meta = torch.device("meta")
    shift = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(4, trainable=False), [nf.flows.Permute(4)]
    )  # buffers alone
    flow = NormflowsManifold(shift, (1, 2, 2), flat=True).standardised(torch.rand(9, 1, 2, 2))
    assert flow.to("cpu") is flow
    assert all(b.device == meta for b in flow.to("meta").model.buffers())
    assert flow.to("meta").encode(torch.rand(3, 1, 2, 2, device=meta)).device == meta
    affine = nf.flows.MaskedAffineAutoregressive(4, 8, context_features=10)
    model = nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(4), [affine])
    given = NormflowsManifold(model, (1, 2, 2), flat=True).given(torch.zeros(3, 10))
    assert given.to("meta").encode(torch.rand(3, 1, 2, 2, device=meta)).device == meta
    known = Decoder(generator(), (1, 8, 8), (12,)).at(torch.zeros(3, 12))
    assert known.to("cpu") is known
    assert known.to("meta").encode(torch.zeros(3, 1, 8, 8, device=meta)).device == meta
    assert known.to("meta").decode(torch.zeros(3, 12, device=meta)).device == meta


def test_mistakes() -> None:
    with pytest.raises(TypeError, match="one of normflows"):
        NormflowsManifold(nn.Linear(2, 2), (1, 8, 8))
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(64), [nf.flows.Permute(64)])
    with pytest.raises(ValueError, match="belong together"):
        NormflowsManifold(model, (1, 8, 8), flat=True, to_model=lambda x: x)
    with pytest.raises(ValueError, match="the model is not conditional"):
        NormflowsManifold(model, (1, 8, 8), flat=True, from_labels=rows)
    with pytest.raises(ValueError, match="the model is not conditional"):
        NormflowsManifold(model, (1, 8, 8), flat=True).given(torch.zeros(2, 10))


def test_a_model_that_works_in_place_leaves_the_images(network, digits, labels) -> None:
    parts = [[nf.flows.GlowBlock(4, 8, scale_map="exp"), nf.flows.Squeeze()]]
    base, shift = [nf.distributions.DiagGaussian((4, 4, 4))], nf.transforms.Shift()
    model = nf.MultiscaleFlow(base, parts, [], transform=shift, class_cond=False)
    x = digits[:4].clone()
    model(x.clone())  # ActNorm looks at its first batch
    manifold = NormflowsManifold(model, (1, 8, 8))
    z = manifold.encode(x)
    assert torch.equal(x, digits[:4])
    before = z.clone()
    assert torch.allclose(manifold.decode(z), x, atol=1e-4)
    assert torch.equal(z, before)
    moved, _ = JointSpaceAdv(network, manifold, eps=0, eta=1e-4)(x, labels[:4])
    assert (moved - x).abs().max() < 0.01


def test_one_image_has_no_variance() -> None:
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [nf.flows.Permute(4)])
    with pytest.raises(ValueError, match="1 images have no variance"):
        NormflowsManifold(model, (1, 2, 2), flat=True).standardised(torch.rand(1, 1, 2, 2))


def test_standardised_anew_it_is_that_of_the_new_images() -> None:
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [nf.flows.Permute(4)])
    manifold = NormflowsManifold(model, (1, 2, 2), flat=True)
    one, two = torch.rand(50, 1, 2, 2), 0.1 * torch.rand(50, 1, 2, 2)
    z = manifold.standardised(one).standardised(two).encode(two)
    assert torch.allclose(z, manifold.standardised(two).encode(two), atol=1e-4)


def test_a_model_that_waits_for_its_first_batch_is_refused() -> None:
    model = nf.NormalizingFlow(
        nf.distributions.DiagGaussian((1, 4, 4)), [nf.flows.ActNorm((1, 1, 1))]
    )
    with pytest.raises(ValueError, match=r"flows\.0 was never initialised"):
        NormflowsManifold(model, (1, 4, 4))
    model.flows[0].inverse(torch.rand(8, 1, 4, 4))
    NormflowsManifold(model, (1, 4, 4))


def test_autocast_does_not_round_what_must_come_back(digits: Tensor) -> None:
    config = GlowConfig(shape=(1, 8, 8), levels=2, steps=2, hidden=8, bins=17)
    for manifold in (
        NormflowsManifold(realnvp(digits), (1, 8, 8), flat=True),
        NormflowsManifold(random_glow(config), (1, 8, 8)),
    ):
        x = 0.1 + 0.8 * digits[:8]
        with torch.autocast("cpu", torch.bfloat16):
            assert (manifold.decode(manifold.encode(x)) - x).abs().max() < 1e-4


def test_moving_a_manifold_leaves_the_one_that_was_there() -> None:
    generator = nn.Sequential(nn.Linear(5, 64), nn.Unflatten(1, (1, 8, 8)))
    here = Decoder(generator, (1, 8, 8), (5,))
    there = here.to("meta")
    assert there.decode(torch.zeros(2, 5, device="meta")).is_meta
    assert here.decode(torch.zeros(2, 5)).isfinite().all()


def test_a_latent_that_never_changes_has_no_infinite_value() -> None:
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [nf.flows.Permute(4)])
    images = torch.rand(50, 1, 2, 2)
    images[:, :, 0, 0] = 0
    manifold = NormflowsManifold(model, (1, 2, 2), flat=True).standardised(images)
    assert manifold.encode(images).isfinite().all()
    assert torch.allclose(manifold.decode(manifold.encode(images)), images, atol=1e-6)
