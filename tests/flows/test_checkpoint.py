"""Checkpoints are whole, verified, shared and never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from ijsat_aug import CheckpointError, GlowConfig, load_flow, save_flow
from ijsat_aug.flows.card import render
from ijsat_aug.flows.checkpoint import convert_checkpoint, load_state
from ijsat_aug.flows.files import write_atomically
from ijsat_aug.flows.fold import freeze
from ijsat_aug.flows.glow import build_glow
from tests.conftest import random_glow

CONFIG = GlowConfig(shape=(1, 8, 8), levels=2, steps=2, hidden=8, bins=17, logit=0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_flow(tmp_path / "flow", CONFIG, random_glow(CONFIG).state_dict(), data="noise")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_saved_is_what_is_loaded(folder: Path) -> None:
    model = random_glow(CONFIG)
    config, state = load_state(folder)
    assert config == CONFIG
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    flow = load_flow(folder)
    assert flow.config == CONFIG
    assert flow.info["data"] == "noise"


def test_the_folder_holds_weights_config_and_card(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    card = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    assert card["weights"] == {
        "sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights),
    }  # fmt: skip
    assert card["format"] == 1
    assert card["architecture"] == CONFIG.to_dict()
    assert {"data", "license", "metrics", "calibration", "training", "versions"} <= card.keys()


def test_actnorm_flags_are_kept_so_that_training_can_go_on(folder: Path) -> None:
    _, state = load_state(folder)
    flags = [v for k, v in state.items() if k.endswith("data_dep_init_done")]
    assert len(flags) == CONFIG.levels * CONFIG.steps
    assert all(flag == 1 for flag in flags)
    model = build_glow(CONFIG)
    model.load_state_dict(state)
    before = model.flows[0][0].flows[2].s.clone()
    model(torch.rand(16, 1, 8, 8))  # would re-initialise an ActNorm whose flag is lost
    assert torch.equal(model.flows[0][0].flows[2].s, before)


def test_the_file_is_the_same_for_the_same_weights(folder: Path, tmp_path: Path) -> None:
    again = save_flow(tmp_path / "again", CONFIG, random_glow(CONFIG).state_dict())
    first, second = ((f / "model.safetensors").read_bytes() for f in (folder, again))
    assert first == second


def test_the_same_file_on_the_same_device_is_one_object(folder: Path) -> None:
    flow = load_flow(folder)
    assert load_flow(str(folder)) is flow
    assert load_flow(folder, device=torch.device("cpu")) is flow
    assert load_flow(folder, "meta") is not flow
    low = load_flow(folder, compute_dtype=torch.bfloat16)
    assert low is not flow
    assert low.compute_dtype == torch.bfloat16
    assert load_flow(folder, memory="low").memory == "low"


def test_a_flow_that_nobody_holds_is_freed(folder: Path) -> None:
    import gc
    import weakref

    reference = weakref.ref(load_flow(folder))
    gc.collect()
    assert reference() is None


def test_it_is_frozen(folder: Path) -> None:
    flow = load_flow(folder)
    with pytest.raises(AttributeError):
        flow.mean = torch.zeros(1)  # type: ignore[misc]
    tensors = [t for level in flow.levels for block in level for t in (*block[0], *block[1])]
    assert not any(t.requires_grad for t in tensors)


def test_saving_over_a_checkpoint_replaces_it_and_keeps_other_files(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "training").mkdir()
    (folder / "training" / "a.png").write_bytes(b"1")
    old = load_flow(folder)
    save_flow(folder, CONFIG, random_glow(CONFIG, seed=1).state_dict())
    assert load_flow(folder) is not old
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "training" / "a.png").read_bytes() == b"1"
    assert [p.name for p in folder.parent.iterdir()] == ["flow"]  # no temporary left


def test_a_failed_save_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    broken = random_glow(CONFIG).state_dict() | {"extra": torch.zeros(1)}
    with pytest.raises(ValueError, match="extra"):
        save_flow(folder, CONFIG, broken)

    calls = iter(range(10))

    def full_disk(handle: int) -> None:
        if next(calls) == 1:
            raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_flow(folder, CONFIG, random_glow(CONFIG, seed=1).state_dict())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["flow"]


def test_a_save_that_is_cut_between_two_files_is_found_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def cut(self: Path, target: Path) -> Path:
        if target.name == "config.json":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        save_flow(folder, CONFIG, random_glow(CONFIG, seed=1).state_dict())
    with pytest.raises(CheckpointError, match="is damaged or another file"):
        load_flow(folder)
    assert not list(folder.glob(".*"))


def test_a_folder_behind_a_link_stays_a_link(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    save_flow(link, CONFIG, random_glow(CONFIG, seed=1).state_dict())
    assert link.is_symlink()
    assert load_flow(link) is load_flow(folder)


def test_threads_share_one_flow(folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        flows = list(pool.map(load_flow, [folder] * 4))
    assert len({id(flow) for flow in flows}) == 1


def test_a_revision_is_only_for_the_hub(folder: Path) -> None:
    for source in (folder, str(folder), "digits"):
        with pytest.raises(ValueError, match="is for Hugging Face repositories"):
            load_flow(source, revision="v1")


def test_sha256_of_the_caller_is_checked(folder: Path) -> None:
    good = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    load_flow(folder, sha256=good.upper())
    load_flow(folder, sha256=f"sha256:{good}")
    with pytest.raises(CheckpointError, match=rf"is whole, but not the one .* it has {good}"):
        load_flow(folder, sha256="0" * 64)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        load_flow(folder, sha256=good[:12])


def test_bad_options_are_not_blamed_on_the_file(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"memory must be one of .*'low'.*got 'lo'"):
        load_flow(folder, memory="lo")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a dtype such as torch\.bfloat16, got 'bfloat16'"):
        load_flow(folder, compute_dtype="bfloat16")  # type: ignore[arg-type]


def test_home_is_found_in_saving_and_loading(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config, state = load_state("digits")
    assert save_flow("~/mine", config, state) == tmp_path / "mine"
    assert load_flow("~/mine").shape == (1, 8, 8)


def test_a_file_of_a_checkpoint_is_not_looked_for_on_the_hub(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(CheckpointError, match=rf"is a file, and a flow .* name {folder.name}"):
        load_flow(f"{folder.name}/model.safetensors")


@pytest.mark.parametrize("where", [0, 20, -1])
def test_a_damaged_byte_is_found(folder: Path, where: int) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors is damaged .* copy .* again",
    ):
        load_flow(folder)


def test_a_truncated_file_is_found(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is damaged or another file"):
        load_flow(folder)


def test_swapped_weights_are_found(folder: Path, tmp_path: Path) -> None:
    other = save_flow(tmp_path / "other", CONFIG, random_glow(CONFIG, seed=1).state_dict())
    shutil.copy(other / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match="is damaged or another file"):
        load_flow(folder)


def test_a_changed_config_is_found_though_the_weights_are_whole(folder: Path) -> None:
    architecture = CONFIG.to_dict() | {"log_scale": 2.0}  # fits every shape, other function
    edit(folder, architecture=architecture)
    with pytest.raises(CheckpointError, match="describe different networks"):
        load_flow(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, this ijsat-aug reads up to 1; upgrade"),
        ({"format": "1"}, "is not the config of a flow"),
        ({"kind": "nice"}, "describes no Glow"),
        ({"weights": None}, "describes no Glow"),
        ({"architecture": {"shape": [1, 7, 7]}}, "describes no valid flow"),
        ({"architecture": {"depth": 1}}, "describes no valid flow"),
        ({"architecture": 3}, "describes no valid flow"),
    ],
)
def test_a_wrong_config_is_one_sentence(folder: Path, changes: dict, message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_flow(folder)


def test_missing_pieces_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing; copy the whole"):
        load_flow(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_flow(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is not a flow checkpoint"):
        load_flow(folder)


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploded"),))


def test_nothing_is_unpickled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(_Bomb())
    (folder / "model.safetensors").write_bytes(bomb)
    weights = {"sha256": hashlib.sha256(bomb).hexdigest(), "bytes": len(bomb)}
    edit(folder, weights=weights)
    with pytest.raises(CheckpointError, match="is no safetensors file of ours"):
        load_flow(folder)
    torch.save({"a": _Bomb()}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        convert_checkpoint(tmp_path / "old.pt", CONFIG, tmp_path / "new")
    assert not Path("exploded").exists()
    assert not (tmp_path / "new").exists()


def test_legacy_files_are_converted(folder: Path, tmp_path: Path) -> None:
    model = random_glow(CONFIG)
    model.save(tmp_path / "old.pt")  # normflows' own
    new = convert_checkpoint(tmp_path / "old.pt", CONFIG, tmp_path / "new", data="x")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_flow(new).encode(x), load_flow(folder).encode(x))


def test_legacy_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        convert_checkpoint(tmp_path / "none.pt", CONFIG, tmp_path / "new")
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        convert_checkpoint(tmp_path / "bad.pt", CONFIG, tmp_path / "new")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="is not a state dict"):
        convert_checkpoint(tmp_path / "list.pt", CONFIG, tmp_path / "new")
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="does not fit the config"):
        convert_checkpoint(tmp_path / "other.pt", CONFIG, tmp_path / "new")


def test_a_conversion_overwrites_no_flow(tmp_path: Path) -> None:
    there = save_flow(tmp_path / "flow", CONFIG, random_glow(CONFIG).state_dict())
    before = (there / "model.safetensors").read_bytes()
    torch.save(random_glow(CONFIG, seed=1).state_dict(), tmp_path / "old.pt")
    with pytest.raises(FileExistsError, match="already holds a flow"):
        convert_checkpoint(tmp_path / "old.pt", CONFIG, there)
    assert (there / "model.safetensors").read_bytes() == before


def test_a_place_at_home_is_not_overwritten_either(folder: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _, state = load_state(folder)
    torch.save(state, tmp_path / "old.pt")
    convert_checkpoint("~/old.pt", CONFIG, "~/new", name="precious")
    with pytest.raises(FileExistsError, match="already holds a flow"):
        convert_checkpoint("~/old.pt", CONFIG, "~/new", name="other")
    assert load_flow("~/new").info["name"] == "precious"


def test_two_cards_of_the_same_weights_are_two_flows(tmp_path) -> None:
    config, state = load_state("digits")
    flows = [load_flow(save_flow(tmp_path / d, config, state, data=d)) for d in ("one", "two")]
    assert [flow.info["data"] for flow in flows] == ["one", "two"]


def test_what_is_written_can_be_read_by_others(tmp_path) -> None:
    write_atomically(tmp_path / "a", b"")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_permissions_that_the_mask_leaves(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_a_card_takes_measures_of_any_kind_and_is_of_this_flow_alone(tmp_path: Path) -> None:
    state = random_glow(CONFIG).state_dict()
    folder = save_flow(
        tmp_path / "digits", CONFIG, state, metrics={"bits_per_dim": 3.2, "fid": 12},
        calibration={"recommended": {"linf": 0.1, "l2": 0.8}},
    )  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "* bits per dim: 3.2\n* fid: 12" in card
    assert 'load_flow("path/to/digits")' in card  # not ours of that name
    assert 'load_flow("digits")' in render(load_flow("digits").info)


def test_a_frozen_flow_shares_no_memory_with_its_model() -> None:
    model = random_glow(CONFIG).double()
    flow = freeze(CONFIG, model.state_dict(), dtype=torch.float64)
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    before = flow.encode(x)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value += 0.1
    assert torch.equal(flow.encode(x), before)
    assert (flow.decode(before) - x).abs().max() < 1e-9


def test_numbers_of_numpy_are_numbers_of_a_config() -> None:
    config = GlowConfig(shape=(1, 8, 8), log_scale=np.float32(4), logit=np.float32(0.0625))
    assert json.loads(json.dumps(config.to_dict()))["logit"] == 0.0625


def test_integers_are_no_precision_of_a_flow() -> None:
    with pytest.raises(TypeError, match="compute_dtype is a dtype such as"):
        load_flow("digits", compute_dtype=torch.int8)


def test_every_digit_of_a_checksum_counts() -> None:
    known = load_flow("digits").info["weights"]["sha256"]
    wrong = known[:-1] + ("0" if known[-1] != "0" else "1")
    with pytest.raises(CheckpointError, match="not the one that sha256= asks for"):
        load_flow("digits", sha256=wrong)
