"""The evaluation itself, on networks that learnt real digits."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from ijsat_aug import load_flow
from ijsat_aug.evaluation import Found, Threat, Victim, evaluate
from ijsat_aug.evaluation.draws import Draws
from ijsat_aug.evaluation.report import Entry, Result
from ijsat_aug.evaluation.run import Batches
from ijsat_aug.evaluation.store import Store, fingerprint
from ijsat_aug.evaluation.threats import GROUPS, joint, make_threat, select_threats
from ijsat_aug.flows import Decoder, Pyramid, Tiles
from ijsat_aug.functional import joint_space_adv
from tests.conftest import IdentityFlow

QUICK = ["linf=0.1@5", "om@3", "fog@3"]


def shorter(found) -> dict[str, str]:
    return {name: result.correct for name, result in found.results.items()}


def test_every_kind_of_threat_lowers_the_accuracy(net, digits, labels, flow) -> None:
    found = evaluate(
        net, digits, labels, flow=flow, threats=["linf=0.1@10", "om@10", "jsa=0.1@10", "stadv@10"],
        corruptions=["gaussian_noise"],
    )  # fmt: skip
    clean = found.accuracy("clean")
    with torch.no_grad():
        assert clean == pytest.approx(float((net(digits).argmax(1) == labels).float().mean()))
    for name in ("linf", "om", "jsa", "stadv"):
        assert found.accuracy(name) < clean - 0.02
        assert all(
            c <= o
            for c, o in zip(
                found.results[name].correct, found.results["clean"].correct, strict=True
            )
        )
    assert found.accuracy("jsa") < min(found.accuracy("linf"), found.accuracy("om"))
    assert found.union().value <= found.accuracy("jsa")
    noise = [found.accuracy(f"gaussian_noise/{s}") for s in (1, 2, 3, 4, 5)]
    assert noise[0] > noise[4]
    assert found.warnings == ()


def test_pgd_is_as_strong_as_that_of_torchattacks(net, digits, labels) -> None:
    found = evaluate(net, digits, labels, threats=["linf=0.1@20"], corruptions=[])
    theirs = torchattacks.PGD(net, eps=0.1, alpha=0.0125, steps=20)(digits, labels)
    with torch.no_grad():
        accuracy = float((net(theirs).argmax(1) == labels).float().mean())
    assert found.accuracy("linf") <= accuracy + 0.01  # it keeps the worst image
    assert found.accuracy("linf") > accuracy - 0.05


def test_batches_do_not_matter(net, digits, labels, flow) -> None:
    def run(size: int):
        return evaluate(
            net, digits[:60], labels[:60], flow=flow, threats=QUICK, batch_size=size,
            corruptions=["impulse_noise"],
        )  # fmt: skip

    assert shorter(run(60)) == shorter(run(7))


def test_the_seed_decides(net, digits, labels) -> None:
    options = {"threats": ["linf=0.15@1"], "corruptions": ["shot_noise"]}
    one, same, other = (
        shorter(evaluate(net, digits, labels, seed=seed, **options)) for seed in (0, np.int64(0), 1)
    )
    assert one == same
    assert one["linf"] != other["linf"]
    assert one["shot_noise/5"] != other["shot_noise/5"]
    assert one["clean"] == other["clean"]


def test_a_normalised_model_is_the_same(net, digits, labels, flow) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * 0.25 + 0.5)

    options = {"threats": QUICK, "corruptions": ["contrast"], "flow": flow}
    plain = evaluate(net, digits[:80], labels[:80], **options)
    other = evaluate(Normalised(), digits[:80], labels[:80], mean=0.5, std=0.25, **options)
    for name, result in plain.results.items():
        pairs = zip(result.correct, other.results[name].correct, strict=True)
        assert sum(a != b for a, b in pairs) <= 1, name


def test_the_model_and_the_random_state_stay_as_they_were(network, digits, labels, flow) -> None:
    network.train()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    random = torch.get_rng_state()
    evaluate(
        network, digits[:20], labels[:20], flow=flow, corruptions=["frost", "spatter"],
        threats=["linf@2", "om@2", "gabor@2", "autoattack=0.3"],
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training
    assert network[2].training
    assert not network[1].training
    assert not network[0].weight.requires_grad
    assert network[8].weight.requires_grad
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


class Tight(nn.Module):
    """A model for whom more than ``most`` images do not fit into memory."""

    def __init__(self, net: nn.Module, most: int) -> None:
        super().__init__()
        self.net, self.most = net, most
        self.seen = SimpleNamespace(sizes=[])  # attributes of its own are put back

    def forward(self, x: Tensor) -> Tensor:
        self.seen.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.net(x)


def test_batches_shrink_until_they_fit(net, digits, labels) -> None:
    options = {"threats": ["linf=0.1@3"], "corruptions": ["contrast"]}
    expected = evaluate(net, digits, labels, **options)
    tight = Tight(net, 20)
    assert shorter(evaluate(tight, digits, labels, batch_size=200, **options)) == shorter(expected)
    assert max(tight.seen.sizes[10:]) <= 20  # once too large is enough
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(Tight(net, 0), digits, labels, **options)


def test_memory_is_given_back_before_the_next_try(monkeypatch) -> None:
    """What an error holds cannot be freed."""
    held, emptied = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held[-1]() is None))

    def work(begin: int, end: int) -> None:
        activations = torch.zeros(end - begin)
        held.append(weakref.ref(activations))
        if end - begin > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    batches = Batches(8)
    batches.run(5, work)
    assert batches.size == 2
    assert emptied == [True]


class Stopped(nn.Module):
    """A model during whose evaluation somebody loses patience."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.asked = SimpleNamespace(calls=0, left=float("inf"))

    def forward(self, x: Tensor) -> Tensor:
        self.asked.calls += 1
        self.asked.left -= 1
        if self.asked.left < 0:
            raise KeyboardInterrupt
        return self.net(x)


