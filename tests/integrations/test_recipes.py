"""Every recipe of docs/recipes is run on the real framework, as it stands there."""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ijsat_aug import AugmentedLoader, JointSpaceAdv, RobustMixup
from tests.conftest import small_network

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore"),  # of the frameworks
]
RECIPES = Path(__file__).resolve().parents[2] / "docs" / "recipes"
OURS = {
    "AugmentedLoader": AugmentedLoader,
    "JointSpaceAdv": JointSpaceAdv,
    "nn": nn,
    "torch": torch,
}
OURS["RobustMixup"] = RobustMixup
REASON = 'needs pip install "ijsat-aug[integrations]"'


def recipe(name: str, part: int = 0, **names: Any) -> dict[str, Any]:
    """Run the code of a recipe, or a later part of it; what it defines."""
    text = (RECIPES / f"{name}.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, flags=re.S)[part]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 6, f"{name} has {len(lines)} lines"
    space = {**OURS, **names}
    exec(compile(code, f"{name}.md", "exec"), space)
    return space


@pytest.fixture
def loader(digits, labels) -> DataLoader:
    return DataLoader(TensorDataset(digits[:50], labels[:50]), batch_size=20)


def test_every_recipe_is_tested() -> None:
    own = Path(__file__).read_text()
    for path in RECIPES.glob("*.md"):
        assert f'recipe("{path.stem}"' in own or f'recipe(\n        "{path.stem}"' in own


def test_lightning(loader) -> None:
    lightning = pytest.importorskip("lightning", reason=REASON)
    seen: dict[str, list[int]] = {"train": [], "val": []}

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_network()

        def training_step(self, batch, index):
            seen["train"].append(batch[1].ndim)
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, index):
            seen["val"].append(batch[1].ndim)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    module = recipe("lightning", Classifier=Classifier)["Lit"]()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    assert seen["train"] == [2, 2, 2]
    assert set(seen["val"]) == {1}
    assert int(module.net[1].num_batches_tracked) == 3
    assert not any("augment" in name for name in module.state_dict())


def test_accelerate(loader) -> None:
    accelerate = pytest.importorskip("accelerate", reason=REASON)
    net = small_network()
    before = net[0].weight.detach().clone()
    found = recipe(
        "accelerate", accelerator=accelerate.Accelerator(cpu=True), net=net, loader=loader,
        optimizer=torch.optim.SGD(net.parameters(), 0.1),
    )  # fmt: skip
    assert found["y"].shape == (10, 10)
    assert int(net[1].num_batches_tracked) == 3
    assert not torch.equal(net[0].weight, before)


class Pictures(Dataset):
    """Real photographs as PIL images, which timm's loader wants."""

    def __init__(self, photographs: Tensor) -> None:
        from torchvision.transforms.v2.functional import to_pil_image

        self.pictures = [to_pil_image(p) for p in photographs]
        self.transform = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int):
        return self.transform(self.pictures[index]), index % 5


@pytest.mark.parametrize("prefetcher", [False, True])
def test_timm(prefetcher, photographs) -> None:
    timm = pytest.importorskip("timm", reason=REASON)
    from timm.data import create_loader

    device = torch.device("cpu")
    model = timm.create_model("resnet10t", num_classes=5)
    data_config = timm.data.resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    loader_train = create_loader(
        Pictures(photographs), (3, 32, 32), batch_size=7, is_training=True, num_workers=0,
        mean=data_config["mean"], std=data_config["std"], use_prefetcher=prefetcher, device=device,
        auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.2, persistent_workers=False,
    )  # fmt: skip
    found = recipe(
        "timm", model=model, args=Namespace(num_classes=5), data_config=data_config,
        loader_train=loader_train, device=device,
    )  # fmt: skip
    assert len(found["loader_train"]) == len(loader_train)
    if prefetcher:
        found["loader_train"].mixup_enabled = False  # as train.py switches its own mixup off
        assert loader_train.mixup_enabled is False
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    steps = 0
    for x, t in found["loader_train"]:
        loss = torch.nn.functional.cross_entropy(model(x), t)  # train.py's with --smoothing 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    assert steps == len(loader_train)
    counters = {int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    assert counters == {steps}


def test_hugging_face(photographs, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason=REASON)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5, layer_type="basic"
    )
    model = transformers.ResNetForImageClassification(config)
    rows = [{"pixel_values": p, "labels": i % 5} for i, p in enumerate(photographs)]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=3, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    found = recipe("huggingface", Trainer=transformers.Trainer, model=model)
    trainer = found["AugmentedTrainer"](model, options, train_dataset=rows, eval_dataset=rows)
    seen = []

    def record(module: nn.Module, args: tuple, inputs: dict) -> None:
        if "labels" in inputs:  # the attack asks without
            seen.append((module.training, inputs["pixel_values"].detach().clone()))

    model.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train()
    images = [x for training, x in seen if training]
    assert len(images) == 3
    clean = torch.stack([row["pixel_values"] for row in rows])
    nearest = torch.cdist(images[0].flatten(1), clean.flatten(1), p=float("inf")).amin(1)
    assert (nearest > 1 / 255).all()  # attacked
    assert (nearest <= 2 / 255 + 1e-6).all()
    seen.clear()
    trainer.evaluate()
    assert torch.equal(torch.cat([x for _, x in seen]), clean)

    options.gradient_accumulation_steps = 2
    model.config.problem_type = None  # which the model found out by the class numbers above
    names = {"model": model, "options": options, "rows": rows}
    blends = recipe("huggingface", 1, **{**found, **names})
    found["AugmentedTrainer"]._prepare_inputs.__globals__["augment"] = blends["augment"]
    trainer = blends["trainer"]
    trainer.eval_dataset = rows
    loss = trainer.train().training_loss
    assert abs(loss - torch.tensor(5.0).log()) < 0.5  # cross-entropy of five classes, not binary
    assert model.config.problem_type is None
    assert trainer.evaluate()["eval_loss"] > 1


def test_fastai(digits, labels) -> None:
    pytest.importorskip("fastai", reason=REASON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastai.callback.core import Callback
        from fastai.data.core import DataLoaders
        from fastai.learner import Learner

    data = TensorDataset(digits[:40], labels[:40])
    loaders = DataLoaders(DataLoader(data, batch_size=20), DataLoader(data, batch_size=20))
    net = small_network()
    found = recipe("fastai", Callback=Callback, augment=RobustMixup(net, num_classes=10))
    seen = []

    class Loss(nn.CrossEntropyLoss):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            seen.append((net.training, target.ndim))
            return super().forward(logits, target)

    learn = Learner(loaders, net, loss_func=Loss(), cbs=found["Augment"]())
    learn.fit(1)
    assert [ndim for training, ndim in seen if training] == [2, 2]
    assert {ndim for training, ndim in seen if not training} == {1}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_model_of_fabric(precision, network, digits, labels) -> None:
    fabric = pytest.importorskip("lightning.fabric", reason=REASON)
    sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    runner = fabric.Fabric(accelerator="cpu", devices=1, precision=precision)
    model, optimizer = runner.setup(network, sgd)
    mix = RobustMixup(model, num_classes=10)
    assert mix.model is network
    before = network[0].weight.clone()
    for _ in range(2):
        x, y = mix(digits[:16], labels[:16])
        assert (x != digits[:16]).any()
        runner.backward(torch.nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(network[0].weight, before)
