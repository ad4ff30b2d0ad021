"""Models from the few words of a command line."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision import models

from ijsat_aug.models import first_logits, load_model
from ijsat_aug.training import convert_split_batchnorm

FILE = """
from torch import nn
def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def wrong():
    return 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "my_model.py").write_text(FILE)
    return tmp_path / "my_model.py"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_function_of_a_file_and_its_weights(file, suffix, wrapped) -> None:
    state = {
        f"{'module.' * wrapped}1.weight": torch.randn(10, 64),
        f"{'module.' * wrapped}1.bias": torch.ones(10),
    }
    path = file.with_suffix(suffix)
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, "epoch": 3} if wrapped else state, path)
    model = load_model(f"{file}:make", path)
    assert not model.training
    assert torch.equal(model[1].weight, next(iter(state.values())))


def test_what_training_adds_to_a_model_is_left_out(tmp_path) -> None:
    file = tmp_path / "split_model.py"
    file.write_text(
        "from torch import nn\n"
        "net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), "
        "nn.Linear(72, 10))\n"
    )
    trained = convert_split_batchnorm(load_model(f"{file}:net"))
    nn.init.ones_(trained[1].weight)
    average = AveragedModel(trained)
    average.module[1].weight.data.fill_(2)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": trained.state_dict(), "ema": average.state_dict(), "epoch": 3}, path)
    for weights, value in ((path, 1), (f"{path}:ema", 2)):
        model = load_model(f"{file}:net", weights)
        assert torch.equal(model[1].weight, torch.full((2,), value))
    with pytest.raises(ValueError, match="nothing under the key 'emma'"):
        load_model(f"{file}:net", f"{path}:emma")
    wanted = load_model(f"{file}:net", path).state_dict()
    torch.save({f"{key}.auxiliary.x": value for key, value in wanted.items()}, path)
    with pytest.raises(ValueError, match="does not fit the model"):
        load_model(f"{file}:net", path)


def test_a_module_of_the_current_folder(file, monkeypatch) -> None:
    monkeypatch.chdir(file.parent)
    assert isinstance(load_model("my_model:make"), nn.Sequential)


def test_a_torchvision_name(tmp_path) -> None:
    own = models.resnet18(num_classes=7)
    torch.save(own.state_dict(), tmp_path / "w.pth")
    model = load_model("resnet18", tmp_path / "w.pth")
    assert model.fc.out_features == 7
    assert torch.equal(model.conv1.weight, own.conv1.weight)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_a_torchvision_model_with_a_switch_that_no_weights_tell(tmp_path) -> None:
    own = models.googlenet(num_classes=7, aux_logits=False, init_weights=False)
    torch.save(own.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="whether its googlenet was built with transform_input"):
        load_model("googlenet", tmp_path / "w.pth")


def test_a_safetensors_file_of_torchvision_in_its_own_order(tmp_path) -> None:
    own = models.resnet18(num_classes=7)
    save_file(own.state_dict(), tmp_path / "w.safetensors")
    assert load_model("resnet18", tmp_path / "w.safetensors").fc.out_features == 7


def test_a_model_whose_names_look_like_a_wrapper(tmp_path, monkeypatch) -> None:
    (tmp_path / "helper_of_test.py").write_text("WIDTH = 64")
    file = tmp_path / "dataclass_model.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\nfrom torch import nn\nimport helper_of_test\n"
        "@dataclass\nclass Config:\n    width: int = helper_of_test.WIDTH\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n        self.model = nn.Linear(Config().width, 10)\n"
        "def make(): return Net()\n"
    )
    own = load_model(f"{file}:make")
    torch.save(own.state_dict(), tmp_path / "w.pt")
    again = load_model(f"{file}:make", tmp_path / "w.pt")
    assert torch.equal(again.model.weight, own.model.weight)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.module.", "model._orig_mod.", "module.module.", "model.module.", "net."]
)
def test_wrappers_in_wrappers(file, prefix) -> None:
    """torch.compile(DDP(net)), a LightningModule's compiled self.model, AveragedModel of DDP."""
    state = {"1.weight": torch.randn(10, 64), "1.bias": torch.ones(10)}
    path = file.with_suffix(".pt")
    torch.save({prefix + name: value for name, value in state.items()}, path)
    assert torch.equal(load_model(f"{file}:make", path)[1].weight, state["1.weight"])


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("kept", [0, 0.5, None])
def test_damaged_weights(file, tmp_path, name, kept) -> None:
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)({"w": torch.ones(500)}, path)
    whole = path.read_bytes()
    path.write_bytes(b"engine" if kept is None else whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"cannot be read|no weights at all"):
        load_model(f"{file}:make", path)


