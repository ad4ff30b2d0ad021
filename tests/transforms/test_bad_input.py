"""Bad input: one clear sentence that names the fix, before the model is called."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import tv_tensors

from ijsat_aug import JointSpaceAdv, RobustMixup, load_flow
from ijsat_aug.transforms.functional import joint_space_adv, robust_mixup
from ijsat_aug.transforms.labels import as_target

BOXES = tv_tensors.BoundingBoxes(torch.rand(4, 4), format="XYXY", canvas_size=(8, 8))
X, Y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])


@pytest.fixture
def untouchable() -> nn.Module:
    class Untouchable(nn.Module):
        def forward(self, x):
            raise AssertionError("the model was called")

    return Untouchable()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ((255 * X).byte(), TypeError, r"uint8.*divide 8-bit images by 255"),
        (Y, TypeError, r"images are torch.int64 of shape \(4,\): they come first"),
        ((255 * X).long(), TypeError, r"int64.*divide"),
        (255 * X, ValueError, r"outside \[0, 1\].*mean= and std=.*255"),
        (X - 0.5, ValueError, r"values from -0\.\d+ to 0\.\d+, outside"),
        (X * torch.nan, ValueError, "NaN or infinite"),
        (X[0], ValueError, r"\(1, 8, 8\).*\(B, C, H, W\).*collated"),
        (X[None], ValueError, r"\(B, C, H, W\)"),
        (["a", "b"], TypeError, "must be a tensor"),
        (
            torch.rand(4, 3, 8, 8),
            ValueError,
            r"takes images of 1 channels, the batch has 3 .*cifar10 3x32x32, "
            r"cifar10-fast 3x32x32, digits 1x8x8, fashion-mnist 1x28x28.*grey",
        ),
    ],
)
def test_images(x, error, message, untouchable, flow) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        JointSpaceAdv(untouchable, flow)(x, Y) if isinstance(x, torch.Tensor) else JointSpaceAdv(
            untouchable, flow
        )((x, Y))
    if isinstance(x, torch.Tensor):
        with pytest.raises(error, match=f"(?s){message}"):
            joint_space_adv(x, Y, untouchable, flow, eps=0.1, eta=0.1)


def test_the_size_of_a_flow_in_the_functional_form(untouchable, flow) -> None:
    with pytest.raises(ValueError, match=r"Pyramid\(flow, \(9, 8\)\), or train a flow"):
        joint_space_adv(torch.rand(4, 1, 9, 8), Y, untouchable, flow, eps=0.1, eta=0.1)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (Y[:3], ValueError, r"4 images and labels of shape \(3,\)"),
        (Y[:, None], ValueError, "squeeze"),
        (torch.eye(4).long(), ValueError, r"pass rows as floats: labels.float\(\)"),
        (Y.float(), ValueError, r"probabilities of shape \(4, classes\).*labels.long"),
        (Y.bool(), TypeError, "torch.bool"),
        (torch.eye(4).bool(), TypeError, r'torch.bool; objective="bce" takes several labels'),
        (torch.eye(4).long(), ValueError, r"pass labels.argmax\(1\)"),
        (torch.zeros(4, 8, 8, dtype=torch.long), ValueError, r"shape \(4, 8, 8\) are none"),
        (torch.tensor(3), ValueError, r"labels of shape \(\)"),
        (
            [0, 1, 2, 3],
            TypeError,
            "must be a tensor of classes or probabilities, got list; pass torch.as_tensor",
        ),
        (Y.numpy(), TypeError, "got ndarray; pass torch.as_tensor"),
        ({"label": Y}, TypeError, "got dict; labels_getter="),
        (-100 * torch.rand(4, 10), ValueError, "rows >= 0 that sum to 1"),
        (torch.full((4, 10), torch.nan), ValueError, "rows >= 0 that sum to 1"),
        (BOXES, TypeError, "got BoundingBoxes"),
        (tv_tensors.Mask(torch.zeros(4, 8, 8, dtype=torch.long)), TypeError, "got Mask"),
    ],
)
def test_labels(y, error, message, untouchable, flow) -> None:
    with pytest.raises(error, match=message):
        JointSpaceAdv(untouchable, flow)(X, y)
    with pytest.raises(error, match=message):
        joint_space_adv(X, y, untouchable, flow, eps=0.1)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (Y + 7, "labels go from 7 to 10, the model knows the classes 0 to 9; .*labels_getter="),
        (Y - 1, "labels go from -1 to 2"),
        (torch.full((4, 5), 0.2), "5 classes and the model 10"),
    ],
)
def test_classes_that_the_model_does_not_have(y, message, network) -> None:
    with pytest.raises(ValueError, match=message):
        JointSpaceAdv(network, eta=0)(X, y)
    assert all(m.training for m in network.modules())


def test_labels_of_other_integer_types_are_fine(network) -> None:
    outs = [JointSpaceAdv(network, eta=0, generator=0)(X, y)[0] for y in (Y, Y.int(), Y.byte())]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_models_of_other_shapes(network, flow) -> None:
    for model, shape in (
        (nn.Identity(), r"\(4, 1, 8, 8\)"),
        (lambda x: x.sum((1, 2, 3)), r"\(4,\)"),
    ):
        with pytest.raises(ValueError, match=rf"returned shape {shape}.*callable objective"):
            JointSpaceAdv(model, eta=0)(X, Y)
    with pytest.raises(TypeError, match="must return logits"):
        JointSpaceAdv(lambda x: None, eta=0)(X, Y)
    with pytest.raises(ValueError, match=r"objective returned shape \(\) for 4 images"):
        JointSpaceAdv(network, eta=0, objective=lambda z, y: z.sum())(X, Y)


def test_dense_outputs_with_a_callable_objective(network) -> None:
    masks = torch.randint(2, (4, 8, 8))

    def objective(logits, target):
        assert target is masks or torch.equal(target, masks)
        return nn.functional.cross_entropy(logits, target, reduction="none").mean((1, 2))

    adv = JointSpaceAdv(nn.Conv2d(1, 2, 3, padding=1), eta=0, eps=0.1, objective=objective)
    out, same = adv(X, masks)
    assert same is masks
    assert (adv.last["loss"] > adv.last["loss_start"] - 1e-6).all()
    assert out.shape == X.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "eps must be a number >= 0"),
        ({"eta": -1}, "eta must be a number >= 0"),
        ({"eps": math.nan}, "eps must be"),
        ({"eta": math.inf}, "eta must be"),
        ({"eps": 8}, "8/255 if you meant 8-bit levels"),
        ({"step_size": -1}, "step_size must be"),
        ({"latent_step_size": math.inf}, "latent_step_size must be"),
        ({"norm": "l1"}, 'norm must be one of "linf", "l2"'),
        ({"norm": "l2"}, "the default, is meant for L-inf"),
        ({"latent_norm": 2}, "latent_norm must be one of"),
        ({"update": "both"}, '"joint", "alternating", "sequential"'),
        ({"method": "fast"}, '"exact", "linear"'),
        ({"objective": "mse"}, '"ce", "bce", "kl", "margin" or a callable'),
        ({"steps": -1}, "steps must be an integer >= 0"),
        ({"steps": 1.5}, "steps must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"latent_steps": 0}, "latent_steps must be an integer >= 1"),
        ({"latent_steps": 3, "steps": 2}, "latent_steps=3 is more than steps=2"),
        ({"latent_steps": 2, "steps": 3, "method": "linear"}, "leave latent_steps out"),
        ({"latent_steps": 1, "steps": 3, "eps": 0}, "nothing moves in the other steps"),
        ({"method": "linear", "steps": 3, "eps": 0}, "set steps=1"),
        ({"tau": -1}, "tau must be an integer >= 0"),
        ({"tau": 1, "best": True}, "exclude each other"),
        ({"p": 1.5}, "p is a probability"),
        ({"p": "0.5"}, "p is a probability, got '0.5'"),
        ({"fraction": "0.5"}, "fraction is a share of the samples, got '0.5'"),
        ({"target": "other"}, '"label", "prediction" or "random"'),
        ({"target": "random"}, "set targeted=True"),
        ({"targeted": True, "objective": "kl"}, 'needs another, such as "ce"'),
        ({"objective": "kl", "random_start": False}, "needs a random start"),
        ({"objective": "kl", "method": "linear", "eps": 0}, "needs a random start"),
        ({"mean": 0.5}, "mean and std belong together"),
        ({"mean": [0.5, 0.5], "std": 0.5}, "mean has 2 values and std 1"),
        ({"mean": 0.5, "std": 0.0}, "every std must be > 0"),
        ({"model_mode": "training"}, 'must be "eval" or "train"'),
        ({"amp_dtype": torch.int8}, "floating torch.dtype"),
        ({"amp_dtype": "bf16"}, "floating torch.dtype, got 'bf16'"),
        ({"memory_format": torch.channels_last_3d}, "memory_format must be"),
        ({"eps": "8/255"}, "eps must be a number >= 0, got '8/255'"),
        ({"eps": None}, "eps must be a number"),
        ({"update": "alternating"}, "never moves delta in steps=1"),
        ({"update": "sequential", "steps": 2, "latent_steps": 2}, "never moves delta"),
    ],
)
def test_settings(options, message, untouchable, flow) -> None:
    with pytest.raises(ValueError, match=message):
        JointSpaceAdv(untouchable, flow, **options)


def test_mean_of_the_wrong_length(untouchable, flow) -> None:
    adv = JointSpaceAdv(untouchable, flow, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(ValueError, match="3 values, the images 1 channels"):
        adv(X, Y)
    adv = JointSpaceAdv(untouchable, eta=0, mean=0.5, std=0.5)
    with pytest.raises(ValueError, match=r"with this mean and std .* outside \[0, 1\]"):
        adv(X * 4, Y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_rounds_the_normalisation_too(dtype, untouchable) -> None:
    """timm normalises in the precision of its model."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    shift, scale = (torch.tensor(v).view(3, 1, 1).mul(255).to(dtype) for v in (mean, std))
    x = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 255)]).to(dtype)
    adv = JointSpaceAdv(untouchable, eta=0, eps=0, mean=mean, std=std)
    adv.check((x - shift) / scale, None)
    with pytest.raises(ValueError, match="outside"):
        adv.check((x * 1.05 - shift) / scale, None)


