"""Processes that are killed and ranks that fail: no file is torn, nothing hangs, and a resumed run loses nothing."""

from __future__ import annotations

import sys

import pytest

from tests.helpers.scripts import HERE, run_python, run_script

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks after torch is imported")]


@pytest.mark.parametrize("case", ["one", "two"])
def test_a_killed_run_leaves_whole_files_and_resumes_to_the_uninterrupted_result(tmp_path, case):
    done = run_script("faults.py", case, tmp_path, 12)  # thirty by hand
    assert done.returncode == 0, done.stderr[-5000:]


def test_a_rank_that_raises_ends_the_run_and_what_was_saved_resumes(tmp_path):
    done = run_script("faults.py", "fail", tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]


def test_a_rank_that_raises_ends_a_launched_run_with_its_error(tmp_path):
    done = run_python(HERE / "faults.py", "launch", tmp_path)
    assert done.returncode == 1, done.stderr[-5000:]
    assert "RuntimeError: planned failure" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=0.ckpt", "last.ckpt"}
