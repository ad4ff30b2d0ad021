"""What the one line is worth when a trained network is trained a little more.

Run:  IJSAT_DATA=... python benchmarks/accuracy/finetune.py

A ResNet-18 of a quarter of the width is trained plainly on 48,000 or 10,000 training images of
CIFAR-10, and then for four or ten epochs more with each augmentation. ``transfer``: it is trained
on the 24,000 of five classes, and then, with a new last layer, on 500 images of the five others.
The 2,000 training images left out choose the best epoch and, in place of the test split with seed
100, the settings; the test split is read at the end alone. The base is one network for all seeds,
which draw the order, the crops and the augmentations (and, in ``transfer``, the images). The rows
"for as long as ..." have the processor time of the row they name. Every network is kept beside its
run, and ``--corruptions`` measures each on the 15 corruptions of 2,000 test images, or of 500 that
validate. ``--record finetune-cifar10`` writes what is there, and with ``--seeds 100``
``--record finetune-tuning`` what chose the settings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.augmentations import ROWS
from benchmarks.accuracy.study import (
    Labelled,
    Run,
    Study,
    Task,
    accuracy,
    arguments,
    both,
    keep,
    of,
    of_each,
    run_all,
    train,
)
from benchmarks.harness import keep_memory, record
from benchmarks.networks import cifar_resnet18
from benchmarks.real_data import cifar10
from benchmarks.training import save_weights, train_plainly
from ijsat_aug import load_flow
from ijsat_aug.evaluation import evaluate
from ijsat_aug.flows.frozen import FrozenGlow

data = cache(cifar10)
make = partial(cifar_resnet18, width=16)
VALIDATION = 2000
TUNING = 100  # the seed that is tested on validation images
STEPS = {"48000": 4 * 375, "10000": 10 * 78, "transfer": 500}
PEAKS = {"48000": 0.02, "10000": 0.02, "transfer": 0.1}  # of 0.02 and 0.1, with seed 100
BASE_EPOCHS = {"48000": 30, "10000": 100, "transfer": 30}
FIRST, FEW = 5, 100  # classes of the base in "transfer"; images of each of the others
RIVALS = ("plain", "mixup")


class FineTuning(Study):
    """Some epochs more, from the weights of a network that was trained plainly."""

    def __init__(self, work: Path, flow: FrozenGlow) -> None:
        super().__init__(work, "cifar_resnet18(width=16)", list(STEPS))
        self.flow = flow

    def train(self, run: Run) -> dict[str, Any]:
        """One fine-tuning and its test; the last weights are kept."""
        part = self.parts(run)
        network = self.base(part, run.seed)
        before = accuracy(network, part.tested)
        task = Task(part.learnt, part.validation, STEPS[part.name], PEAKS[part.name])
        trained = train(task, network, ROWS[run.row](network, self.flow), run.seconds)
        facts = {"before": before, **both(trained, part.tested)}
        save_weights(main_branch(trained.network), self.file(run, ".safetensors"))
        return facts

    def parts(self, run: Run) -> Parts:
        """The images of a run."""
        images, labels = data(train=True)
        held, used = split(len(labels))
        pick = partial(of, (images, labels))
        tested = images_tested(run.seed)
        if run.setting != "transfer":
            learnt = pick(used[: int(run.setting)])
            return Parts(learnt, learnt, pick(held), tested, str(run.setting))
        new = used[labels[used] >= FIRST]
        new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(run.seed))]
        few = of_each(new, labels, range(FIRST, 10), FEW)
        return Parts(
            pick(used[labels[used] < FIRST]), pick(few), pick(held[labels[held] >= FIRST]),
            of(tested, tested[1] >= FIRST), "transfer",
        )  # fmt: skip

    def base(self, parts: Parts, seed: int) -> nn.Sequential:
        """The network that is trained on; with a new last layer where the classes are others.

        All that is random comes after it and from the seed: its own training has another.
        """
        weights = self.work / f"base-{parts.name}.safetensors"
        network = train_plainly(make, *parts.before, BASE_EPOCHS[parts.name], weights=weights)
        assert isinstance(network, nn.Sequential)
        torch.manual_seed(seed)
        if parts.name == "transfer":
            network[-1].reset_parameters()  # type: ignore[operator]
        return network

    def corruptions(self, rows: Sequence[str]) -> None:
        """Add to the runs of all classes what their networks make of corrupted test images."""
        for path in sorted(self.work.glob("*.json")):
            result = json.loads(path.read_text())
            wanted = result["row"] in rows and result["setting"] != "transfer"
            if wanted and "corruptions" not in result:
                name, count = ("validation", 500) if result["seed"] == TUNING else ("test", 2000)
                images, labels = (part[:count] for part in images_tested(result["seed"]))
                network = make()
                network.load_state_dict(load_file(path.with_suffix(".safetensors")))
                report = evaluate(
                    network, images, labels, threats=(), corruption_files=self.work / name
                )
                result["corruptions"] = round(100 * report.summary()["corruptions"], 2)
                keep(path, result)


@dataclass(frozen=True)
class Parts:
    """The images of a fine-tuning: what the base learnt, and what it goes on with."""

    before: Labelled
    learnt: Labelled
    validation: Labelled
    tested: Labelled
    name: str


def split(count: int) -> tuple[Tensor, Tensor]:
    """Which training images validate, and which are learnt from."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:VALIDATION], order[VALIDATION:]


def images_tested(seed: int) -> Labelled:
    """The test split; with the seed that chooses the settings, the images that validate."""
    if seed != TUNING:
        return data(train=False)
    learnt = data(train=True)
    return of(learnt, split(len(learnt[1]))[0])


def main_branch(network: nn.Module) -> dict[str, Tensor]:
    """Its weights, without the statistics that split BatchNorm keeps for adversarial images."""
    state = network.state_dict()
    return {name: v for name, v in state.items() if ".auxiliary." not in name}


def main() -> None:
    parser = arguments("runs/finetune")
    parser.add_argument("--flow", default="cifar10-fast", help="name or folder")
    parser.add_argument("--corruptions", action="store_true", help="of the networks there are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    flow = load_flow(options.flow, compute_dtype=torch.bfloat16)
    study = FineTuning(options.work, flow)
    if options.corruptions:
        study.corruptions(options.only or list(ROWS))
    elif options.record:
        facts = {"flow": flow.info["weights"]["sha256"], "peaks": PEAKS}
        print(record(options.record, facts | study.result(options.seeds, RIVALS)))
    else:
        run_all(study, list(ROWS), options)


if __name__ == "__main__":
    main()