def test_a_class_is_no_model(flow) -> None:
    with pytest.raises(TypeError, match=r"the class Flatten: make one, Flatten\(\.\.\.\)"):
        JointSpaceAdv(nn.Flatten, flow)


def test_labels_under_an_unknown_name_are_told_of_once(network, flow) -> None:
    batch = {"img": X, "fine_label": Y}
    adv = JointSpaceAdv(network, flow)
    with pytest.warns(UserWarning, match=r"no labels under a usual name.*labels_getter="):
        adv(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adv(batch)
        JointSpaceAdv(network, flow, labels_getter="fine_label")(batch)
        JointSpaceAdv(network, flow, target="prediction")(batch)
        JointSpaceAdv(network, flow)(X)


def test_unknown_and_missing_arguments(untouchable, flow) -> None:
    with pytest.raises(TypeError, match="epsilon"):
        JointSpaceAdv(untouchable, flow, epsilon=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        JointSpaceAdv(untouchable, flow, 0.1)  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"pass it, or call \.bind\(model\)"):
        JointSpaceAdv(None, flow)(X, Y)
    with pytest.raises(TypeError, match="module or a callable, got str"):
        JointSpaceAdv("resnet18", flow)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs a batch"):
        JointSpaceAdv(untouchable, flow)()
    with pytest.raises(TypeError, match=r"torch.Generator or a seed, got str"):
        JointSpaceAdv(untouchable, flow, generator="0")  # type: ignore[arg-type]


def test_flows(untouchable) -> None:
    with pytest.raises(ValueError, match="pass one, or eta=0"):
        JointSpaceAdv(untouchable)
    with pytest.raises(ValueError, match="pass one, or eta=0"):
        JointSpaceAdv(untouchable, eta=0.1)
    with pytest.raises(TypeError, match=r"load one with ijsat_aug\.load_flow"):
        JointSpaceAdv(untouchable, nn.Linear(2, 2), eta=0.1)
    with pytest.raises(TypeError, match=r"load one with ijsat_aug\.load_flow"):
        JointSpaceAdv(untouchable, nn.Linear(2, 2))
    bare = SimpleNamespace(shape=(1, 8, 8), latent_dim=64, encode=torch.flatten, decode=torch.clone)
    with pytest.raises(ValueError, match="no calibrated radius: give eta="):
        JointSpaceAdv(untouchable, bare)
    with pytest.raises(Exception, match="there is no flow 'digit'"):
        JointSpaceAdv(untouchable, "digit")
    flow = load_flow("digits")
    assert JointSpaceAdv(untouchable, "digits").flow is flow
    recommended = flow.info["calibration"]["recommended"]
    assert JointSpaceAdv(untouchable, flow).threat.eta == recommended["linf"]
    assert JointSpaceAdv(untouchable, flow, latent_norm="l2").threat.eta == recommended["l2"]


def test_what_the_model_may_not_do(network, digits, labels, flow) -> None:
    for model in (torch.no_grad()(network.forward), lambda x: network(x.detach())):
        with pytest.raises(ValueError, match="loss has no gradient"):
            JointSpaceAdv(model, eta=0)(digits[:4], labels[:4])
    inside = nn.Sequential(nn.Identity(), nn.DataParallel(network))
    with pytest.raises(ValueError, match="put that wrapper outermost"):
        JointSpaceAdv(inside, eta=0)
    with pytest.raises(ValueError, match="the batch has none"):
        JointSpaceAdv(network, eta=0, targeted=True)(digits[:4])
    with pytest.raises(ValueError, match="needs a model"):
        joint_space_adv(digits[:4], None, None, eps=0.1)
    dense = nn.Conv2d(1, 2, 3, padding=1)
    with pytest.raises(ValueError, match="tau asks whether a class is wrong"):
        JointSpaceAdv(dense, eta=0, tau=0, objective=lambda z, y: z.mean((1, 2, 3)))(X, Y)
    with pytest.raises(ValueError, match="starts at the clean latent"):
        joint_space_adv(
            X, Y, network, flow, eta=0.1, method="linear", latent_start=torch.zeros(4, 64)
        )


@pytest.mark.parametrize("name", ["pixel_start", "latent_start"])
def test_starts_of_the_wrong_shape(name, untouchable, flow) -> None:
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        joint_space_adv(X, Y, untouchable, flow, eps=0.1, eta=0.1, **{name: torch.zeros(4, 3)})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"a": 1, "b": X[:, 0]}, r"cannot tell the images among the keys \['a', 'b'\]"),
        ({"a": X, "b": X}, "cannot tell the images"),
    ],
)
def test_mappings_without_images(batch, message, untouchable) -> None:
    with pytest.raises(ValueError, match=message):
        JointSpaceAdv(untouchable, eta=0)(batch)


