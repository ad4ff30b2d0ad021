"""Split BatchNorm against two plain BatchNorms."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ijsat_aug import JointSpaceAdv, RobustMixup
from ijsat_aug.training import auxiliary_batchnorm, convert_split_batchnorm


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.BatchNorm1d, (8, 3)), (nn.BatchNorm2d, (8, 3, 4, 4)), (nn.BatchNorm3d, (8, 3, 2, 2, 2))],
)
def test_each_half_has_its_own_statistics(kind, shape) -> None:
    plain = kind(3)
    nn.init.uniform_(plain.weight)
    clean, adversarial = copy.deepcopy(plain), copy.deepcopy(plain)
    split = convert_split_batchnorm(nn.Sequential(plain))
    for _ in range(3):
        x = torch.randn(shape) + torch.arange(8).reshape(-1, *(1,) * (len(shape) - 1))
        out = split(x)
        expected = torch.cat([clean(x[:4]), adversarial(x[4:])])
        assert torch.allclose(out, expected, atol=1e-6)
    assert torch.equal(split[0].running_mean, clean.running_mean)
    assert torch.equal(split[0].auxiliary.running_var, adversarial.running_var)
    split.eval()
    assert torch.equal(split(x), clean.eval()(x))
    with auxiliary_batchnorm(split):
        assert torch.equal(split(x), adversarial.eval()(x))


def test_parameters_keep_their_names_and_train_apart(network, digits, labels) -> None:
    old = dict(network.state_dict())
    identities = {n: id(p) for n, p in network.named_parameters()}
    assert convert_split_batchnorm(network) is network
    new = network.state_dict()
    assert set(old) < set(new)
    assert all("auxiliary" in name for name in set(new) - set(old))
    assert all(id(p) == identities.get(n, id(p)) for n, p in network.named_parameters())
    x, t = RobustMixup(network, num_classes=10, mode="append")(digits[:8], labels[:8])
    nn.functional.cross_entropy(network(x), t).backward()
    assert network[1].weight.grad.abs().sum() > 0
    assert network[1].auxiliary.weight.grad.abs().sum() > 0
    twin = copy.deepcopy(network)
    assert twin[1].auxiliary is not network[1].auxiliary
    averaged = AveragedModel(network, use_buffers=True)
    averaged.update_parameters(network)
    averaged.eval()
    network.eval()
    assert torch.allclose(averaged(digits[:4]), network(digits[:4]))


def test_routes(network, digits) -> None:
    convert_split_batchnorm(network)
    with auxiliary_batchnorm(network, "clean"):
        network(digits[:5])
    assert int(network[1].auxiliary.num_batches_tracked) == 250
    assert int(network[1].num_batches_tracked) == 251
    with pytest.raises(KeyboardInterrupt), auxiliary_batchnorm(network):
        raise KeyboardInterrupt
    assert network[1].route == "half"
    with pytest.raises(ValueError, match='mode="append", or the context'):
        network(digits[:5])
    with pytest.raises(ValueError, match="route must be"):
        auxiliary_batchnorm(network, "both").__enter__()
    with pytest.raises(ValueError, match="no BatchNorm to split"):
        convert_split_batchnorm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"convert_split_batchnorm\(model\) first"):
        auxiliary_batchnorm(nn.Linear(2, 2)).__enter__()


@pytest.mark.parametrize("model_mode", ["eval", "train"])
def test_appended_images_are_made_through_the_auxiliary_branch(
    model_mode, network, digits, labels, flow
) -> None:
    convert_split_batchnorm(network)
    calls: list[str] = []
    network[1].auxiliary.register_forward_hook(lambda *_: calls.append("auxiliary"))
    options = {"model_mode": model_mode, "steps": 2}
    for mode, expected in (("append", 2), ("replace", 0)):
        for augment in (
            JointSpaceAdv(network, flow, mode=mode, **options),
            RobustMixup(network, num_classes=10, mode=mode, **options),
            RobustMixup(
                network, num_classes=10, mode=mode, attack=JointSpaceAdv(network, flow, **options)
            ),
        ):
            calls.clear()
            augment(digits[:7], labels[:7])
            assert len(calls) == expected, augment
            assert {m.route for m in network.modules() if hasattr(m, "route")} == {"half"}


def test_an_attack_keeps_the_branch_that_its_caller_chose(network, digits, labels) -> None:
    convert_split_batchnorm(network)
    calls: list[int] = []
    network[1].auxiliary.register_forward_hook(lambda *_: calls.append(1))
    x, y = digits[:7], labels[:7]
    adv = JointSpaceAdv(network, eta=0, steps=2)
    with auxiliary_batchnorm(network):
        adv(x, y)
    assert len(calls) == 2
    RobustMixup(network, num_classes=10, mode="append", attack=lambda a, b: adv(a, b))(x, y)
    assert len(calls) == 4
    adv(x, y)
    assert len(calls) == 4


def test_converting_twice_is_converting_once(network) -> None:
    names = set(convert_split_batchnorm(network).state_dict())
    assert set(convert_split_batchnorm(network).state_dict()) == names


def test_synchronised_first_and_split_then() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    convert_split_batchnorm(model)
    assert isinstance(model[0], nn.SyncBatchNorm)
    assert isinstance(model[0].auxiliary, nn.SyncBatchNorm)


def test_a_split_that_was_undone_is_refused(network, digits, labels) -> None:
    """As Lightning's sync_batchnorm=True does it to a network that was split before."""
    network = nn.SyncBatchNorm.convert_sync_batchnorm(convert_split_batchnorm(network))
    adv = JointSpaceAdv(network, eta=0, mode="append")
    with pytest.raises(ValueError, match="became a plain SyncBatchNorm again"):
        adv(digits[:4], labels[:4])


def test_a_model_with_an_auxiliary_head_is_no_undone_split(digits, labels) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.auxiliary = nn.Linear(64, 10), nn.Linear(64, 10)

        def forward(self, x):
            return self.main(x.flatten(1)) + self.auxiliary(x.flatten(1))

    x, _ = JointSpaceAdv(TwoHeads(), eta=0, mode="append")(digits[:4], labels[:4])
    assert len(x) == 8


def test_other_kinds_of_batchnorm_are_refused() -> None:
    class Mine(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="Mine cannot be split"):
        convert_split_batchnorm(nn.Sequential(nn.BatchNorm2d(3), Mine(3)))


def test_a_model_that_comes_later_is_attacked_through_the_auxiliary_branch(
    network, digits, labels
) -> None:
    convert_split_batchnorm(network)
    calls: list[int] = []
    network[1].auxiliary.register_forward_hook(lambda *_: calls.append(1))
    for augment in (
        JointSpaceAdv(eta=0, mode="append").bind(network),
        RobustMixup(num_classes=10, mode="append").bind(network),
    ):
        calls.clear()
        augment(digits[:7], labels[:7])
        assert calls, augment


def test_a_pickle_keeps_the_branch_of_what_it_appends(network, digits, labels) -> None:
    adv = pickle.loads(pickle.dumps(JointSpaceAdv(network, eta=0, mode="append")))
    assert adv.bind(network).handle.route == "auxiliary"


def test_a_route_inside_another_gives_the_outer_one_back() -> None:
    net = convert_split_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    with auxiliary_batchnorm(net):
        with auxiliary_batchnorm(net, "clean"):
            assert net[0].route == "clean"
        assert net[0].route == "auxiliary"
    assert net[0].route == "half"