def test_an_interrupted_evaluation_goes_on(net, digits, labels, tmp_path) -> None:
    options = {
        "threats": ["linf=0.1@5", "gabor@5", "fog@5"], "corruptions": ["contrast", "brightness"],
        "folder": tmp_path / "state",
    }  # fmt: skip
    x, y = digits[:50], labels[:50]
    model = Stopped(net)
    whole = evaluate(model, x, y, **{**options, "folder": None})
    all_calls, model.asked.calls = model.asked.calls, 0
    model.asked.left = all_calls - 14  # in the last attack
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, x, y, **options)
    kept = sorted(file.name for file in (tmp_path / "state").glob("result-*.json"))
    assert any("gabor" in name for name in kept)
    model.asked.left, model.asked.calls = float("inf"), 0
    again = evaluate(model, x, y, **options)
    assert shorter(again) == shorter(whole)
    assert model.asked.calls < all_calls - 10
    with pytest.raises(ValueError, match=r"results of another data.*--overwrite"):
        evaluate(model, x[:40], y[:40], **options)
    assert kept[0] in [file.name for file in (tmp_path / "state").iterdir()]
    with torch.no_grad():
        net[0].weight.mul_(1.01)
    with pytest.raises(ValueError, match="results of another model"):
        evaluate(model, x, y, **options)
    fewer = evaluate(model, x[:40], y[:40], overwrite=True, **options)
    assert len(fewer.results["fog"].correct) == 40


