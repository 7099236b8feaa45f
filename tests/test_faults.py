"""Processes that are killed and ranks that fail: no file is torn, nothing hangs, and a resumed run loses nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks after torch is imported")]


def faults(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "faults.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("case", ["one", "two"])
def test_a_killed_run_leaves_whole_files_and_resumes_to_the_uninterrupted_result(tmp_path, case):
    done = faults(case, tmp_path, 30)
    assert done.returncode == 0, done.stderr[-5000:]


def test_a_rank_that_raises_ends_the_run_and_what_was_saved_resumes(tmp_path):
    done = faults("fail", tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]


def test_a_rank_that_raises_ends_a_launched_run_with_its_error(tmp_path):
    done = faults("launch", tmp_path)
    assert done.returncode == 1, done.stderr[-5000:]
    assert "RuntimeError: planned failure" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=0.ckpt", "last.ckpt"}
