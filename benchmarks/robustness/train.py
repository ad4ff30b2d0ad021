"""What the joint space adds to adversarial training: to PGD-AT, to TRADES and to TRADES+AWP.

Run:  IJSAT_DATA=... python benchmarks/robustness/train.py              (five hours on two cores)
      IJSAT_DATA=... python benchmarks/robustness/train.py --evaluate

A ResNet-10 of 0.3 M parameters learns from 10,000 images of CIFAR-10, with crop and flip, under
seven steps of 2.5 eps / 7 at L-inf 4/255; the learning rate falls to a tenth after half and after
three quarters of the epochs. "+ JSA" attacks in the joint space: the latents move in two of the
steps, half as far as by default, which the validation images chose. "+ IJSAT" mixes first and
attacks the blends with all of the radius; TRADES compares the blend with the attacked one. 1,000
other training images under PGD-10 choose the best epoch. ``--evaluate`` measures the best and the
last network of each on test images: clean, PGD-50, AutoAttack, the joint space, and the unseen
threats at half of their usual budgets, as 4/255 is half of 8/255; ``--record`` writes it too. Each
training and each finished threat is a file of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import keep_memory, record
from benchmarks.networks import small_resnet
from benchmarks.real_data import cifar10
from benchmarks.robustness.report_rows import numbers
from benchmarks.training import crop_and_flip, save_weights
from ijsat_aug import JointSpaceAdv, RobustMixup, load_flow
from ijsat_aug.evaluation import Report, evaluate
from ijsat_aug.evaluation.spaces.table import SPACES
from ijsat_aug.evaluation.threats import UNSEEN
from ijsat_aug.flows.calibration import recommended_eta
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.training import AdversarialWeightPerturbation, TRADESLoss

EPS, STEPS = 4 / 255, 7
LEARNT, VALIDATION, BATCH = 10_000, 1000, 128
HALF = tuple(f"{name}={SPACES[name].budget / 2:g}" for name in UNSEEN)
THREATS = ("linf=4/255@50", "autoattack=4/255", "jsa=4/255", *HALF)
ROWS = [
    base + ending
    for base in ("PGD-AT", "TRADES", "TRADES + AWP")
    for ending in ("", " + JSA", " + IJSAT")
]
data = cache(cifar10)


@dataclass
class Method:
    """How a network is trained: what becomes of a batch, and the loss at it.

    Attributes:
        mix: Blends of pairs, or the batch as it is.
        attack: Makes what is trained on.
        trades: Whether the prediction before the attack is held against the one after it.
        gamma: Size of the weight perturbation; 0 is none.
    """

    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    attack: JointSpaceAdv
    trades: bool
    gamma: float

    @classmethod
    def of(cls, row: str, network: nn.Module, flow: FrozenGlow) -> Method:
        """What the name of a row says."""
        trades, mixed = "TRADES" in row, "IJSAT" in row
        radius = recommended_eta(flow, "linf") / (1 if mixed else 2)
        joint = mixed or "JSA" in row
        budgets: dict[str, Any] = {"eta": radius, "latent_steps": 2} if joint else {"eta": 0}
        attack = JointSpaceAdv(
            network, flow, eps=EPS, steps=STEPS, objective="kl" if trades else "ce",
            amp_dtype=torch.bfloat16, memory_format=torch.channels_last, **budgets,
        )  # fmt: skip
        mix = RobustMixup(num_classes=10, eps=0) if mixed else lambda x, y: (x, y)
        return cls(mix, attack, trades, 0.005 if "AWP" in row else 0.0)

    def step(self, network: nn.Module, x: Tensor, y: Tensor) -> None:
        """Leave the gradient of one batch on the network."""
        x, y = self.mix(x, y)
        worse, _ = self.attack(x, y)
        loss = partial(self.loss, network, x, worse, y)
        worst_weights = AdversarialWeightPerturbation(network, self.gamma)
        with worst_weights(loss) if self.gamma else nullcontext(loss()) as value:
            value.backward()

    def loss(self, network: nn.Module, x: Tensor, worse: Tensor, y: Tensor) -> Tensor:
        """TRADES', or the cross-entropy of attacked images."""
        if not self.trades:
            return F.cross_entropy(logits(network, worse), y)
        clean, attacked = logits(network, torch.cat([x, worse])).chunk(2)
        found: Tensor = TRADESLoss(beta=6)(clean, attacked, y)
        return found


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """In bfloat16 inside, and float32 outside."""
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        found: Tensor = network(images)
    return found.float()


def place(work: Path, row: str) -> Path:
    """The folder of a training."""
    return work / row.replace(" ", "").replace("+", "-")


