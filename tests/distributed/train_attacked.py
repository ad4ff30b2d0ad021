"""Trains a DDP model on attacked batches; each rank attacks with another number of steps.

Then a sharded one (FSDP), whose passes are collective: it is attacked as a whole one is.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ijsat_aug import JointSpaceAdv, RobustMixup
from ijsat_aug.training import AdversarialWeightPerturbation


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for static_graph in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )
        model = DistributedDataParallel(net, static_graph=static_graph)
        perturb_weights(model, rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        adv = JointSpaceAdv(model, "digits", steps=1 + 3 * rank, eps=0.05, tau=0, generator=rank)
        assert adv.model is net
        generator = torch.Generator().manual_seed(rank)
        for _ in range(3):
            x = torch.rand(8, 1, 8, 8, generator=generator)
            y = torch.randint(10, (8,), generator=generator)
            refuse_collectives(model, adv, x, y)
            x, y = adv(x, y)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        counter = int(net[1].num_batches_tracked)
        assert counter == 3, counter
        weights = torch.cat([p.detach().flatten() for p in net.parameters()])
        gathered = [torch.empty_like(weights) for _ in range(world)]
        dist.all_gather(gathered, weights)
        assert all(torch.equal(weights, other) for other in gathered)
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    (folder / f"rank{rank}.txt").write_text(f"steps {counter} weights {digest}")
    if hasattr(torch.cpu.Stream, "record_event"):  # where there is none, it needs a GPU
        train_sharded(rank)
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


def train_sharded(rank: int) -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))]
    nets += [copy.deepcopy(nets[0])]
    for part in (nets[1][1], nets[1]):
        fully_shard(part, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    generator = torch.Generator().manual_seed(rank)
    x = torch.rand(8, 1, 8, 8, generator=generator)
    y = torch.randint(10, (8,), generator=generator)
    whole, sharded = (
        RobustMixup(net, num_classes=10, attack=JointSpaceAdv(net, "digits"), generator=rank)
        for net in nets
    )
    attacked, targets = sharded(x, y)
    assert torch.equal(attacked, whole(x, y)[0])
    before = [p.to_local().clone() for p in nets[1].parameters()]
    optimizer = torch.optim.SGD(nets[1].parameters(), lr=0.1)
    for _ in range(2):
        nn.functional.cross_entropy(nets[1](attacked), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        attacked, targets = sharded(x, y)
    after = [p.to_local() for p in nets[1].parameters()]
    assert all(p.numel() == 0 or not torch.equal(b, p) for b, p in zip(before, after, strict=True))
    for options in ({"tau": 0, "steps": 2}, {"p": 0.5}):
        with pytest.raises(ValueError, match="must attack as often"):  # or wait for ever
            JointSpaceAdv(nets[1], "digits", **options)(x, y)


def perturb_weights(model: DistributedDataParallel, rank: int) -> None:
    """Each process by its own batch, along the gradient of all; not with a static graph."""
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(rank))
    if model.static_graph:
        with pytest.raises(ValueError, match="leave static_graph out"):
            AdversarialWeightPerturbation(model)(lambda: model(x).sum()).__enter__()
        return
    with AdversarialWeightPerturbation(model)(lambda: model(x).square().mean()) as loss:
        loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    gathered = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, found)
    assert all(torch.equal(found, other) for other in gathered)
    model.module[1].reset_running_stats()
    model.zero_grad()


def refuse_collectives(
    model: nn.Module, adv: JointSpaceAdv, x: torch.Tensor, y: torch.Tensor
) -> None:
    """An attack on one rank alone, while the others do something else, must not wait for them."""
    if dist.get_rank() != 0:
        return

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a collective inside the attack")

    # All that DDP does around a forward pass begins there.
    original = DistributedDataParallel.forward
    DistributedDataParallel.forward = refuse
    try:
        try:
            model(x)
        except AssertionError:
            adv(x, y)
        else:
            raise RuntimeError("the guard does not see DDP's forward pass")
    finally:
        DistributedDataParallel.forward = original


if __name__ == "__main__":
    main(Path(sys.argv[1]))