def test_an_evaluation_of_a_random_model_goes_on(net, digits, labels, tmp_path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(x) + 5 * torch.randn(10)

    options = {"threats": ["linf@1"], "corruptions": [], "folder": tmp_path / "state"}
    before = torch.get_rng_state()
    once = evaluate(Noisy(), digits[:20], labels[:20], **options)
    assert not torch.equal(torch.get_rng_state(), before)  # its noise is not always the same
    again = evaluate(Noisy(), digits[:20], labels[:20], **options)
    assert shorter(again) == shorter(once)


def test_a_default_device_does_not_matter(net, digits, labels) -> None:
    threats = ["linf@1", "jsa@1", *(f"{name}@1" for name in GROUPS["unseen"])]
    options = {"threats": threats, "corruptions": ["fog"], "flow": "digits"}
    once = evaluate(net, digits[:8], labels[:8], **options)
    with torch.device("meta"):  # where no tensor has values: nothing may be made there
        again = evaluate(net, digits[:8], labels[:8], **options)
    assert shorter(again) == shorter(once)


def test_another_flow_of_the_same_shape_is_another_evaluation(net, digits, labels, flow, tmp_path):
    options = {"threats": ["om@1"], "corruptions": [], "folder": tmp_path / "state"}
    evaluate(net, digits[:20], labels[:20], flow=flow, **options)
    evaluate(net, digits[:20], labels[:20], flow="digits", **options)  # the same one
    moved = dataclasses.replace(flow, mean=flow.mean + 0.01)
    with pytest.raises(ValueError, match="results of another flow"):
        evaluate(net, digits[:20], labels[:20], flow=moved, **options)


def test_images_for_which_a_flow_has_no_numbers_are_told(net, digits, labels) -> None:
    class Half(IdentityFlow):
        def decode(self, z: Tensor) -> Tensor:
            lost = z[:, 20:21] > 0.5  # of some images, wherever they move
            return super().decode(z.masked_fill(lost, torch.nan))

    x, y = digits[:40], labels[:40]
    found = evaluate(net, x, y, flow=Half(), threats=["om=0.1@3"], corruptions=[])
    (told,) = (text for text in found.warnings if "met no numbers" in text)
    assert int(told.split(": ")[1].split()[0]) > 5
    whole = evaluate(net, x, y, flow="digits", threats=["om@3", "jsa@3"], corruptions=[])
    assert not any("met no numbers" in text for text in whole.warnings)


def test_a_flow_is_known_by_the_modules_of_its_functions(net, digits, labels, tmp_path) -> None:
    class Auto(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def decode(self, z: Tensor) -> Tensor:
            return self.scale * z.unflatten(1, (1, 8, 8))

    options = {"threats": ["om=0.1@1"], "corruptions": [], "folder": tmp_path / "state"}
    auto = Auto()
    flow = Decoder(auto.decode, (1, 8, 8), (64,), encode=lambda x: x.flatten(1) / auto.scale)
    evaluate(net, digits[:8], labels[:8], flow=flow, **options)
    evaluate(net, digits[:8], labels[:8], flow=flow, **options)
    with torch.no_grad():
        auto.scale.mul_(2)
    with pytest.raises(ValueError, match="results of another flow"):
        evaluate(net, digits[:8], labels[:8], flow=flow, **options)


def test_the_flow_of_a_threat_counts(net, digits, labels, flow, tmp_path) -> None:
    other = dataclasses.replace(flow, mean=flow.mean + 0.01)
    x, y = digits[:8], labels[:8]
    reports = []
    for number, one in enumerate((flow, other)):
        options = {"threats": [make_threat("om=0.1@1", one, (1, 8, 8))], "corruptions": []}
        reports.append(evaluate(net, x, y, folder=tmp_path / str(number), **options))
    with pytest.raises(ValueError, match="results of another flow"):
        evaluate(net, x, y, folder=tmp_path / "0", **options)
    assert reports[0].settings["flow"] != reports[1].settings["flow"]
    named = evaluate(net, x, y, flow=flow, threats=["om=0.1@1"], corruptions=[])
    assert named.settings["flow"] == reports[0].settings["flow"]


def test_another_function_is_another_model(net, digits, labels, tmp_path) -> None:
    """Two functions, and two modules that differ in code alone, have the same weights."""

    class Turned(nn.Module):
        def __init__(self, sign: int) -> None:
            super().__init__()
            self.net, self.sign = net, sign

        def forward(self, x: Tensor) -> Tensor:
            return self.sign * self.net(x)

    def of(sign: int):
        return lambda x: sign * net(x)

    for number, kind in enumerate((of, Turned)):
        options = {"threats": [], "corruptions": [], "folder": tmp_path / str(number)}
        evaluate(kind(1), digits[:20], labels[:20], **options)
        evaluate(kind(1), digits[:20], labels[:20], **options)
        with pytest.raises(ValueError, match="results of another model"):
            evaluate(kind(-1), digits[:20], labels[:20], **options)


def test_a_layer_with_another_gradient_is_another_model(net, digits, labels, tmp_path) -> None:
    """As where somebody looks whether a gradient was masked: answers and weights are the same."""

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 16).round() / 16

    class StraightThrough(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + ((x * 16).round() / 16 - x).detach()

    options = {"threats": [], "corruptions": [], "folder": tmp_path}
    evaluate(nn.Sequential(Rounded(), net), digits[:20], labels[:20], **options)
    with pytest.raises(ValueError, match="results of another model"):
        evaluate(nn.Sequential(StraightThrough(), net), digits[:20], labels[:20], **options)


def test_classes_that_are_not_the_models_are_refused(net, digits, labels) -> None:
    with pytest.raises(ValueError, match="there are 3 classes of images, and the model tells 10"):
        evaluate(net, digits[:9], labels[:9] % 3, classes=("a", "b", "c"), threats=[])


def test_corruptions_of_two_channels_are_refused_before_the_work(labels) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 10))
    with pytest.raises(ValueError, match=r"1 or 3 channels, these have 2: .*corruptions=\(\)"):
        evaluate(model, torch.rand(9, 2, 8, 8), labels[:9], threats=["linf@2"])


def test_an_own_manifold_goes_on_and_another_way_to_a_size_does_not(net, flow, tmp_path) -> None:
    class Halved:
        def __init__(self, factor: float) -> None:
            self.flow, self.factor = flow, factor
            self.shape, self.latent_dim = flow.shape, flow.latent_dim

        def encode(self, x: Tensor) -> Tensor:
            return flow.encode(x) / self.factor

        def decode(self, z: Tensor) -> Tensor:
            return flow.decode(z * self.factor)

    large = nn.Sequential(nn.AdaptiveAvgPool2d(8), net)
    x, y = torch.rand(6, 1, 12, 12), torch.arange(6)
    options = {"threats": ["om=0.1@1"], "corruptions": []}
    for ours, again, other, model, images in (
        (Halved(2), Halved(2), Halved(3), net, x[:, :, :8, :8]),
        (Pyramid(flow, (12, 12)), Pyramid(flow, (12, 12)), Tiles(flow, (12, 12)), large, x),
    ):
        folder = tmp_path / type(ours).__name__
        evaluate(model, images, y, flow=ours, folder=folder, **options)
        evaluate(model, images, y, flow=again, folder=folder, **options)
        with pytest.raises(ValueError, match="results of another flow"):
            evaluate(model, images, y, flow=other, folder=folder, **options)


