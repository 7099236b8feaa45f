"""Processes of their own: a script of this folder, a module, or code in a string; one after the other."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HANGS = 1800.0  # seconds; no test is that slow, on a loaded machine neither: whatever takes longer hangs


def run_python(*arguments: object, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """Run Python with the modules that are found here, one thread for each process."""
    found = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run the script `name` of this folder; its ranks meet at a port that nothing else asks for."""
    return run_python(HERE / name, *arguments, MASTER_PORT=str(_free_port()))


def _free_port() -> int:
    """A port below those that the system gives to connections, which can take a free one before it is listened at."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) != 0:
                return port


def run_module(name: str, *arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess:
    """`python -m name`, in `folder`."""
    return run_python("-m", name, *arguments, folder=folder)


def run_code(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """`python -c code`."""
    return run_python("-c", code, *arguments)
