"""What the joint space adds to adversarial training: to PGD-AT, to TRADES and to TRADES+AWP.

Run:  IJSAT_DATA=... python benchmarks/robustness/train.py              (five hours on two cores)
      IJSAT_DATA=... python benchmarks/robustness/train.py --evaluate

A ResNet-10 of 0.3 M parameters learns from 10,000 images of CIFAR-10, with crop and flip, under
seven steps of 2.5 eps / 7 at L-inf 4/255; the learning rate falls to a tenth after half and after
three quarters of the epochs. "+ JSA" attacks in the joint space: the latents move in two of the
steps, at 4/255 half as far as by default, which the validation images chose. "+ IJSAT" mixes first
and attacks the blends alike; TRADES compares the blend with the attacked one. "+ L2 of ..." gives
half of each batch, or a quarter, to seven steps in L2 of that radius (at 4/255; it goes with the
budget), in pixels alone. 1,000 other training images under PGD-10 choose the best epoch.
``--evaluate`` measures the last network of each on test images: clean, PGD-50, AutoAttack, the
joint space, and the unseen threats at half of their usual budgets, as 4/255 is half of 8/255, and
at a quarter; and the best network under AutoAttack. Options take a wider network, more images and
another budget. ``--record`` writes what is there. Each training and each finished threat is a file
of its own.

On a GPU all trainings run side by side, their steps CUDA graphs. The "seconds" of a training are
its steps times what one takes when nothing else runs, measured before; on a CPU they are those of
the process. "passes" is how many batches a step sends through the network.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.graphs import Training, alone, finish, finished, side_by_side
from benchmarks.harness import hardware, machines, record
from benchmarks.networks import cifar_resnet18, small_resnet
from benchmarks.real_data import cifar10
from benchmarks.robustness.report_rows import answers, numbers
from benchmarks.robustness.withstand import attack_all, jobs, one_thread, reports
from benchmarks.training import (
    LOW,
    LOW_PRECISION,
    Labelled,
    Seen,
    crop_and_flip,
    low_precision,
    save_weights,
)
from ijsat_aug import JointSpaceAdv, RobustMixup, load_flow
from ijsat_aug.evaluation import Report
from ijsat_aug.flows.calibration import recommended_eta
from ijsat_aug.flows.files import write_atomically
from ijsat_aug.flows.frozen import FrozenGlow
from ijsat_aug.training import AdversarialWeightPerturbation, CapturedStep, TRADESLoss
from ijsat_aug.transforms.randomness import Randomness

STEPS = 7
VALIDATION, BATCH = 1000, 128
TIMED = 30  # steps
UNION = "worst case of the unseen"
ROWS = [
    base + ending
    for base in ("PGD-AT", "TRADES", "TRADES + AWP")
    for ending in ("", " + JSA", " + IJSAT")
] + [
    "PGD-AT + JSA + L2 of 1",
    "PGD-AT + JSA + L2 of 1.5",
    "PGD-AT + L2 of 1.5, quarter of each batch",
    "PGD-AT + JSA + L2 of 1.5, quarter of each batch",
]
L2 = " + L2 of "
QUARTER = ", quarter of each batch"


@dataclass
class Method:
    """How a network is trained: what becomes of a batch, and the loss at it.

    Attributes:
        mix: Blends of pairs, or None for the batch as it is.
        attacks: They make what is trained on, each of its part of the batch.
        parts: How much of the batch they get, as a ratio.
        trades: Whether the prediction before the attack is held against the one after it.
        gamma: Size of the weight perturbation; 0 is none.
    """

    mix: RobustMixup | None
    attacks: list[JointSpaceAdv]
    parts: tuple[int, ...]
    trades: bool
    gamma: float

    @classmethod
    def of(cls, row: str, network: nn.Module, flow: FrozenGlow, levels: float = 4) -> Method:
        """What the name of a row says, at so many 255ths."""
        row, _, radius = row.partition(L2)
        radius, quarter, _ = radius.partition(QUARTER)
        trades, mixed = "TRADES" in row, "IJSAT" in row
        attack = partial(
            JointSpaceAdv, network, flow, steps=STEPS, objective="kl" if trades else "ce", **LOW
        )
        budgets: dict[str, Any] = {"eta": 0}
        if mixed or "JSA" in row:
            budgets = {"eta": recommended_eta(flow, "linf") * levels / 8, "latent_steps": 2}
        attacks = [attack(eps=levels / 255, **budgets)]
        parts: tuple[int, ...] = (1,)
        if radius:
            attacks.append(attack(eps=float(radius) * levels / 4, eta=0, norm="l2"))
            parts = (3, 1) if quarter else (1, 1)
        mix = RobustMixup(num_classes=10, eps=0) if mixed else None
        return cls(mix, attacks, parts, trades, 0.005 if "AWP" in row else 0.0)

    def seed(self, seed: int) -> None:
        """Draw from now on from generators of its own."""
        random = Randomness(seed)
        for attack in self.attacks:
            attack.random = random
        if self.mix is not None:
            self.mix.random = random

    def draw(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """All that is random in a step; a blend is of the shape of a batch."""
        params = {"attacks": [attack.draw(*part) for attack, part in self.shared_out(x, y)]}
        return params if self.mix is None else params | {"mix": self.mix.draw(x, y)}

    def step(self, network: nn.Module, x: Tensor, y: Tensor, params: dict[str, Any]) -> None:
        """Leave the gradient of one batch on the network, given what :meth:`draw` drew."""
        if self.mix is not None:
            x, y, _ = self.mix.augment(x, y, params["mix"])
        worse = [
            attack.augment(*part, drawn)[0]
            for (attack, part), drawn in zip(self.shared_out(x, y), params["attacks"], strict=True)
        ]
        loss = partial(self.loss, network, x, torch.cat(worse), y)
        worst_weights = AdversarialWeightPerturbation(network, self.gamma)
        with worst_weights(loss) if self.gamma else nullcontext(loss()) as value:
            value.backward()

    def shared_out(self, x: Tensor, y: Tensor) -> Iterator[tuple[JointSpaceAdv, Labelled]]:
        """Each attack with its part of a batch; the last one has what is left over."""
        sizes = [len(x) * part // sum(self.parts) for part in self.parts]
        sizes[-1] += len(x) - sum(sizes)
        return zip(self.attacks, zip(x.split(sizes), y.split(sizes), strict=True), strict=True)

    def loss(self, network: nn.Module, x: Tensor, worse: Tensor, y: Tensor) -> Tensor:
        """TRADES', or the cross-entropy of attacked images."""
        if not self.trades:
            return F.cross_entropy(logits(network, worse), y)
        clean, attacked = logits(network, torch.cat([x, worse])).chunk(2)
        found: Tensor = TRADESLoss(beta=6)(clean, attacked, y)
        return found


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """In low precision inside, and float32 outside."""
    images = images.contiguous(memory_format=torch.channels_last)
    with low_precision(images):
        found: Tensor = network(images)
    return found.float()