class Collate:
    """A picklable collate function with a transform in it."""

    def __init__(self, transform: Callable) -> None:
        self.transform = transform

    def __call__(self, samples: list) -> object:
        return self.transform(*torch.utils.data.default_collate(samples))


def test_in_a_worker(network) -> None:
    data = TensorDataset(X, Y)
    collate = Collate(JointSpaceAdv(network, eta=0))
    here = next(iter(DataLoader(data, batch_size=4, collate_fn=collate)))
    assert here[0].shape == X.shape
    loader = DataLoader(
        data, batch_size=4, collate_fn=collate, num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(ValueError, match=r"DataLoader worker.*stale copy"):
        next(iter(loader))


def test_numbers_of_numpy_are_numbers(network, digits, labels) -> None:
    x = (digits[:4] - 0.5) / 0.25
    outs = [
        JointSpaceAdv(network, eta=0, generator=seed, mean=mean, std=std)(x, labels[:4])[0]
        for seed, mean, std in (
            (3, 0.5, 0.25), (np.int64(3), np.float32(0.5), np.array([0.25])),
            (3, [torch.tensor(0.5)], np.full((1, 1, 1, 1), 0.25)),
        )
    ]  # fmt: skip
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    with pytest.raises(TypeError, match=r"mean and std are numbers, .* got '0\.5'"):
        JointSpaceAdv(network, eta=0, mean="0.5", std=0.25)


@pytest.mark.parametrize("eps", [0, 0.1])
def test_the_start_of_an_attack_that_is_not_ours(eps, network, digits, labels) -> None:
    options = {"lam": 0.5, "num_classes": 10, "pixel_start": torch.zeros_like(digits[:4])}
    if eps:
        options["attack"] = lambda x, t: x
    else:
        options["pixel_start"] = torch.zeros(1)
    with pytest.raises(ValueError, match="pixel_start"):
        robust_mixup(digits[:4], labels[:4], network, **options)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        (JointSpaceAdv, "p", -3, "p is a probability"),
        (JointSpaceAdv, "fraction", 7, "fraction is a share"),
        (JointSpaceAdv, "target", "predicted", "target must be"),
        (JointSpaceAdv, "choose", "hard", "choose must be"),
        (RobustMixup, "p", 2, "p is a probability"),
        (RobustMixup, "draws", 2.5, "draws must be an integer >= 1"),
        (RobustMixup, "alpha", -1, "alpha must be a number > 0"),
        (RobustMixup, "num_classes", 1, "num_classes must be an integer >= 2"),
    ],
)
def test_what_cannot_be_is_refused_later_too(kind, name, value, message, network) -> None:
    transform = kind(network) if kind is RobustMixup else kind(network, eta=0)
    before = getattr(transform, name)
    with pytest.raises(ValueError, match=message):
        setattr(transform, name, value)
    assert getattr(transform, name) == before
    with pytest.raises(ValueError, match="batches must not change their size"):
        RobustMixup(network, mode="append").p = 0.5