def test_corruptions_of_other_files_are_others(tmp_path) -> None:
    torch.manual_seed(0)
    x, y = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8), torch.arange(20) % 10
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    official = tmp_path / "official"
    official.mkdir()
    dark = np.zeros((100, 8, 8, 3), np.uint8)
    np.save(official / "contrast.npy", dark)
    np.save(official / "labels.npy", np.tile(y.numpy(), 5))
    options = {"threats": [], "corruptions": ["contrast"], "folder": tmp_path / "state"}
    made = shorter(evaluate(net, x, y, **options))
    read = shorter(evaluate(net, x, y, corruption_files=official, **options))
    alone = {**options, "folder": None}
    assert read == shorter(evaluate(net, x, y, corruption_files=official, **alone)) != made
    assert made == shorter(evaluate(net, x, y, **options))
    np.save(official / "labels.npy", np.tile(y.numpy() + 1, 5))
    asked = []
    net.register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(ValueError, match="are not those of"):
        evaluate(net, x, y, corruption_files=official, **{**alone, "threats": ["linf@2"]})
    assert len(asked) == 1  # before anything is attacked


def test_what_is_asked_for_by_name_takes_the_place_of_a_groups(flow) -> None:
    found = select_threats(["quick", "l2=0.3@7", "jsa=2/255:0.5"], flow, (1, 8, 8))
    told = [(threat.name, threat.budget, threat.steps) for threat in found]
    assert told[0] == ("linf", "8/255", 50)
    assert told[1] == ("l2", "0.3", 7)
    assert told[3] == ("jsa", "2/255, η 0.5", 50)


class Plane:
    """A manifold without calibration, that needs the labels of a batch."""

    shape, latent_dim = (1, 8, 8), 64

    def __init__(self, labels: Tensor | None = None) -> None:
        self.labels = labels

    def encode(self, x: Tensor) -> Tensor:
        return x.flatten(1) - self.labels[:, None]

    def decode(self, z: Tensor) -> Tensor:
        return (z + self.labels[:, None]).unflatten(1, self.shape)

    needs_labels = True

    def of_labels(self, labels: Tensor) -> Plane:
        return Plane(labels)


def test_a_conditional_manifold_gets_the_labels_of_what_is_attacked(net, digits, labels) -> None:
    found = evaluate(
        net, digits, labels, flow=Plane(), threats=["om=0.1@3", "linf=0.1@3"], corruptions=[]
    )
    assert found.accuracy("om") < found.accuracy("clean") - 0.02


def test_a_threat_of_your_own(net, digits, labels) -> None:
    def darker(victim, x, y, draws) -> Found:
        return Found(x * 0.2)

    own = Threat("dark", "Darkness", "unseen", "80 %", 1, "here", darker)
    found = evaluate(net, digits, labels, threats=[own, "linf=0.05@2"], corruptions=[])
    with torch.no_grad():
        right = (net(digits).argmax(1) == labels) & (net(digits * 0.2).argmax(1) == labels)
    assert found.accuracy("dark") == pytest.approx(float(right.float().mean()))


def test_a_threat_of_your_own_is_known_by_its_reference(net, digits, labels, tmp_path) -> None:
    def scaled(factor: float) -> Threat:
        def attack(victim, x, y, draws) -> Found:
            return Found(x * factor)

        return Threat("dark", "Darkness", "unseen", "", 1, f"times {factor}", attack)

    def accuracy(factor: float) -> float:
        options = {"threats": [scaled(factor)], "corruptions": [], "folder": tmp_path}
        return evaluate(net, digits, labels, **options).accuracy("dark")

    assert accuracy(1.0) > accuracy(0.0)


def test_pictures_are_of_what_was_right_before(net, digits, labels) -> None:
    wrong = labels.clone()
    wrong[labels == 0] = 9  # some images of class 9 are not right
    found = evaluate(net, digits, wrong, threats=["linf=0.2@5"], corruptions=["contrast"])
    linf, clean = found.results["linf"], found.results["clean"]
    assert found.truth == (1, 2, 3, 4, 5, 6)
    assert clean.seen == found.truth
    assert len(linf.pictures) == len(linf.seen) == 6
    assert all(a != b for a, b in zip(clean.pictures, linf.pictures, strict=True))
    assert len(found.results["contrast/3"].pictures) == 6
    assert found.results["contrast/4"].pictures == ()


def test_pictures_of_a_model_that_is_always_wrong(net, digits, labels) -> None:
    found = evaluate(net, digits[:9], (labels[:9] + 1) % 10, threats=["linf"], corruptions=[])
    linf, clean = found.results["linf"], found.results["clean"]
    assert linf.pictures == clean.pictures
    assert linf.seen == clean.seen != found.truth


def test_the_attack_is_ours(net, digits, labels, flow) -> None:
    """What the report says of the joint attack is what ``joint_space_adv`` does."""
    found = evaluate(net, digits, labels, flow=flow, threats=["jsa=0.1@5"], corruptions=[])
    moved = joint_space_adv(digits, labels, net, flow, eps=0.1, eta=0.0464, steps=5, best=True)
    with torch.no_grad():
        accuracy = float((net(moved).argmax(1) == labels).float().mean())
    assert found.accuracy("jsa") == pytest.approx(accuracy, abs=0.04)


