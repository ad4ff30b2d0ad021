"""The user's model, from the few words that a command line has."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["first_logits", "load_model"]

_WRAPPERS = ("model", "state_dict", "net", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")


def load_model(source: str, weights: str | Path | None = None) -> nn.Module:
    """A model in eval mode.

    Args:
        source: ``"package.module:function"`` or ``"file.py:function"``, a function without
            arguments that returns the model, or the model itself; or the name of a torchvision
            classifier.
        weights: A state dict, as ``.safetensors`` or as a ``.pt`` / ``.pth`` file of tensors alone
            (nothing else is unpickled); ``"file.pt:ema"`` is that under the key ``ema``. What DDP,
            compile, Lightning, ``AveragedModel`` and split BatchNorm add to a model is left out.
            For a torchvision model also ``"DEFAULT"``, its own.

    Example:
        >>> model = load_model("torch.nn:Flatten")
        >>> model, model.training
        (Flatten(start_dim=1, end_dim=-1), False)
    """
    place, colon, name = source.rpartition(":")
    if colon and not (place and name):
        raise ValueError(f"{source!r} must be 'file.py:function' or 'module:function'.")
    if colon:
        model = _call(place, name)
        if weights is not None:
            _fill(model, _state(weights), weights)
    else:
        model = _torchvision(source, weights)
    return model.eval()


def first_logits(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """What a model answers to its first batch, which may be of a size that it does not take.

    Example:
        >>> first_logits(torch.nn.Flatten(), torch.zeros(2, 1, 1, 3)).shape
        torch.Size([2, 3])
        >>> first_logits(torch.nn.Linear(8, 2), torch.zeros(2, 1, 1, 3))
        Traceback (most recent call last):
        ...
        ValueError: the model does not take images of 1x1x3: ...
    """
    try:
        return model(batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "x".join(map(str, batch.shape[1:]))
        raise ValueError(f"the model does not take images of {size}: {error}") from error


def _call(place: str, name: str) -> nn.Module:
    file = Path(place).expanduser()
    with _importable(file.parent if place.endswith(".py") else Path.cwd()):
        module = _import_file(file) if place.endswith(".py") else _import(place)
        make = getattr(module, name, None)
        if not callable(make):
            raise ValueError(f"{place} has no function {name!r}.")
        model = make if isinstance(make, nn.Module) else make()  # it may import as it runs
    if not isinstance(model, nn.Module):
        raise TypeError(f"{place}:{name}() must return a module, got {type(model).__name__}.")
    return model


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"there is no module {name!r} to import a model from.") from error


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    name = f"_file_{path.stem}"  # the file may be called as a module that others import
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """As with ``python file.py`` and ``python -m``: a console script does not look there itself."""
    place, before = str(folder.resolve()), list(sys.path)
    sys.path.insert(0, place)
    try:
        yield
    finally:
        # Behind all others it stays: a model may import beside itself in its forward pass.
        sys.path[:] = before if place in before else [*before, place]


def _torchvision(name: str, weights: str | Path | None) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(
            f"{name!r} is neither 'module:function' nor a classifier of torchvision "
            "(resnet18, convnext_tiny, vit_b_16, ...)."
        )
    if weights is None:
        raise ValueError(f"{name} without weights knows nothing: pass a file, or DEFAULT.")
    if str(weights) == "DEFAULT":
        model: nn.Module = models.get_model(name, weights="DEFAULT")
        return model
    state = _state(weights)
    model = models.get_model(name)
    if hasattr(model, "transform_input"):
        raise ValueError(
            f"a file of weights does not say whether its {name} was built with transform_input: "
            "build it in a function and name that, 'file.py:function'."
        )
    last = list(model.state_dict())[-1]  # the classifier's bias; a file may have another order
    state = _of_the_model(state, set(model.state_dict()))
    if last not in state:
        raise ValueError(f"{weights} holds no {last!r}, so that it does not fit {name}.")
    model = models.get_model(name, num_classes=len(state[last]))
    _fill(model, state, weights)
    return model


def _state(weights: str | Path) -> dict[str, Tensor]:
    path, key = Path(weights).expanduser(), None
    if not path.exists() and ":" in path.name:
        name, _, key = path.name.rpartition(":")
        path = path.with_name(name)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file of weights in it.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    found = _read(path)
    if key is not None:
        if not (isinstance(found, Mapping) and key in found):
            raise ValueError(f"{path} holds nothing under the key {key!r}.")
        found = found[key]
    while isinstance(found, Mapping):
        inner = next((n for n in _WRAPPERS if isinstance(found.get(n), Mapping)), None)
        if inner is None:
            break
        found = found[inner]
    if not (isinstance(found, Mapping) and found and _all_tensors(found)):
        raise ValueError(f"{path} holds no state dict of tensors.")
    return dict(found)


def _read(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors alone, which could run code, or no weights at all: "
            "save the model's state_dict()."
        ) from error
    except (RuntimeError, KeyError, IndexError, EOFError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read: it is damaged, or no file of torch.save or safetensors."
        ) from error


def _all_tensors(found: Mapping[str, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in found.values())


def _fill(model: nn.Module, state: dict[str, Tensor], weights: str | Path) -> None:
    state = _of_the_model(state, set(model.state_dict()))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).split("\n")[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{weights} does not fit the model: {first}") from error


def _of_the_model(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """The state without what wrappers put before its names and beside its tensors."""
    if "n_averaged" not in wanted:  # of AveragedModel
        state = {key: value for key, value in state.items() if key != "n_averaged"}
    while state and not wanted & set(state):  # one wrapper in another: one prefix after the other
        found = [p for p in _PREFIXES if all(key.startswith(p) for key in state)]
        if not found:
            break
        state = {key[len(found[0]) :]: value for key, value in state.items()}
    return {key: value for key, value in state.items() if not _of_a_twin(key, wanted)}


def _of_a_twin(key: str, wanted: set[str]) -> bool:
    """Whether a name is that of the auxiliary half of a split BatchNorm, which a model has not."""
    place, twin, rest = f".{key}".rpartition(".auxiliary.")
    return bool(twin) and key not in wanted and f"{place}.{rest}"[1:] in wanted
