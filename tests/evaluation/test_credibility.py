"""Each warning comes for a model that deserves it, and none for one that does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ijsat_aug.evaluation import Victim, credibility, doubts, evaluate
from ijsat_aug.evaluation.credibility import black_box_wins


def look(model: nn.Module, digits: Tensor, labels: Tensor) -> str:
    return " | ".join(doubts(Victim(model), digits[:128], labels[:128]))


def test_an_ordinary_network_deserves_none(net, digits, labels) -> None:
    assert look(net, digits, labels) == ""


def test_train_mode(network, digits, labels) -> None:
    assert "came in train mode" in look(network.train(), digits, labels)
    assert network.training
    assert "came in train mode" in look(lambda x: network(x), digits, labels)
    network.eval()
    assert look(nn.Sequential(nn.Identity(), network), digits, labels) == ""  # the container's flag
    network[1].train()
    assert "came in train mode" in look(network, digits, labels)


def test_statistics_that_wait_for_other_processes_are_not_asked_of_the_batch(
    net, digits, labels, tmp_path
) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert look(model, digits, labels) == ""
    finally:
        torch.distributed.destroy_process_group()


def test_one_image_that_is_left_is_chance() -> None:
    """Of eight more than a share of one in ten classes."""

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1, keepdim=True)
            return torch.cat([0 * mean, mean - 0.499, mean.expand(-1, 8) - 2], 1)

    x, y = torch.full((8, 1, 4, 4), 0.6), torch.ones(8, dtype=torch.long)
    x[0] = 1.0  # no half of the range is enough for this one
    assert "half of the whole pixel range" not in look(Mean(), x, y)
    x[1] = 1.0
    assert "half of the whole pixel range" in look(Mean(), x, y)


def test_probabilities(net, digits, labels) -> None:
    assert "returns probabilities" in look(nn.Sequential(net, nn.Softmax(1)).eval(), digits, labels)
    assert "returns probabilities" in look(nn.Sequential(net, nn.Sigmoid()).eval(), digits, labels)
    assert look(nn.Sequential(net, nn.LogSoftmax(1)).eval(), digits, labels) == ""


class Noisy(nn.Module):
    """A defence that adds noise to every image."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.2 * torch.randn_like(x))


def test_a_random_model(net, digits, labels) -> None:
    found = look(Noisy(net), digits, labels)
    assert "The model is random" in found
    assert "depends on the other images" not in found  # alone it differs from itself too


def test_a_prediction_that_depends_on_its_batch(net, digits, labels) -> None:
    norm = nn.BatchNorm2d(16, track_running_stats=False)
    model = nn.Sequential(net[0], norm, *net[2:]).eval()
    assert "depends on the other images" in look(model, digits, labels)


class Rounded(nn.Module):
    """A defence that rounds images, through which no gradient goes."""

    def __init__(self, net: nn.Module, levels: int = 4) -> None:
        super().__init__()
        self.net, self.levels = net, levels

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * self.levels).round() / self.levels)


class Detached(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.detach()) + 0 * x.sum()


@pytest.mark.parametrize("defence", [Rounded, Detached])
def test_no_gradient(defence, net, digits, labels) -> None:
    found = look(defence(net), digits, labels)
    assert "100% of the images have no gradient" in found
    assert "half of the whole pixel range" in found


