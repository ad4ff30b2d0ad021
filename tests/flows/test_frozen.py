"""The frozen decoder is normflows' function, and its hand-written gradient is autograd's."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ijsat_aug import load_flow
from ijsat_aug.flows.fold import freeze
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.flows.glow import GlowConfig, from_unit, to_unit
from ijsat_aug.flows.manifold import Manifold
from tests.conftest import random_glow, trained_glow

RANDOM = {
    "rgb": GlowConfig(shape=(3, 16, 16), levels=3, steps=3, hidden=16),
    "one level": GlowConfig(shape=(1, 4, 6), levels=1, steps=2, hidden=8),
    "logit": GlowConfig(shape=(1, 8, 8), levels=2, steps=2, hidden=8, bins=17, logit=0.05),
    "patches of 4": GlowConfig(shape=(3, 16, 24), levels=2, steps=2, hidden=8, patch=4),
    "classes": GlowConfig(shape=(3, 8, 8), levels=2, steps=2, hidden=8, num_classes=4),
}
TRAINED = ("digits", "cifar10", "cifar10-fast", "fashion-mnist")
# Four couplings a level stretch more each, and what is no image lies further out: its card says so.
FAR_OUT = {"cifar10-fast": 1e-3}
# Near black the logit transform is steep, so that bfloat16 turns the gradient of a few samples.
LOW = {"fashion-mnist": 0.5}


def pair(name: str, dtype: torch.dtype) -> tuple[Any, FrozenGlow]:
    """The same flow in normflows and frozen."""
    if name in TRAINED:
        config, model = trained_glow(name)
    else:
        config, model = RANDOM[name], random_glow(RANDOM[name])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return model.to(dtype), freeze(config, state, dtype=dtype)


def latents(model: Any, flow: FrozenGlow, x: Tensor) -> Tensor:
    """normflows' latents, flat and standardised by hand."""
    parts, _ = model.inverse_and_log_det(to_unit(x, flow.config.bins))
    return (torch.cat([part.flatten(1) for part in parts], 1) - flow.mean) / flow.std


def pixels(model: Any, flow: FrozenGlow, z: Tensor) -> Tensor:
    """normflows' decode of flat, standardised latents."""
    sizes = [c * h * w for c, h, w in flow.config.latent_shapes]
    split = (z * flow.std + flow.mean).split(sizes, 1)
    parts = [p.unflatten(1, s) for p, s in zip(split, flow.config.latent_shapes, strict=True)]
    return from_unit(model.forward_and_log_det(parts)[0], flow.config.bins)


def images(flow: FrozenGlow, count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, *flow.shape, dtype=dtype)


