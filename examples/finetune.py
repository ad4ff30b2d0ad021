"""Fine-tune a trained network on few images of new classes: plainly, and with one line more.

Run:  python examples/finetune.py                      (scikit-learn's digits, a minute)
      python examples/finetune.py --data-path FOLDER   (with FOLDER/train and FOLDER/val)

Without a folder a small network that knows the digits 0 to 4 learns 5 to 9 from five images each,
some times over. With one it is a ResNet of torchvision, with ImageNet's weights and a new head.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2

from ijsat_aug import AugmentedLoader, JointSpaceAdv

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Images = Dataset[Any]
Augment = Callable[[nn.Module], Callable[[Any], Any]]


def small_network() -> nn.Sequential:
    """A network for the digits, but for its head."""
    layers: list[nn.Module] = []
    for channels, width, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [
            nn.Conv2d(channels, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))


def tune(net: nn.Module, loader: Iterable[Any], epochs: int, rate: float) -> None:
    """Train a network for some epochs, its learning rate falling to nothing."""
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    device = next(net.parameters()).device
    net.train()
    for _ in range(epochs):
        for x, y in loader:
            loss = nn.functional.cross_entropy(net(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


@torch.inference_mode()
def accuracy(net: nn.Module, loader: Iterable[Any]) -> float:
    """Percent right, as it is shown: the gains are those of what stands there."""
    net.eval()
    device = next(net.parameters()).device
    right = torch.cat([net(x.to(device)).argmax(1).cpu() == y for x, y in loader])
    return round(100 * float(right.float().mean()), 1)


def compare(base: nn.Module, train: Images, val: Images, augment: Augment, epochs: int) -> float:
    """How much better a copy of a network becomes with the line than a copy without it."""
    scores = []
    for with_line in (False, True):
        net = copy.deepcopy(base)
        loader: Any = DataLoader(train, batch_size=25, shuffle=True)
        if with_line:
            loader = AugmentedLoader(loader, augment(net), next(net.parameters()).device)
        tune(net, loader, epochs, 0.02)
        scores.append(accuracy(net, DataLoader(val, batch_size=250)))
    print(f"plainly {scores[0]:.1f} %, with moves along the manifold {scores[1]:.1f} %", flush=True)
    return scores[1] - scores[0]


def digits(options: argparse.Namespace) -> None:
    """New digits for a network that knows some."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)
    known = y < 5
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(x[known], y[known]), batch_size=32, shuffle=True)
    base = small_network()
    tune(base, loader, 10, 0.05)
    x, y = x[~known], y[~known] - 5
    gains = []
    for seed in range(options.repeats):
        torch.manual_seed(seed)
        order = torch.randperm(len(y))
        chosen = torch.cat([order[y[order] == c][:5] for c in range(5)])
        rest = order[~torch.isin(order, chosen)]
        base[-1] = nn.Linear(64, 5)
        train, val = (TensorDataset(x[part], y[part]) for part in (chosen, rest))
        gains.append(
            compare(base, train, val, lambda net: JointSpaceAdv(net, "digits", eps=0), epochs=60)
        )
    print(f"{statistics.mean(gains):+.1f} points on average")


def folders(options: argparse.Namespace) -> None:
    """New pictures for a network of torchvision."""
    end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    size = options.size
    crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *end])
    whole = v2.Compose([v2.Resize(size), v2.CenterCrop(size), *end])
    train = ImageFolder(str(options.data_path / "train"), crop)
    val = ImageFolder(str(options.data_path / "val"), whole)
    net: Any = get_model(options.model, weights="DEFAULT")
    torch.manual_seed(0)
    net.fc = nn.Linear(net.fc.in_features, len(train.classes))
    net.to("cuda" if torch.cuda.is_available() else "cpu")

    def moves(net: nn.Module) -> JointSpaceAdv:
        return JointSpaceAdv(net, "cifar10-fast", eps=0, mean=MEAN, std=STD)

    compare(net, train, val, moves, options.epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-path", type=Path, help="folder with train/ and val/")
    parser.add_argument("--model", default="resnet18", help="a ResNet of torchvision")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=10, help="on a folder")
    parser.add_argument("--repeats", type=int, default=5, help="of the digits")
    options = parser.parse_args()
    (digits if options.data_path is None else folders)(options)


if __name__ == "__main__":
    main()