@pytest.mark.parametrize("way", ["no_grad", "unused"])
def test_a_model_without_any_way_to_its_images(way, net, digits, labels) -> None:
    one = torch.ones(1, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = net(x)
        return logits if way == "no_grad" else logits * one

    assert "100% of the images have no gradient" in look(model, digits, labels)
    y = labels[:20]
    report = evaluate(model, digits[:20], y, threats=(), corruptions=("contrast",))
    assert report.warnings == ()  # nothing followed a gradient
    assert report.accuracy("clean") > 0.9


class Sharp(nn.Module):
    """A network whose logits are so large that cross-entropy is flat where it is right."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.net(x)


def test_a_saturated_model(net, digits, labels) -> None:
    assert "have no gradient" in look(Sharp(net), digits, labels)


class Walled(nn.Module):
    """A dip in the loss close to every image, which one long step crosses and short ones do not."""

    def forward(self, x: Tensor) -> Tensor:
        far = x.flatten(1).mean(1) - 0.5  # a grey level of 0.5 is right, much brighter is wrong
        uphill = torch.where(far < 0.005, 100 * far, 1.0 - 100 * far)
        score = torch.where(far < 0.02, uphill - 5, 400 * (far - 0.02) + 1)
        return torch.stack([-score, score], 1)


def test_fewer_steps_that_are_stronger() -> None:
    x = torch.full((32, 1, 8, 8), 0.5)
    warnings = doubts(Victim(Walled().eval()), x, torch.zeros(32, dtype=torch.long))
    assert any("PGD is stronger with 1 step (" in warning for warning in warnings)


class Spiky(nn.Module):
    """Wrong at most corners of the ball, with a gradient that leads to one where it is right."""

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.clean = clean

    def forward(self, x: Tensor) -> Tensor:
        away = (x - self.clean[: len(x)]).flatten(1)
        at_corner = away.abs().mean(1) > 0.95 * 8 / 255
        mixed = (away[:, ::2].sign() != away[:, 1::2].sign()).float().mean(1) > 0.25
        score = torch.where(at_corner & mixed, 5.0, -5.0) + 0.1 * away.mean(1)
        return torch.stack([-score, score], 1)


def test_noise_that_is_stronger_than_gradients(digits) -> None:
    x = 0.25 + digits[:24] / 2
    warnings = doubts(Victim(Spiky(x).eval()), x, torch.zeros(24, dtype=torch.long))
    assert any("Noise of the same size fools 100%" in warning for warning in warnings)


class Level(nn.Module):
    """Whether an image is brighter than half, told by a BatchNorm or not."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        level = self.norm(x.flatten(1).mean(1, keepdim=True) - 0.5)
        return torch.cat([-level, level], 1)


def test_robustness_that_depends_on_batch_statistics() -> None:
    """An attack moves all images alike, and the statistics of the batch take that back."""
    y = (torch.arange(40) % 10 == 0).long()
    x = torch.where(y.bool(), 0.59, 0.49)[:, None, None, None].expand(40, 1, 4, 4).clone()
    model = Level(nn.BatchNorm1d(1, affine=False)).eval()
    found = " ".join(doubts(Victim(model), x, y))
    assert "10% are right with BatchNorm's running statistics and 100% with those of" in found
    assert int(model.norm.num_batches_tracked) == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(1))
    assert not model.norm.training


def test_square_beats_gradients(net, digits, labels) -> None:
    assert black_box_wins({"APGD-CE": 60, "APGD-T": 50, "FAB-T": 50, "Square": 50}, 100) is None
    assert black_box_wins({"APGD-CE": 60}, 100) is None
    found = evaluate(
        Rounded(net, 16), digits[:12], labels[:12], threats=["autoattack=0.3"], corruptions=[]
    )
    notes = found.results["autoattack"].notes
    assert notes["Square"] < notes["FAB-T"]
    assert any("an attack without gradients" in warning for warning in found.warnings)


