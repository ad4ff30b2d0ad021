"""Flow checkpoints: a folder of safetensors and JSON, verified before use, never unpickled."""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import write_together
from .fold import freeze
from .frozen import FrozenGlow, Memory, check_options
from .glow import GlowConfig
from .registry import CheckpointError, locate

__all__ = ["CheckpointError", "convert_checkpoint", "load_flow", "load_state", "save_flow"]

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
TRAINING = "training/state.safetensors"  # of a training that can go on
_KEYS = {"architecture", "name", "data", "license", "metrics", "calibration", "training"}

_shared: weakref.WeakValueDictionary[tuple[object, ...], FrozenGlow] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def load_flow(
    source: str | Path,
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    sha256: str | None = None,
    compute_dtype: torch.dtype | None = None,
    memory: Memory = "tape",
) -> FrozenGlow:
    """Load a frozen flow, ready for :class:`JointSpaceAdv` and verified by its checksum.

    The same file on the same device is one shared object for all callers.

    Args:
        source: A name of ``pretrained/`` (``"digits"``), a checkpoint folder, or the id of a
            Hugging Face repository (``"owner/name"``).
        device: Where the flow shall run.
        revision: Branch, tag or commit of a Hugging Face repository.
        sha256: Checksum that ``model.safetensors`` must have, all 64 digits.
        compute_dtype: Precision of the coupling networks, such as ``torch.bfloat16``.
        memory: See :meth:`FrozenGlow.to`.

    Example:
        >>> flow = load_flow("digits")
        >>> flow.shape
        (1, 8, 8)
        >>> load_flow("digits") is flow
        True
    """
    check_options(compute_dtype, memory)
    folder, card, config, weights = _found(source, revision, sha256)
    where = torch.empty(0, device=device).device
    key = (
        card["weights"]["sha256"],
        json.dumps(card, sort_keys=True),
        where,
        compute_dtype,
        memory,
    )
    with _lock:
        flow = _shared.get(key)
        if flow is None:
            try:
                flow = freeze(
                    config, _tensors(folder, weights), info=card, device=where,
                    compute_dtype=compute_dtype, memory=memory,
                )  # fmt: skip
            except ValueError as error:
                raise CheckpointError(
                    f"{folder / WEIGHTS} does not fit {CONFIG}: {error}"
                ) from error
            _shared[key] = flow
        return flow


def load_state(
    source: str | Path, *, revision: str | None = None, sha256: str | None = None
) -> tuple[GlowConfig, dict[str, Tensor]]:
    """The config and normflows state dict of a checkpoint, to train it further or to study it.

    Args:
        source: Name, folder or Hub id, as of :func:`load_flow`.
        revision: Of a Hub repository.
        sha256: That the weights must have.

    Example:
        >>> from ijsat_aug.flows.glow import build_glow
        >>> config, state = load_state("digits")
        >>> build_glow(config).load_state_dict(state)
        <All keys matched successfully>
    """
    folder, _, config, weights = _found(source, revision, sha256)
    return config, _tensors(folder, weights)