def train(row: str, epochs: int, seed: int, flow: FrozenGlow, work: Path) -> None:
    """One training; the best and the last network, and the robust accuracy of every epoch."""
    folder = place(work, row)
    if (folder / "training.json").is_file():
        return
    images, labels = data(train=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held, learnt = order[:VALIDATION], order[VALIDATION:][:LEARNT]
    torch.manual_seed(seed)
    network = small_resnet().to(memory_format=torch.channels_last)
    method = Method.of(row, network, flow)
    optimizer = torch.optim.SGD(
        network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    fall = [epochs // 2, 3 * epochs // 4]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, fall)
    curve: list[float] = []
    best: dict[str, Tensor] = {}
    begin, paused = time.process_time(), 0.0
    for epoch in range(epochs):
        network.train()
        for index in learnt[torch.randperm(LEARNT)].split(BATCH)[: LEARNT // BATCH]:
            method.step(network, crop_and_flip(images[index]), labels[index])
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        since = time.process_time()
        curve.append(withstood(network, images[held].float() / 255, labels[held]))
        if curve[-1] == max(curve):
            best = copy.deepcopy(network.state_dict())
        paused += time.process_time() - since
        print(f"{row}: epoch {epoch + 1} of {epochs}, validation under PGD-10 {curve[-1]:.1f}")
    facts = {
        "row": row, "seed": seed, "epochs": epochs, "validation": curve,
        "seconds": round(time.process_time() - begin - paused, 1),
    }  # fmt: skip
    for name, state in (("best", best), ("last", network.state_dict())):
        save_weights(state, folder / f"{name}.safetensors")
    (folder / "training.json").write_text(json.dumps(facts))


def withstood(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent that are right under PGD-10."""
    attack = JointSpaceAdv(
        network, eta=0, eps=EPS, steps=10, amp_dtype=torch.bfloat16,
        memory_format=torch.channels_last, generator=0,
    )  # fmt: skip
    network.eval()
    right = 0
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        worse, _ = attack(x, y)
        with torch.no_grad():
            right += int((logits(network, worse).argmax(1) == y).sum())
    return 100 * right / len(labels)


def measure(folder: Path, name: str, count: int, flow: FrozenGlow) -> Report:
    """What is left of the best or the last network on test images."""
    network = small_resnet()
    network.load_state_dict(load_file(folder / f"{name}.safetensors"))
    images, labels = (part[:count] for part in data(train=False))
    return evaluate(
        network, images, labels, threats=THREATS, flow=flow, corruptions=(),
        folder=folder / f"{name}-{count}", progress=True, name=f"{folder.name}, {name}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, help="these rows alone")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=500, help="of the test split")
    parser.add_argument("--work", type=Path, default=Path("runs/robust"))
    parser.add_argument("--evaluate", action="store_true", help="what is trained")
    parser.add_argument("--record", action="store_true", help="and write it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    if not options.evaluate:
        flow = load_flow("cifar10-fast", compute_dtype=torch.bfloat16)
        for row in options.only or ROWS:
            train(row, options.epochs, options.seed, flow, options.work)
        return
    reports = evaluated(options.only or ROWS, options.work, options.images)
    if options.record:
        trainings = {
            row: json.loads((place(options.work, row) / "training.json").read_text())
            for row in reports
        }
        facts = {"seed": options.seed, "images": options.images, "trainings": trainings}
        print(record("robustness-training", facts | told(reports)))


Reports = dict[str, dict[str, Report]]


def evaluated(rows: Sequence[str], work: Path, images: int) -> Reports:
    """The best and the last network of each of these trainings that is done."""
    flow = load_flow("cifar10-fast")
    done = [row for row in rows if (place(work, row) / "training.json").is_file()]
    return {
        row: {name: measure(place(work, row), name, images, flow) for name in ("best", "last")}
        for row in done
    }


def told(reports: Reports) -> dict[str, Any]:
    """What the last networks withstand, and what AutoAttack leaves of the best and the last.

    The changes are those against the training of the same name without the joint space.
    """
    tables: dict[str, Any] = {}
    for row, found in reports.items():
        base = row.removesuffix(" + JSA").removesuffix(" + IJSAT")
        against = reports[base]["last"] if base in reports and base != row else None
        tables.setdefault(base, {})[row] = numbers(found["last"], against)
    epochs = {
        row: {name: round(100 * one.accuracy("autoattack"), 2) for name, one in found.items()}
        for row, found in reports.items()
    }
    return {"tables": tables, "autoattack": epochs}


if __name__ == "__main__":
    main()