def own(name: str, reference: str) -> Threat:
    """A threat that does nothing."""
    return Threat(name, "Own", "unseen", "", 1, reference, lambda victim, x, y, draws: Found(x))


def test_bad_input(net, digits, labels, flow) -> None:
    x, y = digits[:5], labels[:5]
    cases = [
        ({"threats": ["nothing"]}, "no threat 'nothing'"),
        ({"threats": ["jsa"]}, "give a flow"),
        ({"threats": ["linf=0.1@2", "linf=0.2@2"]}, "have one name"),
        ({"threats": ["quick"], "flow": Plane()}, r"om=0\.1 and jsa=8/255:0\.1"),
        ({"threats": ["linf", "om"], "flow": load_flow("cifar10-fast")}, "takes images of 3 chan"),
        ({"threats": ["linf=a"]}, "is no budget"),
        ({"threats": ["linf@0"]}, "steps after '@'"),
        ({"threats": ["autoattack@5"]}, "fixed numbers"),
        ({"corruptions": ["rain"]}, "no corruption 'rain'"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size must be an integer >= 1"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"threats": [own("clean", "a")]}, "give yours another name"),
        ({"threats": [own("own", "a"), own("own", "b")]}, "have one name"),
        ({"mean": [0.5, 0.5], "std": [1, 1]}, "2 values"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate(net, x, y, **{"threats": [], "corruptions": [], **options})
    with pytest.raises(ValueError, match="pixels in"):
        evaluate(net, x * 2 - 1, y)
    with pytest.raises(ValueError, match="NaN"):
        evaluate(net, torch.where(x == x[0, 0, 4, 4], float("nan"), x), y)
    with pytest.raises(ValueError, match="5 images and labels"):
        evaluate(net, x, y[:4])
    with pytest.raises(ValueError, match="knows the classes"):
        evaluate(net, x, y + 90)
    with pytest.raises(ValueError, match="must be classes"):
        evaluate(net, x, torch.full((5, 10), 0.1))
    with pytest.raises(ValueError, match="no images"):
        evaluate(net, x[:0], y[:0])
    with pytest.raises(TypeError, match="must be a list"):
        evaluate(net, x, y, threats="linf")


def test_functions_are_known_by_the_modules_behind_them(net, digits, labels, tmp_path) -> None:
    """Also where they answer alike to the first image."""
    x, y = digits[:20], labels[:20]
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[-1].bias += 1e-4
    options = {"threats": [], "corruptions": [], "folder": tmp_path}
    evaluate(lambda images: net(images), x, y, **options)
    evaluate(lambda images: net(images), x, y, **options)
    with pytest.raises(ValueError, match="results of another model"):
        evaluate(lambda images: other(images), x, y, **options)


def test_overwriting_begins_anew(net, digits, labels, tmp_path) -> None:
    asked = []

    def attack(victim, x, y, draws) -> Found:
        asked.append(len(x))
        return Found(x)

    threat = Threat("own", "Own", "unseen", "", 1, "here", attack)
    options = {"threats": [threat], "corruptions": [], "folder": tmp_path}
    for overwrite in (False, False, True):
        evaluate(net, digits[:20], labels[:20], overwrite=overwrite, **options)
    assert len(asked) == 2
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"no settings\.json that tells of what"):
        evaluate(net, digits[:20], labels[:20], **options)
    ours = tmp_path / "result-of-mine.json"
    ours.write_text("{}")
    evaluate(net, digits[:20], labels[:20], overwrite=True, **options)
    assert len(asked) == 3
    assert ours.exists()


def test_a_damaged_folder(net, digits, labels, tmp_path) -> None:
    options = {"threats": ["linf@1"], "corruptions": [], "folder": tmp_path}
    report = evaluate(net, digits[:20], labels[:20], **options)
    (kept,) = tmp_path.glob("result-linf-*.json")
    for damaged in (kept.read_text()[:50], "{}", "[]"):
        kept.write_text(damaged)
        again = evaluate(net, digits[:20], labels[:20], **options)  # as if it were missing
        assert again.results["linf"].correct == report.results["linf"].correct
    for damaged in ("{", "[]"):
        (tmp_path / "settings.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"settings\.json is damaged.*--overwrite"):
            evaluate(net, digits[:20], labels[:20], **options)
    evaluate(net, digits[:20], labels[:20], overwrite=True, **options)
    evaluate(net, digits[:20], labels[:20], **options)
    with pytest.raises(NotADirectoryError, match="is a file"):
        evaluate(net, digits[:20], labels[:20], **{**options, "folder": kept})


def test_budgets_that_differ_look_different(flow) -> None:
    for one, other in (("l2=1.001", "l2=1.0049"), ("om=0.1005", "om=0.1014")):
        assert (
            make_threat(one, flow, (1, 8, 8)).budget != make_threat(other, flow, (1, 8, 8)).budget
        )
    assert make_threat("om", flow, (1, 8, 8)).budget == "η 0.0464"


@pytest.mark.parametrize("name", ["linf=8", "autoattack=8", "jsa=8:0.1"])
def test_a_budget_beyond_the_pixels_is_refused_at_once(name, flow) -> None:
    with pytest.raises(ValueError, match=r"wider than the whole range .* did you mean 8/255"):
        make_threat(name, flow, (1, 8, 8))


def test_large_images_have_the_budgets_of_large_images() -> None:
    """Those that UAR calibrated for ImageNet-100."""
    found = {name: make_threat(name, shape=(3, 224, 224)).budget for name in GROUPS["unseen"]}
    assert (found["elastic"], found["jpeg_linf"], found["jpeg_l1"]) == ("4", "0.5", "16384")
    small = {name: make_threat(name).budget for name in GROUPS["unseen"]}
    assert (small["elastic"], small["jpeg_linf"], small["jpeg_l1"]) == ("1", "0.25", "256")
    assert all(found[name] == small[name] for name in ("stadv", "recolor", "fog", "snow", "gabor"))


def test_latents_start_anywhere_in_the_ball(digits, flow) -> None:
    seen = []

    class Heard:
        """The flow, which tells what it decodes."""

        shape, latent_dim = flow.shape, flow.latent_dim

        def encode(self, x: Tensor) -> Tensor:
            return flow.encode(x)

        def decode(self, z: Tensor) -> Tensor:
            seen.append(z.detach())
            return flow.decode(z)

    x, y = digits[:8], torch.arange(8)
    victim = Victim(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with victim.frozen():
        joint(Heard(), "linf", 0.0, 0.1, 1)(victim, x, y, Draws(0, "om", range(8)))
    away = max((z - flow.encode(x) for z in seen[:2]), key=lambda d: d.abs().max())
    assert abs(away.mean()) < 0.02
    assert away.min() < -0.09


def test_parts_count_over_all_batches(net, digits, labels) -> None:
    def attack(victim, x, y, draws) -> Found:
        return Found(x, {"part": torch.ones_like(y, dtype=torch.bool)})

    own = Threat("own", "Own", "unseen", "", 1, "here", attack)
    found = evaluate(net, digits[:20], labels[:20], threats=[own], corruptions=[], batch_size=7)
    assert found.results["own"].notes["part"] == found.results["clean"].correct.count("1")


def test_the_next_batch_is_half_of_the_one_that_did_not_fit() -> None:
    tries = []

    def work(begin: int, end: int) -> None:
        tries.append(end - begin)
        if end - begin > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    Batches(64).run(5, work)
    assert tries == [5, 2, 2, 1]


def test_threats_have_draws_of_their_own(net, digits, labels) -> None:
    drawn = []

    def own(name: str) -> Threat:
        def attack(victim, x, y, draws) -> Found:
            drawn.append(draws.uniform((len(x), 4)))
            return Found(x)

        return Threat(name, name, "unseen", "", 1, "here", attack)

    evaluate(net, digits[:9], labels[:9], threats=[own("one"), own("two")], corruptions=[])
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("change", [{"mean": 0.4, "std": 0.25}, {"mean": 0.5, "std": 0.3}])
def test_another_normalisation_is_another_evaluation(change, tmp_path) -> None:
    def model(x: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.0]).expand(len(x), 2)

    options = {"threats": [], "corruptions": [], "folder": tmp_path}
    x, y = torch.rand(4, 1, 4, 4), torch.ones(4).long()
    evaluate(model, x, y, mean=0.5, std=0.25, **options)
    with pytest.raises(ValueError, match=r"results of another (mean|std)"):
        evaluate(model, x, y, **change, **options)


def test_answers_of_another_machine_are_those_of_the_same_model(tmp_path) -> None:
    Store(tmp_path, {"seed": 0, "logits": [1.0, -2.0]})
    Store(tmp_path, {"seed": 0, "logits": [1.001, -2.001]})
    with pytest.raises(ValueError, match="results of another model"):
        Store(tmp_path, {"seed": 0, "logits": [1.1, -2.0]})


def test_another_shape_or_precision_is_another_thing() -> None:
    x = torch.zeros(2, 6)
    assert len({fingerprint(x), fingerprint(x.reshape(3, 4)), fingerprint(x.int())}) == 3


def test_other_steps_are_another_result(tmp_path) -> None:
    store = Store(tmp_path, {})
    entry = Entry("own", "Own", "unseen", "1", 5, "here")
    store.put(Result.of(entry, "10"))
    assert store.get(entry) is not None
    assert store.get(Entry("own", "Own", "unseen", "1", 6, "here")) is None


class Levels(nn.Module):
    """A network that answers images of whole levels alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        whole = ((16 * x).round() == 16 * x).flatten(1).all(1, keepdim=True)
        return self.net(x).where(whole, torch.nan)


def test_an_image_without_an_answer_is_no_success(net, digits, labels) -> None:
    found = evaluate(Levels(net), digits[:20], labels[:20], threats=["fog=0.5@2"], corruptions=[])
    assert found.accuracy("fog") == found.accuracy("clean") > 0.5


class Holding:
    def __init__(self, held: object) -> None:
        self.held = held


def test_what_a_manifold_holds_in_lists_dicts_and_arrays_tells_it_apart() -> None:
    """Though a large tensor's words, with an ellipsis, are those of another."""
    matrix, other = torch.zeros(64, 64), torch.zeros(64, 64)
    other[30, 30] = 1
    for hold in (lambda m: [m], lambda m: {"m": m}, lambda m: m.numpy(), lambda m: ([m], 0)):
        one, same, two = (Holding(hold(m)) for m in (matrix, matrix.clone(), other))
        assert fingerprint(one) == fingerprint(same) != fingerprint(two)


@pytest.mark.parametrize("as_module", [False, True])
def test_other_weights_that_are_hidden_are_another_model(as_module, tmp_path) -> None:
    """Though the first image, a black one, gets the same answer."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    trainer = SimpleNamespace(task=SimpleNamespace(net=net))
    model = nn.Flatten() if as_module else SimpleNamespace()
    model.forward = lambda x: trainer.task.net(x)
    x, y = torch.rand(4, 1, 4, 4), torch.ones(4).long()
    x[0] = 0
    options = {"threats": [], "corruptions": [], "folder": tmp_path}
    evaluate(model if as_module else model.forward, x, y, **options)
    nn.init.zeros_(net[1].weight)
    with pytest.raises(ValueError, match="results of another model"):
        evaluate(model if as_module else model.forward, x, y, **options)


def mine(attack=lambda victim, x, y, draws: Found(x), **changes) -> Threat:
    values = {"kind": "unseen", "budget": "1", **changes}
    return Threat("mine", "Mine", values["kind"], values["budget"], 1, "here", attack)


def test_a_threat_of_a_kind_that_no_table_has_is_refused() -> None:
    with pytest.raises(ValueError, match="kind of the threat 'mine' is one of lp, manifold"):
        mine(kind="linf")
    with pytest.raises(TypeError, match="budget of the threat 'mine' is text"):
        mine(budget=0.5)


def test_two_attacks_of_one_name_are_told(net, flow) -> None:
    one, other = mine(), mine(attack=lambda victim, x, y, draws: Found(1 - x))
    assert one == other  # by what a report knows of them
    for names in ([one, other], ["linf@2", dataclasses.replace(make_threat("linf@2"))]):
        if names[0] is not one:
            names[1] = dataclasses.replace(names[1], attack=one.attack)
        with pytest.raises(ValueError, match="have one name"):
            select_threats(names)
    assert select_threats([one, one]) == [one]
    assert len(select_threats(["linf@2", "linf@2"])) == 1


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda x: x, TypeError, r"must return Found\(images\) .* got Tensor"),
        (lambda x: Found(x[:1]), TypeError, r"got \(1, 1, 8, 8\)"),
        (lambda x: Found(x + torch.nan), ValueError, r"not in \[0, 1\], or NaN"),
        (lambda x: Found(x + 0.1), ValueError, r"not in \[0, 1\], or NaN"),
    ],
)
def test_what_an_own_attack_returns_is_looked_at(returned, error, message, net, digits, labels):
    threat = mine(attack=lambda victim, x, y, draws: returned(x))
    with pytest.raises(error, match=message):
        evaluate(net, digits[:20], labels[:20], threats=[threat], corruptions=[])


def test_doubts_look_at_images_of_all_classes(net, digits, labels) -> None:
    """Data may be sorted: with the first ones all wrong, gradients are doubted all the same."""
    y = labels[:260].clone()
    y[:130] = (y[:130] + 1) % 10
    found = evaluate(Levels16(net), digits[:260], y, threats=["linf@2"], corruptions=[])
    assert any("have no gradient at all" in warning for warning in found.warnings)
    wrong = evaluate(net, digits[:20], (net(digits[:20]).argmax(1) + 1) % 10, threats=["linf@2"],
                     corruptions=[])  # fmt: skip
    assert any("None of the 20 images that were looked at is right" in w for w in wrong.warnings)


class Levels16(nn.Module):
    """A network that sees whole levels alone, and has no gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((16 * x).round() / 16)


def test_files_whose_images_changed_are_others(net, digits, labels, tmp_path) -> None:
    options = {"threats": [], "corruptions": ["fog"], "corruption_files": tmp_path / "c"}
    options["folder"] = tmp_path / "out"
    before = evaluate(net, digits[:20], labels[:20], **options)
    path = tmp_path / "c" / "fog.npy"
    images = np.load(path)
    images[:, 1:] = 255 - images[:, 1:]
    np.save(path, images)
    after = evaluate(net, digits[:20], labels[:20], **options)
    assert after.accuracy("fog/3") < before.accuracy("fog/3")


def test_images_of_many_channels_are_drawn_in_part(tmp_path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(5 * 64, 3)).eval()
    found = evaluate(model, torch.rand(6, 5, 8, 8), torch.arange(6) % 3, threats=["linf@2"],
                     corruptions=())  # fmt: skip
    assert found.results["linf"].pictures


@pytest.mark.parametrize("place", [0, 3])
def test_one_image_without_an_answer_stops_no_evaluation(place: int, net, digits, labels) -> None:
    lost = digits[place].clone()

    def model(x: Tensor) -> Tensor:
        return net(x).masked_fill((x == lost).flatten(1).all(1)[:, None], torch.nan)

    found = evaluate(model, digits[:20], labels[:20], threats=[], corruptions=[])
    assert found.results["clean"].correct[place] == "0"
    assert found.accuracy("clean") > 0.8


def test_masked_classes_are_no_sign_of_chance(net, digits, labels, tmp_path) -> None:
    keep = labels < 7
    x, y = digits[keep][:40], labels[keep][:40]

    def model(images: Tensor) -> Tensor:
        logits = net(images)
        return torch.cat([logits[:, :7], torch.full_like(logits[:, 7:], -torch.inf)], 1)

    options = {"threats": [], "corruptions": [], "folder": tmp_path}
    for _ in range(2):  # and goes on with its results
        found = evaluate(model, x, y, **options)
        assert not any("random" in w or "batch" in w for w in found.warnings)


def test_images_that_are_shown_go_through_the_model_in_batches_too(net, digits, labels) -> None:
    sizes = []

    def model(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return net(x)

    evaluate(model, digits[:20], labels[:20], threats=["linf@1"], corruptions=[], batch_size=1)
    assert max(sizes) == 1


def test_a_radius_wider_than_all_pixels_is_a_slip() -> None:
    for name in ("l2=128", "autoattack_l2=128"):
        with pytest.raises(ValueError, match="did you mean 128/255"):
            make_threat(name)


@pytest.mark.parametrize("size", [(4, 4), (12, 12), (24, 24), (32, 36), (14, 14)])
def test_sizes_on_which_square_fails_in_l2_are_told_before_the_work(size) -> None:
    with pytest.raises(ValueError, match=r"autoattack_l2 takes no images of"):
        make_threat("autoattack_l2", shape=(3, *size))


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (64, 64), (224, 224)])
def test_usual_sizes_are_fine_for_autoattack_in_l2(size) -> None:
    assert make_threat("autoattack_l2", shape=(3, *size)).name == "autoattack_l2"


def test_one_output_is_no_classifier(digits, labels) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).eval()
    with pytest.raises(ValueError, match="the model has one output, and accuracy wants one"):
        evaluate(model, digits[:4], labels[:4] % 2, threats=[], corruptions=[])


def test_an_image_keeps_its_draws_whatever_was_wrong_before_it(net, digits, labels) -> None:
    drawn = {}

    def attack(victim, x, y, draws) -> Found:
        for image, draw in zip(x, draws.uniform((len(x), 4)), strict=True):
            drawn.setdefault(image.sum().item(), []).append(draw)
        return Found(x)

    own = Threat("own", "own", "unseen", "", 1, "here", attack)
    x = digits[:9]
    y = net(x).argmax(1)
    other = y.clone()
    other[0] = (y[0] + 1) % 10
    for truth in (y, other):
        evaluate(net, x, truth, threats=[own], corruptions=[])
    pairs = [draws for draws in drawn.values() if len(draws) == 2]
    assert len(pairs) == 8
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_budget_of_nothing_is_a_budget(flow) -> None:
    shape = (1, 8, 8)
    assert make_threat("jsa=0:0.1", flow, shape).budget == "0/255, η 0.1"
    assert make_threat("linf=0").budget == "0/255"
    assert make_threat("l2=0").budget == "0"
    assert make_threat("stadv=0").budget == "0"


def test_an_evaluation_is_without_autocast(net, digits, labels) -> None:
    seen = []

    def model(x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return net(x)

    with torch.autocast("cpu", torch.bfloat16):
        evaluate(model, digits[:8], labels[:8], threats=["linf@2"], corruptions=["contrast"])
        assert torch.is_autocast_enabled("cpu")
    assert seen
    assert not any(seen)


def test_other_tiles_are_another_evaluation(net, digits, labels, flow, tmp_path) -> None:
    x = nn.functional.interpolate(digits[:4], (12, 9))

    def model(x):
        return net(nn.functional.interpolate(x, (8, 8)))

    options = {"threats": ["om=0.1@1"], "corruptions": [], "folder": tmp_path}
    evaluate(model, x, labels[:4], flow=Tiles(flow, (12, 9), 2), **options)
    evaluate(model, x, labels[:4], flow=Tiles(flow, (12, 9), 2), **options)
    with pytest.raises(ValueError, match="results of another flow"):
        evaluate(model, x, labels[:4], flow=Tiles(flow, (12, 9), 5), **options)