class Lost(torch.autograd.Function):
    """The same images, whose gradient is no number where they are brighter than half."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient.masked_fill((x.mean((1, 2, 3)) > 0.5)[:, None, None, None], torch.nan)


class Bright(nn.Module):
    """Whether an image is brighter than half."""

    def forward(self, x: Tensor) -> Tensor:
        above = Lost.apply(x).mean((1, 2, 3)) - 0.5
        return torch.stack([-above, above], 1)


def test_what_fooled_counts_though_its_gradient_is_no_number() -> None:
    x, y = torch.full((8, 1, 4, 4), 0.45), torch.zeros(8, dtype=torch.long)
    found = evaluate(Bright(), x, y, threats=["linf=0.1@10", "fog=0.5@10"], corruptions=[])
    assert found.accuracy("clean") == 1
    assert found.accuracy("linf") == found.accuracy("fog") == 0


def test_what_fooled_counts_though_its_loss_is_infinite() -> None:
    class Certain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            dark = (10 * (0.52 - x.flatten(1).mean(1, keepdim=True))).clamp(0, 1)
            return torch.cat([dark, 1 - dark], 1).log()

    x, y = torch.full((8, 1, 4, 4), 0.45), torch.zeros(8, dtype=torch.long)
    found = evaluate(Certain(), x, y, threats=["linf=0.1@10", "fog=0.5@10"], corruptions=[])
    assert found.accuracy("clean") == 1
    assert found.accuracy("linf") == found.accuracy("fog") == 0


def test_gradients_that_are_no_numbers() -> None:
    x, y = torch.full((32, 1, 4, 4), 0.55), torch.ones(32, dtype=torch.long)
    assert "100% of the images have no gradient at all, or none that is a number" in look(
        Bright(), x, y
    )


def test_answers_that_are_no_numbers(net, digits, labels) -> None:
    class Diverged(nn.Module):
        def __init__(self, above: float) -> None:
            super().__init__()
            self.above = above

        def forward(self, x: Tensor) -> Tensor:
            lost = x.flatten(1).mean(1) > self.above
            return net(x).masked_fill(lost[:, None], torch.nan)

    with pytest.raises(ValueError, match="answers are no numbers"):
        evaluate(Diverged(0.0), digits[:8], labels[:8], threats=[], corruptions=[])
    order = digits.flatten(1).mean(1).argsort()[:100]
    x, y = digits[order], labels[order]
    middle = float(x[50].mean())
    found = evaluate(Diverged(middle), x, y, threats=[], corruptions=[])
    assert 0.3 < found.accuracy("clean") <= 0.55
    (warning,) = found.warnings
    assert "with no numbers (NaN): they count as wrong" in warning


def test_noise_that_fools_what_pgd_fools_is_no_reason_to_doubt() -> None:
    x = torch.full((32, 1, 8, 8), 0.501)
    model = Level(nn.Identity()).eval()
    assert doubts(Victim(model), x, torch.ones(32, dtype=torch.long)) == []


def test_statistics_of_a_batch_that_lose_clean_images_tell_nothing_of_attacks() -> None:
    x = (0.6 + 0.02 * torch.rand(40, 1, 1, 1)).expand(40, 1, 4, 4).clone()
    model = Level(nn.BatchNorm1d(1, affine=False)).eval()
    assert doubts(Victim(model), x, torch.ones(40, dtype=torch.long)) == []


def test_two_images_of_a_thousand_are_chance() -> None:
    assert black_box_wins({"FAB-T": 500, "Square": 498}, 1000) is None
    assert black_box_wins({"FAB-T": 500, "Square": 497}, 1000) is not None


@pytest.mark.parametrize("few", [1, 5])
def test_fewer_steps_that_are_stronger_are_told(few, monkeypatch) -> None:
    right = {1: 0.5, 5: 0.5, 20: 0.5, few: 0.1}
    monkeypatch.setattr(credibility, "_plain_pgd", lambda victim, x, y, eps, steps: steps)
    monkeypatch.setattr(credibility, "_right", lambda victim, steps, y: right[steps])
    none = torch.empty(0)
    told = credibility._more_steps_are_weaker(None, none, none)  # type: ignore[arg-type]
    assert told is not None
    assert f"with {few} step{'s' * (few > 1)} (10% right) than with 20 (50%)" in told


def test_statistics_come_back_where_the_model_was_asked_before() -> None:
    y = (torch.arange(40) % 10 == 0).long()
    x = torch.where(y.bool(), 0.59, 0.49)[:, None, None, None].expand(40, 1, 4, 4).clone()
    model = Level(nn.BatchNorm1d(1, affine=False)).eval()
    victim = Victim(model)
    with victim.frozen():
        victim(x)  # in eval mode it changes nothing
    doubts(victim, x, y)
    assert int(model.norm.num_batches_tracked) == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(1))