def test_a_model_of_probabilities_is_told(network, digits, labels) -> None:
    chances = nn.Sequential(network, nn.Softmax(1))
    with pytest.warns(UserWarning, match="the softmax once more"):
        JointSpaceAdv(chances, eta=0)(digits[:8], labels[:8])


def test_a_batch_that_nobody_normalised_is_doubted(network, digits, labels) -> None:
    """A forgotten Normalize is in the range of what it would have made."""
    x, y = digits[:8], labels[:8]
    options = {"eta": 0, "mean": 0.3, "std": 0.4}
    with pytest.warns(UserWarning, match="lies in .0, 1. as if it were not normalised"):
        JointSpaceAdv(network, **options)(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        JointSpaceAdv(network, **options)((x - 0.3) / 0.4, y)
        JointSpaceAdv(network, eta=0, mean=0.0, std=1.0)(x, y)


@pytest.mark.parametrize(("mean", "std"), [(123.0, 58.0), ([0.5, -0.1, 0.5], 0.5), (0.5, 2.0)])
def test_mean_and_std_of_levels_are_told(mean, std) -> None:
    std = std if isinstance(mean, float) else [std] * 3
    with pytest.raises(ValueError, match="divide those of 8-bit levels by 255"):
        JointSpaceAdv(mean=mean, std=std)


def test_rounding_outside_the_range_is_no_move() -> None:
    """The first pixel of a normalised batch is a little below black, and nobody looks at it."""
    pixels = torch.tensor([-5e-4, 0.5]).expand(2, 1, 1, 2)
    x = (pixels - 0.5) / 0.25

    def model(z):
        return F.pad(z[:, 0, 0, 1:], (0, 1))

    adv = JointSpaceAdv(model, eta=0, eps=0.1, random_start=False, mean=0.5, std=0.25)
    out, _ = adv(x, torch.tensor([1, 1]))
    assert torch.equal(out[..., 0], x[..., 0])
    assert (out[..., 1] != x[..., 1]).all()


def test_kl_needs_no_labels(net, digits) -> None:
    adv = JointSpaceAdv(net, eta=0, objective="kl")  # a warning would be an error
    adv({"image": digits[:4], "path": ["a", "b", "c", "d"]})


def test_an_attack_of_another_std_is_refused(net) -> None:
    attack = JointSpaceAdv(net, eta=0, mean=0.5, std=0.25)
    with pytest.raises(ValueError, match="different mean and std"):
        RobustMixup(net, num_classes=10, attack=attack, mean=0.5, std=0.5)


def test_a_random_class_is_approached_also_later() -> None:
    adv = JointSpaceAdv(eta=0)
    with pytest.raises(ValueError, match="make the attack with targeted=True"):
        adv.target = "random"
    JointSpaceAdv(eta=0, targeted=True).target = "random"


def test_a_name_where_the_functional_form_needs_a_flow(untouchable) -> None:
    with pytest.raises(TypeError, match=r"load one with ijsat_aug\.load_flow"):
        joint_space_adv(X, Y, untouchable, "digits", eps=0.1, eta=0.1)
    with pytest.raises(TypeError, match=r"load one with ijsat_aug\.load_flow"):
        joint_space_adv(X, Y, untouchable, "digits", eps=0.1, latent_start=torch.zeros(4, 64))


@pytest.mark.parametrize("row", [[0.3, 0.2], [0.8, 0.4]])
def test_rows_of_another_sum_are_no_probabilities(row) -> None:
    with pytest.raises(ValueError, match="rows >= 0 that sum to 1"):
        as_target(torch.tensor([row]), 1, values=True)
