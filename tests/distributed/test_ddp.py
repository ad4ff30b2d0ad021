"""Under DistributedDataParallel: no collectives in the attack, gradients in step, no deadlock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("train_attacked.py")


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
def test_ddp(processes: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = sorted(tmp_path.glob("rank*.txt"))
    assert len(reports) == processes
    texts = [path.read_text() for path in reports]
    assert len(set(texts)) == 1, texts  # the same weights everywhere
    assert texts[0].startswith("steps 3 ")