@dataclass(frozen=True)
class Plan:
    """What all rows share.

    Attributes:
        learnt: uint8 images and their classes, on the device where the training runs.
        validation: The same, which choose the best epoch.
        epochs: How long.
        seed: Of the weights and of all draws.
        work: Folder of the results.
        batch: Images a step.
        levels: The budget, in 255ths.
        width: Of a ResNet-18; 0 is the small ResNet-10.
    """

    learnt: Labelled
    validation: Labelled
    epochs: int
    seed: int
    work: Path
    batch: int = BATCH
    levels: float = 4
    width: int = 0

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.learnt[0].device

    @property
    def each(self) -> int:
        """Steps of an epoch."""
        return len(self.learnt[1]) // self.batch

    def rate(self, epoch: int) -> float:
        """A tenth after half and after three quarters."""
        falls = (self.epochs // 2, 3 * self.epochs // 4)
        return float(0.1 * 0.1 ** sum(epoch >= fall for fall in falls))


class Course:
    """The training of a row, whose step and whose validation a GPU replays.

    Args:
        row: Its name.
        plan: What it shares with the others.
        flow: Of the attack, on the device.
    """

    def __init__(self, row: str, plan: Plan, flow: FrozenGlow) -> None:
        self.row, self.plan = row, plan
        network = self._fresh().to(plan.device)
        self.network = network.to(memory_format=torch.channels_last)
        self.method = Method.of(row, self.network, flow, plan.levels)
        self.rate = torch.zeros((), device=plan.device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), self.rate, momentum=0.9, nesterov=True, weight_decay=5e-4,
            fused=True,
        )  # fmt: skip
        self.examiner = JointSpaceAdv(
            self.network, eta=0, eps=plan.levels / 255, steps=10, generator=0, **LOW
        )
        size = 1000 if plan.device.type == "cuda" else 250
        chunks = zip(*(part.split(size) for part in plan.validation), strict=True)
        self.held = [(x.float() / 255, y) for x, y in chunks]
        self.starts = [self.examiner.draw(x, y) for x, y in self.held]
        self.right = torch.zeros((), dtype=torch.long, device=plan.device)
        self.training, self.judging = CapturedStep(self._train), CapturedStep(self._judge)
        self.passes, self.seconds = 0.0, 0.0
        self.step_alone: float | None = None
        self.seen = Seen(self.network)

    def begin(self) -> None:
        """New weights, and the random numbers of the seed."""
        self.network.load_state_dict(self._fresh().state_dict())
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        self.draws = torch.Generator(self.plan.device).manual_seed(self.plan.seed)
        self.method.seed(self.plan.seed + 2**20)  # not the numbers of the crops again
        self.network.train()

    def train(self) -> Training:
        """The training; yields after every step, and while a GPU has not finished an epoch."""
        self.begin()
        batches, plan = self._batches(), self.plan
        curve: list[float] = []
        best: dict[str, Tensor] = {}
        for epoch in range(plan.epochs):
            self.rate.fill_(plan.rate(epoch))
            for _ in range(plan.each):
                began = time.process_time()
                self.step(*next(batches))
                self.seconds += time.process_time() - began
                yield
            self.validate()
            done = finished(plan.device)
            while not done():
                yield
            curve.append(100 * int(self.right) / len(plan.validation[1]))
            if curve[-1] == max(curve):
                best = {name: value.clone() for name, value in self._state().items()}
            told = f"epoch {epoch + 1} of {plan.epochs}, validation under PGD-10 {curve[-1]:.1f}"
            print(f"{self.row}: {told}", flush=True)
        self._save(best, curve)

    def measure(self) -> Training:
        """What a step takes when nothing else runs; a GPU has its graphs from then on."""
        self.begin()
        batches = self._batches()
        for _ in range(4):
            self.step(*next(batches))
            self.validate()
        finish(self.plan.device)
        began = time.perf_counter()
        for _ in range(TIMED):
            self.step(*next(batches))
        finish(self.plan.device)
        self.step_alone = (time.perf_counter() - began) / TIMED
        print(f"{self.row}: {1e3 * self.step_alone:.2f} ms a step, alone", flush=True)
        yield

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step of the optimiser on a batch of crops."""
        self.seen.images = 0
        self.training(x, y, self.method.draw(x, y))
        if self.seen.images:  # a replay calls nothing
            self.passes = self.seen.images / len(x)

    def validate(self) -> None:
        """Count the validation images that are right under PGD-10."""
        self.right.zero_()
        for (x, y), start in zip(self.held, self.starts, strict=True):
            self.judging(x, y, start)

    def _train(self, x: Tensor, y: Tensor, params: dict[str, Any]) -> None:
        self.method.step(self.network, x, y, params)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _judge(self, x: Tensor, y: Tensor, start: dict[str, Any]) -> None:
        self.network.eval()
        worse, _, _ = self.examiner.augment(x, y, start)
        with torch.no_grad():
            self.right.add_((logits(self.network, worse).argmax(1) == y).sum())
        self.network.train()

    def _fresh(self) -> nn.Module:
        torch.manual_seed(self.plan.seed)
        if self.plan.width:
            return cifar_resnet18(width=self.plan.width)
        return small_resnet(channels=self.plan.learnt[0].shape[1])

    def _state(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def _batches(self) -> Iterator[Labelled]:
        """Batches of crops, in a new order each epoch."""
        (images, labels), plan = self.plan.learnt, self.plan
        own: dict[str, Any] = {"generator": self.draws, "device": plan.device}
        while True:
            order = torch.randperm(len(labels), **own)
            for index in order.split(plan.batch)[: plan.each]:
                yield crop_and_flip(images[index], self.draws), labels[index]

    def _save(self, best: dict[str, Tensor], curve: list[float]) -> None:
        steps, folder = self.plan.epochs * self.plan.each, place(self.plan.work, self.row)
        seconds = self.seconds if self.step_alone is None else steps * self.step_alone
        facts = {
            "row": self.row, "seed": self.plan.seed, "epochs": self.plan.epochs,
            "levels": self.plan.levels, "width": self.plan.width,
            "images": len(self.plan.learnt[1]), "batch": self.plan.batch,
            "validation": curve, "steps": steps, "passes": round(self.passes, 2),
            "seconds": round(seconds, 1), "hardware": hardware(),
        }  # fmt: skip
        for name, state in (("best", best), ("last", self._state())):
            on_host = {key: value.cpu() for key, value in state.items()}
            save_weights(on_host, folder / f"{name}.safetensors")
        write_atomically(folder / "training.json", json.dumps(facts).encode())


def place(work: Path, row: str) -> Path:
    """The folder of a training."""
    return work / row.replace(" ", "").replace("+", "-")


def is_trained(work: Path, row: str) -> bool:
    """Whether a training is done."""
    return (place(work, row) / "training.json").is_file()


def train_all(
    rows: Sequence[str], plan: Plan, flow: FrozenGlow, at_once: int, until: float | None = None
) -> None:
    """The trainings that are not there yet, some side by side.

    A GPU captures the steps of all of them before the first training begins.
    """
    side_by_side(trainings(rows, plan, flow), at_once, until=until)
    finish(plan.device)


def trainings(rows: Sequence[str], plan: Plan, flow: FrozenGlow) -> list[Callable[[], Training]]:
    """What begins each training that is not there yet; on a GPU its steps are captured."""
    todo = [row for row in rows if not is_trained(plan.work, row)]
    finish(plan.device)
    if plan.device.type != "cuda":
        return [partial(train, row, plan, flow) for row in todo]
    return [measured(Course(row, plan, flow)).train for row in todo]


def train(row: str, plan: Plan, flow: FrozenGlow) -> Training:
    """One training; the best and the last network, and the robust accuracy of every epoch."""
    return Course(row, plan, flow).train()


def measured(course: Course) -> Course:
    """The course, when the time of its steps is known."""
    finish(course.plan.device)  # its weights came there on another stream
    alone(course.measure())
    return course


def planned(options: argparse.Namespace) -> Plan:
    """The plan for CIFAR-10, its images where the training shall run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = cifar10(batches=options.batches)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(labels), generator=generator)
    held, learnt = (
        (images[index].to(device), labels[index].to(device))
        for index in (order[:VALIDATION], order[VALIDATION:][: options.learnt])
    )
    return Plan(
        learnt, held, options.epochs, options.seed, options.work, options.batch, options.levels,
        options.width,
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("--only", nargs="+", choices=ROWS, help="these rows alone")
    found.add_argument("--epochs", type=int, default=30)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--batches", type=int, default=5, help="sheets of training images")
    found.add_argument("--learnt", type=int, default=10_000, help="images to learn from")
    found.add_argument("--batch", type=int, default=BATCH, help="images a step")
    found.add_argument("--levels", type=float, default=4, help="the budget, in 255ths")
    found.add_argument("--width", type=int, default=0, help="of a ResNet-18; 0: the ResNet-10")
    found.add_argument("--name", default="robustness-training", help="of the record")
    found.add_argument("--images", type=int, default=500, help="of the test split")
    found.add_argument("--work", type=Path, default=Path("runs/robust"))
    found.add_argument("--evaluate", action="store_true", help="what is trained")
    found.add_argument("--processes", type=int, default=1, help="of the evaluation")
    found.add_argument("--seconds", type=float, help="begin nothing new after so many")
    found.add_argument("--record", action="store_true", help="write what is evaluated")
    return found


def main() -> None:
    options = parser().parse_args()
    until = None if options.seconds is None else time.monotonic() + options.seconds
    rows = options.only or ROWS
    one_thread()
    if options.evaluate:
        folders = [place(options.work, row) for row in rows if is_trained(options.work, row)]
        todo = jobs(folders, options.images, progress=options.processes == 1)
        attack_all(todo, options.processes, until)
    elif not options.record:
        plan = planned(options)
        flow = load_flow("cifar10-fast", compute_dtype=LOW_PRECISION).to(plan.device)
        train_all(rows, plan, flow, len(ROWS) if plan.device.type == "cuda" else 1, until)
    if options.record:
        print(record(options.name, recorded(rows, options.work, options.images)))


Reports = dict[str, dict[str, Report]]
_OF_ALL = ("seed", "epochs", "levels", "width", "images", "batch")  # facts of a record


def recorded(rows: Sequence[str], work: Path, images: int) -> dict[str, Any]:
    """The record of all rows whose last network is evaluated."""
    known = {row: reports(place(work, row), images) for row in rows if is_trained(work, row)}
    found = {row: one for row, one in known.items() if {"last", "gentle"} <= one.keys()}
    trainings = {row: json.loads((place(work, row) / "training.json").read_text()) for row in found}
    if not found:
        raise SystemExit("there is no training whose evaluation is complete.")
    for fact in _OF_ALL:
        values = {one.get(fact) for one in trainings.values()}
        if len(values) > 1:
            raise SystemExit(f"the trainings differ in {fact} ({values}): one record takes one.")
    trained, where = machines(trainings.values()), hardware()
    if trained != where:
        where = f"Trained on {trained}, attacked on {where}"
    seed = next(iter(trainings.values()))["seed"]
    facts = {"hardware": where, "seed": seed, "images": images, "trainings": trainings}
    return facts | told(found)


def told(reports: Reports) -> dict[str, Any]:
    """What the last networks withstand, and what AutoAttack leaves of the best and the last.

    The changes are those against the training of the same name without anything on top; where it
    is there, also against the one with the same share in L2 and without the latents.
    """
    found: dict[str, Any] = {"tables": {}, "gentle": {}, "autoattack": {}, "right": {}}
    for row, ours in reports.items():
        base = row.partition(L2)[0].removesuffix(" + JSA").removesuffix(" + IJSAT")
        pixels = row.replace(" + JSA", "")
        for other in (base, pixels) if L2 in row and pixels in reports else (base,):
            theirs = reports[other] if other in reports and other != row else {}
            for part, name in (("tables", "last"), ("gentle", "gentle")):
                found[part].setdefault(other, {})[row] = table(ours[name], theirs.get(name))
        found["right"][row] = {name: answers(report) for name, report in ours.items()}
        found["autoattack"][row] = {
            name: round(100 * ours[name].accuracy("autoattack"), 2)
            for name in ("last", "best")
            if name in ours
        }
    return found


def table(report: Report, against: Report | None) -> list[dict[str, Any]]:
    """The numbers, with the worst case of the unseen without the one that alone decides it."""
    less = numbers(_without_jpeg(report), against and _without_jpeg(against))
    worst = [row | {"threat": f"{UNION} but JPEG L1"} for row in less if row["threat"] == UNION]
    found: list[dict[str, Any]] = []
    for row in numbers(report, against):
        found += [row, *worst] if row["threat"] == UNION else [row]
    return found


def _without_jpeg(report: Report) -> Report:
    kept = {name: one for name, one in report.results.items() if not name.startswith("jpeg_l1")}
    return replace(report, results=kept)


if __name__ == "__main__":
    main()