def test_the_users_mistakes(file, tmp_path) -> None:
    torch.save({"1.weight": torch.ones(10, 3)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for source, weights, kind, message in (
        (f"{file}:nothing", None, ValueError, "no function 'nothing'"),
        (f"{file}:wrong", None, TypeError, "must return a module, got int"),
        ("absent.py:make", None, FileNotFoundError, "absent.py does not exist"),
        ("absent_module:make", None, ValueError, "no module 'absent_module'"),
        ("resnet19", None, ValueError, "neither 'module:function' nor"),
        ("resnet18", None, ValueError, "without weights"),
        (f"{file}:make", tmp_path / "absent.pt", FileNotFoundError, "does not exist"),
        (f"{file}:make", tmp_path / "other.pt", ValueError, "does not fit the model"),
        (f"{file}:make", tmp_path / "list.pt", ValueError, "no state dict"),
    ):
        with pytest.raises(kind, match=message):
            load_model(source, weights)


def test_what_a_module_misses_is_told_by_its_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "zoo_of_mine.py").write_text("import zoo\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'zoo'"):
        load_model("zoo_of_mine:make")


def test_nothing_is_unpickled(file, tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"1.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="tensors alone"):
        load_model(f"{file}:make", tmp_path / "evil.pt")


def test_a_function_may_import_what_lies_beside_it(tmp_path) -> None:
    (tmp_path / "beside_it.py").write_text("from torch import nn\nnet = nn.Linear(2, 2)\n")
    file = tmp_path / "late.py"
    file.write_text("def make():\n    from beside_it import net\n    return net\n")
    assert isinstance(load_model(f"{file}:make"), nn.Linear)


def test_a_size_that_it_does_not_take_is_told_whatever_it_raises() -> None:
    vit = models.VisionTransformer(32, 16, 1, 1, 8, 8)  # asserts
    norm = nn.Sequential(nn.BatchNorm1d(3), nn.Flatten())  # ValueError
    for model in (vit, norm):
        with pytest.raises(ValueError, match="the model does not take images of 3x16x16"):
            first_logits(model, torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("source", [":make", "my_code.py:"])
def test_half_a_place_is_none(source) -> None:
    with pytest.raises(ValueError, match=r"must be 'file\.py:function' or 'module:function'"):
        load_model(source)


def test_a_file_may_be_called_as_a_module(tmp_path) -> None:
    import json

    place = tmp_path / "json.py"
    place.write_text("import torch\nnet = torch.nn.Linear(2, 2)\n")
    assert isinstance(load_model(f"{place}:net"), torch.nn.Linear)
    assert sys.modules["json"] is json
    place.write_text("raise RuntimeError('broken')")
    before = dict(sys.modules)
    for name in ("json", "other"):
        broken = tmp_path / f"{name}.py"
        broken.write_text("raise RuntimeError('broken')")
        with pytest.raises(RuntimeError, match="broken"):
            load_model(f"{broken}:net")
    assert set(sys.modules) <= set(before)


def test_a_model_may_import_what_lies_beside_it_when_it_is_called(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "late_of_test.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        from late_of_test import double\n"
        "        return double(x)\n"
    )
    model = load_model(f"{tmp_path}/net.py:Net")
    assert sys.path[-1] == str(tmp_path)  # behind all others
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize("order", [("model", "state_dict"), ("state_dict", "model")])
def test_wrappers_in_any_order(order, file, tmp_path) -> None:
    net = load_model(f"{file}:make")
    inner, outer = order
    torch.save({outer: {inner: net.state_dict()}}, tmp_path / "a.pth")
    again = load_model(f"{file}:make", tmp_path / "a.pth")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
