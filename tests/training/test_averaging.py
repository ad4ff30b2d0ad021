"""Weight averaging is torch's own: beside an augmentation, and as the model that is attacked."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from ijsat_aug import AugmentedLoader, JointSpaceAdv, RobustMixup


def test_the_average_follows_the_weights_alone(network, digits, labels, flow) -> None:
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    data = DataLoader(TensorDataset(digits[:60], labels[:60]), batch_size=20)
    mix = RobustMixup(network, num_classes=10, attack=JointSpaceAdv(network, flow))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    expected = None
    for x, y in AugmentedLoader(data, mix):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(network)
        now = copy.deepcopy(dict(network.named_parameters()))
        expected = now if expected is None else {n: 0.9 * expected[n] + 0.1 * now[n] for n in now}
    for name, value in averaged.module.named_parameters():
        assert torch.allclose(value, expected[name], atol=1e-6)
    assert int(averaged.n_averaged) == 3


def test_the_averaged_model_can_be_attacked(network, digits, labels) -> None:
    averaged = AveragedModel(network)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()  # the model itself knows nothing now
    x, y = digits[:20], labels[:20]
    adv = JointSpaceAdv(averaged, eta=0, eps=0.1, steps=3, random_start=False)
    adv(x, y)
    assert (adv.last["loss"] > adv.last["loss_start"]).all()
    assert int(averaged.n_averaged) == 0
