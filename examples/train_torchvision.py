"""An ordinary torchvision training script, and the line that makes its batches adversarial.

Run:  python examples/train_torchvision.py                       (scikit-learn's digits, 3 minutes)
      python examples/train_torchvision.py --data-path FOLDER    (with FOLDER/train and FOLDER/val)
      torchrun --nproc-per-node 8 examples/train_torchvision.py --data-path FOLDER --model resnet50

It shows where the line and its transform go: after the model exists, before the loop. All else is
what such scripts have anyway: TrivialAugment, RandomErasing, ImageNet's mean and std, label
smoothing, EMA, mixed precision, DDP, resume. Take these lines away, and it trains plainly.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sized
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2

from ijsat_aug import AugmentedLoader, RobustMixup

NORMALIZE: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Digits(Dataset[tuple[Any, int]]):
    """Scikit-learn's digits as RGB pictures, when there are no others."""

    classes = tuple("0123456789")

    def __init__(self, transform: v2.Transform, train: bool) -> None:
        from sklearn.datasets import load_digits

        digits, part = load_digits(), slice(1500) if train else slice(1500, None)
        levels = (digits.images[part] * 15.9375).astype("uint8")
        self.pictures = [Image.fromarray(level).convert("RGB") for level in levels]
        self.labels = [int(label) for label in digits.target[part]]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def transforms(options: argparse.Namespace, train: bool) -> v2.Transform:
    """What happens to one picture, ending with a normalised tensor."""
    end: list[nn.Module] = [
        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(**NORMALIZE),
    ]  # fmt: skip
    if not train:
        size = options.size
        return v2.Compose([v2.Resize(size), v2.CenterCrop(size), *end])
    return v2.Compose(
        [
            v2.RandomResizedCrop(options.size, scale=(options.smallest_crop, 1.0), antialias=True),
            v2.RandomHorizontalFlip(0.5 if options.data_path else 0.0),  # digits have a side
            v2.TrivialAugmentWide(),
            *end,
            v2.RandomErasing(options.random_erase),
            v2.ToPureTensor(),
        ]
    )


def datasets(options: argparse.Namespace) -> tuple[Any, Any]:
    """Training and validation images."""
    train, val = (transforms(options, part) for part in (True, False))
    if options.data_path is None:
        return Digits(train, train=True), Digits(val, train=False)
    folder = options.data_path
    return ImageFolder(str(folder / "train"), train), ImageFolder(str(folder / "val"), val)


def warm_cosine(step: int, total: int) -> float:
    """Share of the learning rate: up over a tenth of the steps, then down a cosine."""
    warm = max(total // 10, 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * min((step - warm) / max(total - warm, 1), 1)))


def train_epoch(
    model: nn.Module, ema: AveragedModel, loader: Any, criterion: nn.Module, optimizer: Any,
    schedule: Any, scaler: Any, device: torch.device, dtype: torch.dtype | None,
) -> tuple[float, float]:  # fmt: skip
    """Mean loss and images per second of one pass over the data."""
    model.train()
    begin, total, images = time.perf_counter(), torch.zeros((), device=device), 0
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = criterion(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        ema.update_parameters(model)
        total += loss.detach() * len(x)
        images += len(x)
    return float(total) / images, images / (time.perf_counter() - begin)


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Any, device: torch.device) -> float:
    """Share of right answers, over all processes."""
    model.eval()
    counts = torch.zeros(2, device=device)
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        right = (model(x).argmax(1) == y).sum()
        counts += torch.stack([right, torch.tensor(len(y), device=device)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-path", type=Path, help="folder with train/ and val/")
    parser.add_argument("--model", default="resnet18", help="any classifier of torchvision")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64, help="of each process")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--smallest-crop", type=float, default=0.5)
    parser.add_argument("--random-erase", type=float, default=0.1)
    parser.add_argument("--ema-decay", type=float, default=0.98)
    parser.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/torchvision"))
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    distributed = "RANK" in os.environ
    device = torch.device(options.device)
    if distributed:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.amp]

    train, val = datasets(options)
    sampler: Any = DistributedSampler(train) if distributed else None
    common = {"num_workers": options.workers, "pin_memory": device.type == "cuda"}
    data: Any = DataLoader(
        train, options.batch_size, shuffle=sampler is None, sampler=sampler, **common
    )
    share = Subset(val, range(rank, len(cast(Sized, val)), processes))
    val_loader: Any = DataLoader(share, options.batch_size, **common)

    classes = len(train.classes)
    torch.manual_seed(options.seed)
    net: nn.Module = get_model(options.model, num_classes=classes).to(device)
    plain = net
    average = get_ema_multi_avg_fn(options.ema_decay)
    ema = AveragedModel(net, multi_avg_fn=average, use_buffers=True)
    if distributed:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if device.type == "cuda" else net
        net = DistributedDataParallel(net, [device.index] if device.type == "cuda" else None)
    criterion = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    optimizer = torch.optim.SGD(
        net.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay
    )
    total = options.epochs * len(data)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_cosine, total=total))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts: dict[str, Any] = {
        "model": plain, "ema": ema, "optimizer": optimizer, "schedule": schedule,
        "scaler": scaler,
    }  # fmt: skip
    first = 0
    if options.resume is not None:
        state = torch.load(options.resume, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["epoch"] + 1

    # Other augmentations in every process, and when it goes on.
    torch.manual_seed((options.seed + first) * processes + rank)

    # Ours, beside the import above: mixup, whose blends are attacked in the second half.
    mix = RobustMixup.preset("accuracy", net, num_classes=classes, amp_dtype=dtype, **NORMALIZE)
    data = AugmentedLoader(data, mix, device, epochs=(options.epochs // 2, None))
    data.set_epoch(first)  # so that a resumed AugmentedLoader knows where it is

    for epoch in range(first, options.epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        loss, rate = train_epoch(
            net, ema, data, criterion, optimizer, schedule, scaler, device, dtype
        )
        scores = [accuracy(m, val_loader, device) for m in (plain, ema.module)]
        if rank == 0:
            state = {name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch}
            save(options.out / "checkpoint.pt", state)
            print(
                f"epoch {epoch + 1}/{options.epochs} · {len(data)} steps · loss {loss:.3f} · "
                f"{rate:.0f} images/s · accuracy {scores[0]:.1%}, averaged {scores[1]:.1%}",
                flush=True,
            )
    if distributed:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
