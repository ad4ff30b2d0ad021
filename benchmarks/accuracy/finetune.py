"""What the one line is worth when a trained network is trained a little more.

Run:  IJSAT_DATA=... python benchmarks/accuracy/finetune.py

A ResNet-18 of a quarter of the width is trained plainly on training images of CIFAR-10, and then
some epochs more with each augmentation: four on 48,000 images, ten or twenty on 10,000.
``transfer``: it is trained on the 24,000 of five classes, and then, with a new last layer, on 500
images of the five others. ``few``: the same with a base of five epochs, and 100 images for half as
many steps. The 2,000 training images left out choose the best epoch and, in place of the test split
with seeds from 100 on, the settings (of new classes, 5,000 that nothing was learnt from); the test
split is read at the end alone. The base is one network for all seeds, which draw the order, the
crops and the augmentations (and, of new classes, the images). The rows "for as long as ..." have
the processor time of the row they name. Every network is kept beside its run, and ``--corruptions``
measures each on the 15 corruptions of 2,000 test images, or of 500 that validate. ``--record
finetune-cifar10`` writes what is there, and with ``--seeds 100`` ``--record finetune-tuning`` what
chose the settings.

On a GPU the rows are trained side by side, as ``together.py`` says, and each network sees the
corrupted images at once instead of being kept; ``--width 64 --batch 256`` is the usual ResNet-18,
``--small`` the ResNet-10 of ``lowdata.py``, which ``few`` is about.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.augmentations import AS_LONG, LATENT, LONG, MIXED, ROWS
from benchmarks.accuracy.study import (
    BATCH,
    DATA,
    TUNING,
    Run,
    Study,
    Task,
    Trained,
    accuracy,
    arguments,
    flow_asked_for,
    keep,
    of,
    of_each,
    prepare,
    right,
)
from benchmarks.accuracy.together import Course, run_all
from benchmarks.graphs import Training, alone, finished
from benchmarks.harness import keep_memory, record
from benchmarks.networks import cifar_resnet18, small_resnet
from benchmarks.training import Labelled, save_weights, train_plainly
from ijsat_aug.evaluation.corruptions import SEVERITIES, STANDARD, CorruptionFiles
from ijsat_aug.flows.frozen import FrozenGlow

VALIDATION = 2000
FIRST = 5  # of the new classes
RIVALS = ("plain", "mixup", "latent step", LATENT, MIXED)
TABLE = (
    "plain", "mixup", LATENT, MIXED, "joint step, half of each batch",
    "joint step of 1.5 levels, half of each batch", LONG.format("plain", LATENT),
    LONG.format("plain", MIXED), LONG.format("mixup", MIXED),
)  # fmt: skip
FEW = ("plain", "mixup", "OM", "latent step", "mixup + OM", MIXED)


@dataclass(frozen=True)
class Setting:
    """What is learnt before, and how it goes on.

    Attributes:
        images: Of the base, which it goes on with; None where it goes on with new classes.
        base_epochs: Of the base.
        steps: Of the fine-tuning, in batches of ``BATCH``.
        peak: Of its learning rate, the better of 0.02 and 0.1 with seed 100.
        each: Images of each new class.
    """

    images: int | None
    base_epochs: int
    steps: int
    peak: float
    each: int = 100

    @property
    def base(self) -> str:
        """The name of the base."""
        return f"transfer-{self.base_epochs}" if self.transfers else str(self.images)

    @property
    def transfers(self) -> bool:
        """Whether it goes on with new classes."""
        return self.images is None


SETTINGS = {
    "48000": Setting(48_000, 30, 4 * 375, 0.02),
    "10000": Setting(10_000, 100, 10 * 78, 0.02),
    "10000, 20 epochs": Setting(10_000, 100, 20 * 78, 0.02),
    "transfer": Setting(None, 30, 500, 0.1),
    "few": Setting(None, 5, 250, 0.02, each=20),
}


class FineTuning(Study):
    """Some epochs more, from the weights of a network that was trained plainly.

    Args:
        work: The folder of the files.
        flow: Of the augmentations.
        width: Of the ResNet-18; 0 for the ResNet-10.
        batch: Images a step.
        data: Name of the dataset.
    """

    def __init__(
        self,
        work: Path,
        flow: FrozenGlow,
        width: int = 16,
        batch: int = BATCH,
        data: str = "cifar10",
    ) -> None:
        network = f"cifar_resnet18(width={width})" if width else "small_resnet"
        super().__init__(work, network, list(SETTINGS), flow)
        wide = partial(cifar_resnet18, width=width)
        self.make = wide if width else partial(small_resnet, channels=flow.shape[0])
        self.batch = batch
        self.data = DATA[data]
        self.parts = cache(self._parts)

    @property
    def facts(self) -> dict[str, Any]:
        """What its record says of all runs."""
        return {
            "flow": self.flow.info["weights"]["sha256"], "batch": self.batch,
            "peaks": {name: setting.peak for name, setting in SETTINGS.items()},
        }  # fmt: skip

    def start(self, run: Run) -> nn.Module:
        """The network that is trained on."""
        return self.base(SETTINGS[str(run.setting)], self.parts_of(run), run.seed)

    def task(self, run: Run) -> Task:
        """Some epochs with few or many images."""
        part, setting = self.parts_of(run), SETTINGS[str(run.setting)]
        steps = setting.steps * BATCH // self.batch
        return Task(part.learnt, part.validation, steps, setting.peak, self.batch)

    def tested(self, run: Run) -> Labelled:
        """The test split, or what stands for it."""
        return self.parts_of(run).tested

    def told(self, run: Run, trained: Trained) -> dict[str, Any]:
        """With the accuracy before; on a CPU, for ``--corruptions``, the last weights are kept."""
        device = next(trained.network.parameters()).device
        before = accuracy(self.start(run).to(device), self.tested(run))
        facts = {"before": before, **super().told(run, trained)}
        if device.type == "cuda":
            return facts
        save_weights(main_branch(trained.network), self.file(run, ".safetensors"))
        return facts

    def also(self, run: Run, trained: Trained) -> Training:
        """What the network makes of corrupted images."""
        if SETTINGS[str(run.setting)].transfers:
            return {}
        device = next(trained.network.parameters()).device
        data = self.damaged(run.seed >= TUNING, device)
        counts = []
        for one in data:
            counts.append(right(trained.network, one))
            yield
        done = finished(device)
        while not done():
            yield
        images = sum(len(labels) for _, labels in data)
        return {"corruptions": round(100 * int(sum(counts)) / images, 2)}

    def parts_of(self, run: Run) -> Parts:
        """The images of a run."""
        setting = SETTINGS[str(run.setting)]
        drawn = run.seed if setting.transfers else 0
        return self.parts(setting, drawn, run.seed >= TUNING)

    def _parts(self, setting: Setting, seed: int, tuning: bool) -> Parts:
        images, labels = self.data(train=True)
        held, used = split(len(labels))
        pick = partial(of, (images, labels))
        if setting.images is not None:
            learnt = pick(used[: setting.images])
            return Parts(learnt, learnt, pick(held), self.images_tested(tuning))
        new = used[labels[used] >= FIRST]
        new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(seed))]
        few = of_each(new, labels, range(FIRST, 10), setting.each)
        test = self.data(train=False)
        return Parts(
            pick(used[labels[used] < FIRST]), pick(few), pick(held[labels[held] >= FIRST]),
            pick(new[~torch.isin(new, few)][:5000]) if tuning else of(test, test[1] >= FIRST),
        )  # fmt: skip

    def images_tested(self, tuning: bool) -> Labelled:
        """The test split; where settings are chosen, the images that validate."""
        if not tuning:
            return self.data(train=False)
        learnt = self.data(train=True)
        return of(learnt, split(len(learnt[1]))[0])

    def base(self, setting: Setting, parts: Parts, seed: int) -> nn.Sequential:
        """The network that is trained on; with a new last layer where the classes are others.

        All that is random comes after it and from the seed: its own training has another.
        """
        weights = self.work / f"base-{setting.base}.safetensors"
        epochs = setting.base_epochs
        if torch.cuda.is_available() and not weights.is_file():
            save_weights(self._captured_base(parts, epochs), weights)
        network = train_plainly(self.make, *parts.before, epochs, weights=weights).cpu()
        assert isinstance(network, nn.Sequential)
        torch.manual_seed(seed)
        if setting.transfers:
            network[-1].reset_parameters()  # type: ignore[operator]
        return network

    def _captured_base(self, parts: Parts, epochs: int) -> dict[str, Tensor]:
        """The same training as ``train_plainly``'s in batches of ours, as a CUDA graph."""
        torch.manual_seed(0)
        course = Course("plain", self.make(), self.flow, torch.device("cuda"))
        steps = epochs * (len(parts.before[1]) // self.batch)
        task = Task(parts.before, parts.validation, steps, 0.2, self.batch)
        torch.manual_seed(0)
        course.begin(self.make(), task.learnt, 0)
        trained: Trained = alone(course.train(task))
        print("base", trained.facts, flush=True)
        return trained.network.state_dict()

    def corruptions(self, rows: Sequence[str], until: float) -> None:
        """Add to the runs of all classes what their networks make of corrupted test images."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for path in sorted(self.work.glob("*.json"), key=lambda path: path.stem[-1]):
            result = json.loads(path.read_text())
            wanted = result["row"] in rows and not SETTINGS[result["setting"]].transfers
            if wanted and "corruptions" not in result and time.monotonic() < until:
                network = self.make().to(device)
                network = network.to(memory_format=torch.channels_last)
                network.load_state_dict(load_file(path.with_suffix(".safetensors")))
                data = self.damaged(result["seed"] >= TUNING, device)
                result["corruptions"] = round(mean(accuracy(network, one) for one in data), 2)
                keep(path, result)

    @cache  # noqa: B019
    def damaged(self, tuning: bool, device: torch.device) -> list[Labelled]:
        """Images under each corruption at each severity, on the device."""
        name, count = ("validation", 500) if tuning else ("test", 2000)
        images, labels = (part[:count] for part in self.images_tested(tuning))
        files = CorruptionFiles(self.work / name)
        files.write(images, labels, device=device)
        found = [files.read(name, s, 0, count) for name in STANDARD for s in SEVERITIES]
        return [(x.to(device), y.to(device)) for x, y in found]


@dataclass(frozen=True)
class Parts:
    """The images of a fine-tuning: what the base learnt, and what it goes on with."""

    before: Labelled
    learnt: Labelled
    validation: Labelled
    tested: Labelled


def split(count: int) -> tuple[Tensor, Tensor]:
    """Which training images validate, and which are learnt from."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:VALIDATION], order[VALIDATION:]


def main_branch(network: nn.Module) -> dict[str, Tensor]:
    """Its weights, without the statistics that split BatchNorm keeps for adversarial images."""
    state = network.state_dict()
    return {name: v for name, v in state.items() if ".auxiliary." not in name}


def main() -> None:
    parser = arguments("runs/finetune")
    parser.add_argument("--width", type=int, default=16, help="of the ResNet-18; 64 is the usual")
    parser.add_argument("--small", action="store_true", help="the ResNet-10 in its place")
    parser.add_argument("--batch", type=int, default=BATCH, help="images a step")
    parser.add_argument("--corruptions", action="store_true", help="of the networks there are")
    options = parser.parse_args()
    prepare()
    keep_memory()
    width = 0 if options.small else options.width
    flow = flow_asked_for(options)
    study = FineTuning(options.work, flow, width, options.batch, options.data)
    if options.unpack:
        study.unpack(options.unpack)
    if options.corruptions:
        until = time.monotonic() + 60 * options.minutes
        study.corruptions(options.only or [*ROWS, *AS_LONG], until)
    elif options.record:
        print(record(options.record, study.facts | study.result(options.seeds, RIVALS)))
    else:
        few = [name for name in SETTINGS if (name == "few") == options.small]
        options.settings = options.settings or few
        run_all(study, FEW if options.small else TABLE, options)


if __name__ == "__main__":
    main()