def save_flow(
    folder: str | Path,
    config: GlowConfig,
    state: Mapping[str, Tensor],
    *,
    name: str | None = None,
    data: str = "unspecified",
    license: str = "unspecified",
    metrics: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder; nothing is touched before all of it is ready.

    Args:
        folder: Where; other files in it are kept.
        config: The network.
        state: State dict of :func:`build_glow`'s model, with every ActNorm initialised.
        name: Of the flow, for the card; the folder's name by default.
        data: What it was trained on.
        license: Of the weights.
        metrics: Such as ``{"bits_per_dim": 3.2}``, for its card.
        calibration: The table of :func:`ijsat_aug.flows.calibration.calibrate`.
        training: How it was trained.

    Example:
        >>> import tempfile
        >>> config, state = load_state("digits")
        >>> with tempfile.TemporaryDirectory() as place:
        ...     load_flow(save_flow(place + "/mine", config, state, data="digits")).shape
        (1, 8, 8)
    """
    from safetensors.torch import save

    folder = Path(folder).expanduser()
    freeze(config, state)  # refuses weights that would not load
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    weights = save(tensors, metadata={"architecture": _architecture(config)})
    card = {
        "format": FORMAT,
        "kind": "glow",
        "name": name or folder.resolve().name,
        "architecture": config.to_dict(),
        "data": data,
        "license": license,
        "metrics": dict(metrics or {}),
        "calibration": dict(calibration or {}),
        "training": dict(training or {}),
        "weights": {"sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)},
        "versions": {p: metadata.version(p) for p in ("torch", "normflows", "safetensors")},
    }
    from .card import render

    # The config last: until it is there the folder is no checkpoint, and its checksum finds out
    # a save that was cut between two files.
    config_json = (json.dumps(card, indent=1) + "\n").encode()
    files = {CARD: render(card).encode(), WEIGHTS: weights, CONFIG: config_json}
    write_together(folder, files)
    return folder


def convert_checkpoint(
    file: str | Path, config: GlowConfig, folder: str | Path, **card: Any
) -> Path:
    """Convert a ``.pt`` state dict of :func:`build_glow`'s network; nothing in it is executed.

    A plain normflows Glow has the same names and shapes but scales its couplings otherwise: with
    its weights the result is a flow, but not the one that was trained.

    Args:
        file: Written by ``torch.save(model.state_dict(), file)`` or normflows' own ``save``.
        config: The network that it belongs to.
        folder: The checkpoint folder to write.
        card: Further arguments of :func:`save_flow`.

    Example:
        >>> import tempfile
        >>> config, state = load_state("digits")
        >>> with tempfile.TemporaryDirectory() as place:
        ...     torch.save(state, place + "/old.pt")
        ...     convert_checkpoint(place + "/old.pt", config, place + "/new").name
        'new'
    """
    import pickle

    file, folder = Path(file).expanduser(), Path(folder).expanduser()
    if (folder / WEIGHTS).exists():
        raise FileExistsError(f"{folder} already holds a flow; choose another folder.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist.") from None
    except (pickle.UnpicklingError, RuntimeError, KeyError, IndexError, EOFError) as error:
        raise CheckpointError(
            f"{file} holds more than tensors, or is damaged, and is not opened; save it again with "
            "torch.save(model.state_dict(), ...)."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{file} is not a state dict of tensors.")
    try:
        return save_flow(folder, config, state, **card)
    except ValueError as error:
        raise CheckpointError(f"{file} does not fit the config: {error}") from error


def _found(
    source: str | Path, revision: str | None, sha256: str | None
) -> tuple[Path, dict[str, Any], GlowConfig, bytes]:
    """Folder, config and weights of a checkpoint, which is the one that was asked for."""
    wanted = None if sha256 is None else sha256.lower().removeprefix("sha256:")
    if wanted is not None and not (len(wanted) == 64 and set(wanted) <= set("0123456789abcdef")):
        raise ValueError(
            f"sha256 is the whole checksum of model.safetensors, 64 hexadecimal digits, got "
            f"{sha256!r}."
        )
    folder, known = locate(source, revision)
    card, config, weights = _read(folder, known)
    actual = card["weights"]["sha256"].lower()  # as the weights were found to be
    if wanted not in (None, actual):
        raise CheckpointError(
            f"{folder / WEIGHTS} is whole, but not the one that sha256= asks for: it has {actual}."
        )
    return folder, card, config, weights


def _read(folder: Path, known: Mapping[str, str]) -> tuple[dict[str, Any], GlowConfig, bytes]:
    """Config and weights of a folder, after every check."""
    card = _read_card(folder, known.get(CONFIG))
    path = folder / WEIGHTS
    try:
        weights = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the whole checkpoint folder.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    asked = {CONFIG: card["weights"]["sha256"], "the registry": known.get(WEIGHTS)}
    _check_sum(path, weights, asked)
    try:
        config = GlowConfig.from_dict(card["architecture"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} describes no valid flow: {error}") from error
    _check_architecture(folder, config, weights)
    return card, config, weights


def _check_sum(path: Path, data: bytes, asked: Mapping[str, str | None]) -> None:
    """Whether a file is the one that each of these sources asks for, if it asks for one."""
    actual = hashlib.sha256(data).hexdigest()
    for source, wanted in asked.items():
        if wanted is not None and actual != wanted.lower():
            raise CheckpointError(
                f"{path} is damaged or another file: its sha256 is {actual[:12]}…, {source} "
                f"asked for {wanted[:12]}…; {_again(path.parent)}."
            )


def _again(folder: Path) -> str:
    """How to come by a checkpoint that is not whole."""
    if (folder / TRAINING).is_file():
        return "go on with its training, train-flow ... --resume, which writes it"
    return "copy the checkpoint again, or delete the folder where it was fetched"


def _read_card(folder: Path, sha256: str | None) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        data = path.read_bytes()
        _check_sum(path, data, {"the registry": sha256})
        card = json.loads(data)
    except FileNotFoundError:
        if (folder / TRAINING).is_file():
            raise CheckpointError(
                f"{folder} holds a training that has not ended: {_again(folder)}."
            ) from None
        raise CheckpointError(
            f"{folder} is not a flow checkpoint: it has no {CONFIG}; name the folder that "
            "save_flow or ijsat-aug train-flow wrote."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_again(folder)}.") from error
    if not isinstance(card, dict) or not isinstance(card.get("format"), int):
        raise CheckpointError(f"{path} is not the config of a flow; {_again(folder)}.")
    if card["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {card['format']}, this ijsat-aug reads up to {FORMAT}; upgrade "
            "with pip install -U ijsat-aug."
        )
    weights = card.get("weights")
    found = weights.get("sha256") if isinstance(weights, dict) else None
    if card.get("kind") != "glow" or not card.keys() >= _KEYS or not isinstance(found, str):
        raise CheckpointError(f"{path} describes no Glow; {_again(folder)}.")
    return card


def _check_architecture(folder: Path, config: GlowConfig, weights: bytes) -> None:
    length = int.from_bytes(weights[:8], "little")
    try:
        header = json.loads(weights[8 : 8 + length])
        stored = GlowConfig.from_dict(json.loads(header["__metadata__"]["architecture"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} is no safetensors file of ours; {_again(folder)}."
        ) from error
    if stored != config:
        raise CheckpointError(
            f"{folder / CONFIG} and {WEIGHTS} describe different networks; one of them was "
            f"changed or swapped; {_again(folder)}."
        )


def _tensors(folder: Path, weights: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(weights)
    except SafetensorError as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} is damaged ({error}); {_again(folder)}."
        ) from error
    return tensors


def _architecture(config: GlowConfig) -> str:
    return json.dumps(config.to_dict(), sort_keys=True)
