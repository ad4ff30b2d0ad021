"""Where checkpoints come from: the wheel, the cache, a URL, the hub. Real servers, no mocks."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ijsat_aug import CheckpointError, GlowConfig, load_flow, save_flow
from ijsat_aug.flows import registry
from tests.conftest import random_glow

CONFIG = GlowConfig(shape=(1, 8, 8), levels=2, steps=2, hidden=8, bins=17)
FILES = ("config.json", "README.md", "model.safetensors")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A flow that the registry knows and that the installation does not hold."""
    place = tmp_path / "remote"
    folder = save_flow(place / "far", CONFIG, random_glow(CONFIG).state_dict())
    sums = {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in FILES}
    known = registry._registry() | {"far": sums}
    monkeypatch.setattr(registry, "_registry", lambda: known)
    monkeypatch.setenv("IJSAT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("IJSAT_URL", raising=False)
    return place


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(remote: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(remote))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"no flow 'digit'.*Did you mean 'digits'\?"):
        load_flow("digit")


def test_without_a_url_the_error_says_how_to_get_the_file(remote: Path) -> None:
    with pytest.raises(CheckpointError, match="set IJSAT_URL"):
        load_flow("far")


def test_fetched_once_verified_and_cached(
    server: str, remote: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IJSAT_URL", server + "/")
    assert load_flow("far").shape == (1, 8, 8)
    monkeypatch.delenv("IJSAT_URL")  # the cache needs no network
    assert load_flow("far").shape == (1, 8, 8)
    (cached,) = (tmp_path / "home" / "far").iterdir()
    assert sorted(p.name for p in cached.iterdir()) == sorted(FILES)


def test_a_local_folder_serves_as_url(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IJSAT_URL", remote.as_uri())
    assert load_flow("far").shape == (1, 8, 8)


@pytest.mark.parametrize("file", FILES)
def test_a_wrong_download_is_refused_and_not_kept(
    remote: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str
) -> None:
    monkeypatch.setenv("IJSAT_URL", remote.as_uri())
    with (remote / "far" / file).open("ab") as f:
        f.write(b" ")
    with pytest.raises(CheckpointError, match=f"{file} is damaged or another file"):
        load_flow("far")
    assert not list((tmp_path / "home").rglob(file))


def test_a_damaged_cache_is_found(
    remote: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IJSAT_URL", remote.as_uri())
    load_flow("far")
    (weights,) = (tmp_path / "home").rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="delete the folder where it was fetched"):
        load_flow("far")


def test_an_unreachable_url_is_one_sentence(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://127.0.0.1:9", "file:///nowhere", "no-scheme"):
        monkeypatch.setenv("IJSAT_URL", url)
        with pytest.raises(CheckpointError, match=r"cannot fetch .* check IJSAT_URL"):
            load_flow("far")


def test_cache_home_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IJSAT_HOME", str(tmp_path))
    assert registry.cache_home() == tmp_path
    monkeypatch.delenv("IJSAT_HOME")
    assert registry.cache_home().name == "ijsat_aug"


class _Hub(_Quiet):
    """The two requests that the hub client makes for one file."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    wanted: tuple[str, ...] = ()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        prefix, _, name = self.path.partition("/resolve/")
        revision, _, file = name.partition("/")
        path = Path(self.directory) / file.removeprefix("far/")
        if prefix != "/somebody/flows" or revision != "v1" or not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.mark.integration
def test_the_hub_client_fetches_pins_and_caches(remote: Path, tmp_path: Path) -> None:
    """The real huggingface_hub against a server on this machine, in a process of its own."""
    pytest.importorskip("huggingface_hub")
    handler = functools.partial(_Hub, directory=str(remote / "far"))
    script = """
import json, os, sys
from ijsat_aug import CheckpointError, load_flow
from ijsat_aug.flows import registry
sha256 = sys.argv[1]
registry._registry = lambda: {"far": {"model.safetensors": sha256}}
os.environ["IJSAT_URL"] = "hf://somebody/flows@v1"
assert load_flow("far").shape == (1, 8, 8)
flow = load_flow("somebody/flows", revision="v1", sha256=sha256)
try:
    load_flow("somebody/flows", revision="v2")
except CheckpointError as error:
    print(json.dumps([flow.shape, flow.info["weights"]["sha256"], str(error)]))
"""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{httpd.server_port}",
            "IJSAT_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path / "hf"),
        }
        weights = (remote / "far" / "model.safetensors").read_bytes()
        sha256 = hashlib.sha256(weights).hexdigest()
        command = [sys.executable, "-c", script, sha256]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        httpd.shutdown()
    assert done.returncode == 0, done.stderr
    shape, loaded, error = json.loads(done.stdout.splitlines()[-1])
    assert (shape, loaded) == ([1, 8, 8], sha256)
    assert "cannot fetch 'somebody/flows' from the Hugging Face hub" in error
    assert list((tmp_path / "home" / "hub").rglob("model.safetensors"))


def test_a_changed_config_of_the_cache_is_found(
    remote: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IJSAT_URL", remote.as_uri())
    load_flow("far")
    (config,) = (tmp_path / "home").rglob("config.json")
    card = json.loads(config.read_text())
    config.write_text(json.dumps(card | {"calibration": {"recommended": {"linf": 9.0}}}))
    with pytest.raises(CheckpointError, match=r"config.json is damaged or another file"):
        load_flow("far")


def test_a_slip_in_a_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no flow 'runs/flo': it is neither"):
        load_flow("runs/flo")


def test_a_cache_that_cannot_be_written_says_so(remote: Path, tmp_path, monkeypatch) -> None:
    home = tmp_path / "home"
    home.write_text("a file")
    monkeypatch.setenv("IJSAT_URL", remote.as_uri())
    monkeypatch.setenv("IJSAT_HOME", str(home / "below"))
    with pytest.raises(CheckpointError, match="set IJSAT_HOME to another folder"):
        load_flow("far")