@pytest.mark.parametrize("name", [*RANDOM, *TRAINED])
def test_equals_normflows_in_float64(name: str) -> None:
    model, flow = pair(name, torch.float64)
    x = images(flow, dtype=torch.float64)
    z = latents(model, flow, x)
    torch.testing.assert_close(flow.encode(x), z, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(flow.decode(z), pixels(model, flow, z), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [*RANDOM, *TRAINED])
def test_equals_normflows_in_float32(name: str) -> None:
    model, flow = pair(name, torch.float32)
    x = images(flow)
    z = latents(model, flow, x)
    apart = FAR_OUT.get(name, 5e-5)
    torch.testing.assert_close(flow.encode(x), z, rtol=1e-4, atol=10 * apart)
    torch.testing.assert_close(flow.decode(z), pixels(model, flow, z), rtol=0, atol=apart)


@pytest.mark.parametrize("name", [*RANDOM, *TRAINED])
@pytest.mark.parametrize("way", ["autograd", "low memory", "decode tape", "encode tape"])
def test_every_gradient_equals_autograd_through_normflows(name: str, way: str) -> None:
    model, flow = pair(name, torch.float64)
    x = images(flow, dtype=torch.float64)
    g = torch.randn_like(x)
    z = flow.encode(x).requires_grad_()
    (expected,) = torch.autograd.grad(pixels(model, flow, z), z, g)
    if way == "decode tape":
        actual = flow.vjp(flow.decode_with_tape(z.detach())[1], g)
    elif way == "encode tape":
        actual = flow.vjp(flow.encode_with_tape(x)[1], g)
    else:
        other = flow.to(memory="low" if way == "low memory" else "tape")
        (actual,) = torch.autograd.grad(other.decode(z), z, g)
    assert (actual - expected).norm() < 1e-7 * expected.norm()


@pytest.mark.parametrize("name", ["rgb", *TRAINED])
def test_the_float32_gradient_is_close_to_the_float64_one(name: str) -> None:
    model, exact = pair(name, torch.float64)
    flow = pair(name, torch.float32)[1]
    x = images(flow)
    g = torch.randn_like(x)
    z = exact.encode(x.double()).requires_grad_()
    (expected,) = torch.autograd.grad(pixels(model, exact, z), z, g.double())
    actual = flow.vjp(flow.encode_with_tape(x)[1], g)
    assert (actual - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("name", list(RANDOM))
@pytest.mark.parametrize("memory", ["tape", "low"])
def test_gradcheck(name: str, memory: Any) -> None:
    flow = pair(name, torch.float64)[1].to(memory=memory)
    z = flow.encode(images(flow, 1, torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(flow.decode, (z,), fast_mode=True, nondet_tol=1e-9)


@pytest.mark.parametrize("name", [*RANDOM, *TRAINED])
@pytest.mark.parametrize("kind", ["mixed", "black", "white", "noise"])
def test_round_trip_on_unnatural_images(name: str, kind: str) -> None:
    flow = pair(name, torch.float32)[1]
    noise = images(flow, 8)
    x = {
        "mixed": (noise + noise.roll(1, 0)) / 2,
        "black": torch.zeros_like(noise),
        "white": torch.ones_like(noise),
        "noise": noise,
    }[kind]
    apart = 1e-5 if kind in ("black", "white") else FAR_OUT.get(name, 1e-5)
    assert (flow.decode(flow.encode(x)) - x).abs().max() <= apart


def test_round_trip_on_real_digits(digits: Tensor) -> None:
    flow = pair("digits", torch.float32)[1]
    assert (flow.decode(flow.encode(digits)) - digits).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["cifar10", "cifar10-fast"])
def test_round_trip_on_real_photographs(name: str, photographs: Tensor) -> None:
    flow = pair(name, torch.float32)[1]
    mixed = 0.3 * photographs + 0.7 * photographs.roll(1, 0)
    for x in (photographs, mixed):
        assert (flow.decode(flow.encode(x)) - x).abs().max() <= 1e-5


@pytest.mark.data
def test_round_trip_on_real_cifar_images(cifar_test: Tensor) -> None:
    flow = pair("cifar10", torch.float32)[1]
    mixed = (cifar_test + cifar_test.roll(1, 0)) / 2
    for x in (cifar_test, mixed):
        assert (flow.decode(flow.encode(x)) - x).abs().max() <= 1e-5


def test_latents_of_the_base_density_are_standardised() -> None:
    """Samples of normflows' own base arrive in our latent space with mean 0 and variance 1."""
    for name in ("rgb", "classes", "digits"):
        model, flow = pair(name, torch.float64)
        draws = [q(20_000)[0].flatten(1) for q in model.q0]
        z = (torch.cat(draws, 1) - flow.mean) / flow.std
        assert z.mean(0).abs().max() < 0.05, name
        assert (z.var(0) - 1).abs().max() < 0.1, name


def test_trained_latents_are_near_standard_on_real_images(digits: Tensor) -> None:
    z = pair("digits", torch.float32)[1].encode(digits)
    assert z.shape == (len(digits), 64)
    assert 0.8 < float(z.std()) < 1.2
    assert abs(float(z.mean())) < 0.1


@pytest.mark.parametrize("name", TRAINED)
def test_bf16_networks_stay_close_and_their_gradient_points_the_same_way(name: str) -> None:
    flow = pair(name, torch.float32)[1]
    low = flow.to(compute_dtype=torch.bfloat16)
    assert low.compute_dtype == torch.bfloat16
    assert low.dtype == torch.float32
    x = flow.sample(16, 0.7)
    assert (low.decode(low.encode(x)) - x).abs().max() < 0.05
    g = torch.randn_like(x)
    exact, rough = (f.vjp(f.encode_with_tape(x)[1], g) for f in (flow, low))
    assert rough.dtype == torch.float32
    cosines = torch.cosine_similarity(exact, rough)
    assert cosines.median() > 0.99
    assert cosines.min() > LOW.get(name, 0.98)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_touch_the_flow(compute_dtype: torch.dtype) -> None:
    flow = pair("rgb", torch.float32)[1].to(compute_dtype=compute_dtype)
    x = images(flow)
    g = torch.randn_like(x)
    z = flow.encode(x).requires_grad_()
    (plain,) = torch.autograd.grad(flow.decode(z), z, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flow.encode(x), z)
        (inside,) = torch.autograd.grad(flow.decode(z), z, g)
    assert torch.equal(inside, plain)


def test_works_under_no_grad_and_inference_mode() -> None:
    flow = pair("rgb", torch.float32)[1]
    x = images(flow)
    expected = flow.decode(flow.encode(x))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(flow.decode(flow.encode(x)), expected)
            _, tape = flow.encode_with_tape(x)
            assert flow.vjp(tape, torch.ones_like(x)).isfinite().all()


def test_a_flow_made_in_inference_mode_still_has_gradients() -> None:
    model = random_glow(RANDOM["rgb"])
    with torch.inference_mode():
        flow = freeze(RANDOM["rgb"], model.state_dict())
        moved = flow.to(compute_dtype=torch.bfloat16)
    for made in (flow, moved):
        z = torch.zeros(1, made.latent_dim, requires_grad=True)
        made.decode(z).sum().backward()
        assert z.grad is not None


def test_half_precision_images_are_computed_in_float32() -> None:
    flow = pair("rgb", torch.float32)[1]
    x = images(flow).bfloat16()
    assert torch.equal(flow.encode(x), flow.encode(x.float()))


def test_memory_formats_and_strides_do_not_matter() -> None:
    flow = pair("rgb", torch.float32)[1]
    x = images(flow)
    strided = torch.cat((x, x), 3)[..., : x.shape[3]]
    for other in (x.contiguous(memory_format=torch.channels_last), strided, x[0:1].expand_as(x)):
        assert torch.allclose(flow.encode(other), flow.encode(other.contiguous()), atol=1e-6)


def test_inputs_are_left_alone_and_outputs_are_new() -> None:
    flow = pair("logit", torch.float32)[1]
    x = images(flow).requires_grad_()
    before = x.detach().clone()
    z, tape = flow.encode_with_tape(x)
    assert not z.requires_grad
    z_before, g = z.clone(), torch.randn_like(before)
    g_before = g.clone()
    flow.decode(z)
    first = flow.vjp(tape, g)
    assert torch.equal(flow.vjp(tape, g), first)  # a tape can be used again
    assert torch.equal(x, before)
    assert torch.equal(z, z_before)
    assert torch.equal(g, g_before)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_any_batch_size(batch: int) -> None:
    flow = pair("rgb", torch.float32)[1]
    x = images(flow, batch)
    z, tape = flow.encode_with_tape(x)
    assert z.shape == (batch, flow.latent_dim)
    assert flow.decode(z).shape == x.shape
    assert flow.vjp(tape, x).shape == z.shape


def test_a_sample_does_not_depend_on_its_batch() -> None:
    flow = pair("digits", torch.float32)[1]
    x = images(flow, 5)
    alone = torch.cat([flow.encode(x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(flow.encode(x), alone, rtol=1e-4, atol=1e-4)


def test_the_backward_happens_once_and_low_memory_keeps_only_the_image() -> None:
    flow = pair("rgb", torch.float32)[1].to(memory="low")
    saved: list[Tensor] = []
    z = torch.zeros(2, flow.latent_dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = flow.decode(z)
    assert [tuple(t.shape) for t in saved] == [tuple(x.shape)]
    x.clamp_(0, 1)  # what was saved is not the image that the caller holds
    (g,) = torch.autograd.grad(x.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), z)


def test_the_tape_keeps_halves_of_channels_and_bytes_of_gates() -> None:
    config = RANDOM["rgb"]
    flow = pair("rgb", torch.float32)[1]
    _, tape = flow.decode_with_tape(torch.zeros(2, flow.latent_dim))
    expected = 0
    for channels, (_, height, width) in zip(
        config.block_channels, config.latent_shapes, strict=True
    ):
        per_pixel = 2 * 4 * (channels // 2) + 2 * config.hidden
        expected += config.steps * 2 * height * width * per_pixel
    assert tape.nbytes() == expected


def test_moving_a_flow_returns_it_or_a_new_one_and_never_changes_it() -> None:
    flow = pair("rgb", torch.float32)[1]
    assert flow.to("cpu") is flow
    assert flow.to(dtype=torch.float32, memory="tape") is flow
    low = flow.to(compute_dtype=torch.bfloat16)
    assert (low.dtype, low.compute_dtype) == (torch.float32, torch.bfloat16)
    assert flow.compute_dtype == torch.float32
    for more in ({"dtype": torch.float64}, {"compute_dtype": torch.float32}):
        with pytest.raises(ValueError, match="needs more precision than the weights still have"):
            low.to(**more)
    meta = flow.to("meta")
    assert meta.decode(torch.zeros(1, flow.latent_dim, device="meta")).device.type == "meta"
    with pytest.raises(ValueError, match="the flow is on meta and the batch on cpu"):
        meta.encode(images(flow))


def test_a_flow_is_shared_by_deepcopy_and_survives_pickle() -> None:
    flow = pair("digits", torch.float32)[1]
    assert copy.deepcopy(flow) is flow
    again = pickle.loads(pickle.dumps(flow))
    x = images(flow)
    assert torch.equal(again.encode(x), flow.encode(x))


def test_it_is_a_manifold() -> None:
    assert isinstance(pair("rgb", torch.float32)[1], Manifold)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f.encode(torch.rand(2, 1, 16, 16)), ValueError, r"images of shape \(B, 3, 16"),
        (lambda f: f.encode(torch.rand(3, 16, 16)), ValueError, "images of shape"),
        (
            lambda f: f.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)),
            TypeError,
            "divide 8-bit images by 255",
        ),
        (lambda f: f.decode(torch.zeros(2, 5)), ValueError, r"latents of shape \(B, 768\)"),
        (lambda f: f.to(memory="none"), ValueError, "memory must be"),
    ],
)
def test_wrong_input_is_one_clear_sentence(call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(pair("rgb", torch.float32)[1])


def test_the_tape_is_freed_with_the_backward() -> None:
    flow = pair("rgb", torch.float32)[1]
    z = torch.zeros(2, flow.latent_dim, requires_grad=True)
    x = flow.decode(z)
    x.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        x.sum().backward()


def test_low_memory_gradients_are_finite_where_the_logit_saturates(digits: Tensor) -> None:
    flow = pair("digits", torch.float32)[1]
    z = 8 * torch.randn(64, 64)
    for memory in ("tape", "low"):
        leaf = z.clone().requires_grad_()
        flow.to(memory=memory).decode(leaf).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all(), memory


def test_samples_of_a_class_conditional_flow_follow_their_class() -> None:
    config = RANDOM["classes"]
    model = random_glow(config)
    with torch.no_grad():
        for q in model.q0:
            q.loc.copy_(10 * torch.arange(4.0).expand_as(q.loc))
    flow = freeze(config, model.state_dict())
    labels = torch.tensor([0, 1, 2, 3])
    draws: list[Tensor] = []
    original = FrozenGlow.decode
    try:
        FrozenGlow.decode = lambda self, z: draws.append(z) or original(self, z)  # type: ignore
        flow.sample(4, labels=labels)
        flow.sample(400)
    finally:
        FrozenGlow.decode = original  # type: ignore[method-assign]
    given, random = (d * flow.std + flow.mean for d in draws)
    assert torch.equal((given.mean(1) / 10).round(), labels.float())
    assert set((random.mean(1) / 10).round().tolist()) == {0.0, 1.0, 2.0, 3.0}
    with pytest.raises(ValueError, match="do not fit"):
        flow.sample(3, labels=labels)
    with pytest.raises(ValueError, match="class-conditional"):
        pair("rgb", torch.float32)[1].sample(4, labels=labels)


def test_a_default_device_does_not_matter() -> None:
    state = random_glow(RANDOM["rgb"]).state_dict()
    with torch.device("meta"):
        flow = freeze(RANDOM["rgb"], state)
    assert flow.encode(images(flow)).isfinite().all()


def test_a_gradient_of_another_batch_is_refused() -> None:
    flow = pair("rgb", torch.float32)[1]
    _, tape = flow.encode_with_tape(images(flow, 4))
    with pytest.raises(ValueError, match="the tape was recorded for"):
        flow.vjp(tape, images(flow, 1))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tf32_is_off_inside_and_as_before_outside(precision: str) -> None:
    """Also where the user has set convolutions alone, which torch's own context refuses."""
    from ijsat_aug.precision import _without_tf32

    cudnn: Any = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):
        pytest.skip("torch < 2.9 has no precision of convolutions alone")
    before, rnn, benchmark = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark
    cudnn.conv.fp32_precision = precision
    try:
        with _without_tf32():
            assert cudnn.conv.fp32_precision == "ieee"
            assert (cudnn.rnn.fp32_precision, cudnn.benchmark) == (rnn, benchmark)
        assert cudnn.conv.fp32_precision == precision
    finally:
        cudnn.conv.fp32_precision = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TRAINED)
def test_it_is_exact_on_a_gpu_too(name: str) -> None:
    """cuDNN's TF32 would round trip to 4e-3; on noise some flows do to 3e-4, on any device."""
    flow = pair(name, torch.float32)[1].to("cuda")
    blobs = torch.rand(8, flow.shape[0], 4, 4, device="cuda")
    x = F.interpolate(blobs, flow.shape[1:], mode="bilinear")
    assert (flow.decode(flow.encode(x)) - x).abs().max() <= 1e-5
    cpu = pair(name, torch.float32)[1]
    torch.testing.assert_close(flow.encode(x).cpu(), cpu.encode(x.cpu()), rtol=1e-4, atol=1e-3)


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    config = RANDOM["rgb"]
    state = random_glow(config).state_dict()
    name = "flows.0.0.flows.1.L"
    with pytest.raises(ValueError, match=f"tensor '{name}' is missing"):
        freeze(config, {k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match=f"tensor '{name}' has shape"):
        freeze(config, state | {name: torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=f"tensor '{name}' holds values that are not finite"):
        freeze(config, state | {name: state[name] * torch.nan})
    with pytest.raises(ValueError, match="tensor 'extra' is not part"):
        freeze(config, state | {"extra": torch.zeros(1)})


def test_a_flow_that_never_saw_an_image_is_refused() -> None:
    from ijsat_aug.flows.glow import build_glow

    config = RANDOM["logit"]
    with pytest.raises(ValueError, match="was never initialised"):
        freeze(config, build_glow(config).state_dict())


@pytest.mark.parametrize("name", TRAINED)
def test_large_latent_moves_stay_finite(name: str) -> None:
    flow = pair(name, torch.float32)[1]
    z = flow.encode(flow.sample(32, 0.7))
    for eta in (0.05, 0.2, 0.5):
        moved = flow.decode(z + eta * torch.randn_like(z).sign())
        assert moved.isfinite().all()
        assert moved.abs().max() < 10


def test_samples_are_pixels_and_a_temperature_of_zero_is_the_middle(flow) -> None:
    x = flow.sample(64, temperature=1.5)
    assert x.min() == 0
    assert x.max() == 1
    middle = flow.decode(torch.zeros(1, 64)).clamp(0, 1)
    assert torch.allclose(flow.sample(2, temperature=0.0), middle.expand(2, -1, -1, -1), atol=1e-5)


def test_samples_spread_as_their_class_does() -> None:
    flow = freeze(RANDOM["classes"], random_glow(RANDOM["classes"]).state_dict())
    means, stds = flow.base
    still = replace(flow, base=(means, stds * torch.tensor([0.0, 1, 1, 1])[:, None]))
    first = still.sample(4, labels=torch.zeros(4).long())
    assert torch.allclose(first, first[:1].expand_as(first), atol=1e-6)
    second = still.sample(4, labels=torch.ones(4).long())
    assert not torch.allclose(second, second[:1].expand_as(second), atol=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(value) -> None:
    config = RANDOM["classes"]
    state = random_glow(config).state_dict()
    name = next(key for key in state if key.endswith("net.0.bias"))
    state[name][0] = value
    with pytest.raises(ValueError, match="values that are not finite"):
        freeze(config, state)


def test_a_flow_that_moved_in_inference_mode_has_gradients() -> None:
    with torch.inference_mode():
        flow = load_flow("digits").to(compute_dtype=torch.bfloat16)
    assert not any(t.is_inference() for conv in flow.levels[0][0].net for t in conv)
    z = torch.zeros(1, 64, requires_grad=True)
    flow.decode(z).sum().backward()
    assert z.grad is not None
