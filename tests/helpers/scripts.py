"""Processes of their own: a script, a module, or code in a string; one after the other."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HANGS = 1800.0  # seconds; no test is that slow, on a loaded machine neither: whatever takes longer hangs


def run_python(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess:
    """Run Python with the modules that are found here, one thread for each process."""
    environment = {**os.environ, "PYTHONPATH": importable(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )


def run_script(
    script: str | Path, *arguments: object, ranks: int = 1, folder: Path | None = None
) -> subprocess.CompletedProcess:
    """Run a script, forked from a process that has torch and Lightning imported: see :mod:`tests.helpers.warm_process`.

    Args:
        script: the name of one in this folder, or a path.
        arguments: of its command line.
        ranks: of the processes that run it, each of which finds LOCAL_RANK in its environment if they are several.
        folder: where it runs.
    """
    server = warm_process()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as outputs:
        out, err = Path(outputs, "stdout"), Path(outputs, "stderr")
        request = {
            "script": str(HERE / script),
            "arguments": list(map(str, arguments)),
            "environment": {**os.environ, "PYTHONPATH": importable(), "OMP_NUM_THREADS": "1"},
            "folder": str(folder or Path.cwd()),
            "ranks": ranks,
            "seconds": HANGS,
            "stdout": str(out),
            "stderr": str(err),
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        texts = [path.read_text() if path.exists() else "" for path in (out, err)]
    return subprocess.CompletedProcess(request["arguments"], next(filter(None, codes), 0), *texts)


@cache
def warm_process() -> subprocess.Popen:
    """The process that forks scripts; it ends with this one."""
    environment = {**os.environ, "PYTHONPATH": importable(), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, HERE / "warm_process.py"],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(server.communicate)
    return server


def importable() -> str:
    """The PYTHONPATH with which another process finds what this one finds."""
    return os.pathsep.join([str(ROOT), *sys.path])


def run_module(name: str, *arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess:
    """`python -m name`, in `folder`."""
    return run_python("-m", name, *arguments, folder=folder)


def run_code(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """`python -c code`."""
    return run_python("-c", code, *arguments)
