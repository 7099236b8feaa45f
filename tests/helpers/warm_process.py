"""A process that imports torch and Lightning once, and forks scripts: they start without the seven seconds of imports.

:mod:`tests.helpers.scripts` starts it. It reads a request for each script as a line of JSON, and writes the exit codes
of the script's ranks as another. It trains nothing itself: torch cannot go back after a backward pass in a fork.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning_utilities.core.rank_zero import rank_zero_only

import tests.helpers.strategy_runs  # noqa: F401 # imports what most scripts import

FORK = multiprocessing.get_context("fork")


def run(request: dict[str, Any], rank: int, port: int) -> None:
    """In a fork: the script of ``request`` as ``__main__``, as one of its ranks."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        output = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # which the ranks share
        os.dup2(output, number)
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["ranks"] > 1:  # Lightning takes LOCAL_RANK to mean that someone else starts the processes
        os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        rank_zero_only.rank = rank  # as where LOCAL_RANK is there before the import
    os.chdir(request["folder"])
    sys.argv = [request["script"], *request["arguments"]]
    sys.path[0] = str(Path(request["script"]).parent)
    runpy.run_path(request["script"], run_name="__main__")


def exit_codes(request: dict[str, Any]) -> list[int]:
    """Run the ranks of ``request``; one that takes longer than its ``seconds`` is killed."""
    port, end = find_free_network_port(), time.monotonic() + request["seconds"]
    processes = [FORK.Process(target=run, args=(request, rank, port)) for rank in range(request["ranks"])]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()
    return [int(process.exitcode or 0) for process in processes]


def main() -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        print(json.dumps(exit_codes(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
