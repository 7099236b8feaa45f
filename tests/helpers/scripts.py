"""Processes of their own: a script of this folder, a module, or code in a string; one after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HANGS = 1800.0  # seconds; no test is that slow, on a loaded machine neither: whatever takes longer hangs


def run_python(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess:
    """Run Python with the modules that are found here, one thread for each process."""
    found = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run the script `name` of this folder."""
    return run_python(HERE / name, *arguments)


def run_module(name: str, *arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess:
    """`python -m name`, in `folder`."""
    return run_python("-m", name, *arguments, folder=folder)


def run_code(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """`python -c code`."""
    return run_python("-c", code, *arguments)
