"""Runs that are killed or fail, started by test_faults.py as a script: `python faults.py CASE FOLDER [KILLS] [SEED]`.

It imports once and forks every run, so that a kill costs a fraction of a second; it trains nothing itself, or it could
not fork. All thirty kills by hand: `PYTHONPATH=. python tests/faults.py one FOLDER 30`; `two` is the same with DDP.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import time
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.callbacks import Callback

from lightning_lora import LoRACallback
from tests.helpers.models import Lit, checkpoints, data, trainer

EPOCHS = 6
LIMIT = 900.0  # seconds after which a run hangs, on a loaded machine too; torch itself would wait for 30 minutes
FORK = multiprocessing.get_context("fork")
KILLED = -signal.SIGKILL
ADAPTERS = {f"net.layers.{b}.{m}.lora.default.{x}" for b in (0, 1) for m in "qkvo" for x in "AB"}
BUFFERS = {f"net.bn.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


class Heavy(Lit):
    """A module whose files take some milliseconds to write."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2, batch_norm=True)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["ballast"] = torch.zeros(2**21)


class Begun(Callback):
    """Tells the parent that all ranks have joined: Lightning has a barrier before this hook."""

    def __init__(self, tell: Connection) -> None:
        self.tell = tell

    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank == 0:
            self.tell.send("begun")


class Fails(Callback):
    """Fails on one rank in the second epoch, in a step or in its first save."""

    def __init__(self, rank: int, saving: bool = False) -> None:
        self.rank, self.saving = rank, saving

    def on_train_batch_start(self, trainer, pl_module, batch, index):
        if not self.saving and trainer.global_step == 6 and trainer.global_rank == self.rank:
            raise RuntimeError("planned failure")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self.saving and trainer.global_step == 8 and trainer.global_rank == self.rank:
            raise RuntimeError("planned failure")


def fit(folder: Path, ranks: int, seed: int, *more: Callback) -> None:
    """Train to the end, from the last file if there is one."""
    last = folder / "last.ckpt"
    for set_seed in (torch.manual_seed, random.seed):  # Python's generator, too, has a new seed in every fork
        set_seed(99 if last.exists() else seed)
    files, lora = checkpoints(folder, enable_version_counter=False), LoRACallback(r=4, dropout=0.1, merge=False)
    two = {"devices": 2, "strategy": "ddp"} if ranks == 2 else {}
    runner = trainer(*more, lora, files, max_epochs=EPOCHS, **two)
    runner.fit(Heavy(), data(shuffle=True), data(1), ckpt_path=last if last.exists() else None)


def forked(folder: Path, rank: int, ranks: int, port: int, more: tuple[Callback, ...]) -> None:
    output = os.open(output_of(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if ranks == 2:  # Lightning takes LOCAL_RANK to mean that someone else starts the processes
        os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    fit(folder, ranks, 1 + rank, *more)


def output_of(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.name}-{rank}.txt")


def outputs(folder: Path, ranks: int) -> str:
    return "".join(f"\n--- rank {rank}\n{output_of(folder, rank).read_text()[-2000:]}" for rank in range(ranks))


def start(folder: Path, ranks: int, *more: Callback) -> list[ForkProcess]:
    """The processes of a run, once all of them have joined it."""
    begun, tell = FORK.Pipe(duplex=False)
    port, callbacks = find_free_network_port(), (Begun(tell), *more)
    processes = [FORK.Process(target=forked, args=(folder, rank, ranks, port, callbacks)) for rank in range(ranks)]
    for process in processes:
        process.start()
    tell.close()
    try:
        assert begun.poll(LIMIT) and begun.recv() == "begun"
    except (AssertionError, EOFError):
        for process in processes:
            process.kill()
        raise AssertionError("the run did not begin" + outputs(folder, ranks)) from None
    finally:
        begun.close()
    return processes


def codes(folder: Path, processes: list[ForkProcess]) -> list[int | None]:
    """The exit codes, after each process has ended by itself."""
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    found = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in found, f"a run hangs: exit codes {found}{outputs(folder, len(processes))}"
    return found


def complete(folder: Path, processes: list[ForkProcess]) -> None:
    found = codes(folder, processes)
    assert not any(found), f"exit codes {found}{outputs(folder, len(processes))}"


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def uninterrupted(folder: Path, ranks: int) -> tuple[list[dict], float]:
    """What a run that nothing happens to writes after each epoch, and the seconds that it takes."""
    processes, began = start(folder, ranks), time.monotonic()
    complete(folder, processes)
    seconds = time.monotonic() - began
    files = [load(folder / f"epoch={epoch}.ckpt") for epoch in range(EPOCHS)]
    assert all(set(file["state_dict"]) == ADAPTERS | BUFFERS for file in files)
    assert not any(same(one["state_dict"], other["state_dict"]) for one, other in pairwise(files))
    return files, seconds


def check(folder: Path, wanted: list[dict]) -> int:
    """Compare every file with the uninterrupted run's, and give the number of epochs in the last one."""
    done = 0
    for path in folder.glob("*.ckpt"):
        file = load(path)
        epoch = file["epoch"]
        assert path.name in (f"epoch={epoch}.ckpt", "last.ckpt"), path
        assert file.keys() == wanted[epoch].keys(), path
        for key in file.keys() - {"callbacks"}:  # which name the folder
            assert same(file[key], wanted[epoch][key]), f"{path}: {key}"
        done = epoch + 1 if path.name == "last.ckpt" else done
    return done


def unfinished(folder: Path) -> list[Path]:
    """What writes that have not come to their end have left."""
    return [path for path in folder.iterdir() if path.suffix != ".ckpt"]


def is_torn(path: Path) -> bool:
    try:
        load(path)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return True
    return False


def kill(folder: Path, ranks: int, kills: int, seed: int) -> dict[str, object]:
    """Kill runs at random, every other one while it writes; each goes on from what the one before has left."""
    dice, began = random.Random(seed), time.monotonic()
    wanted, seconds = uninterrupted(folder / "whole", ranks)
    run = folder / "killed"
    run.mkdir()
    killed = writing = torn = survived = resumed = 0
    while killed < kills:
        processes = start(run, ranks)
        sentinels = [process.sentinel for process in processes]
        ended = wait(sentinels, dice.uniform(0, seconds / 2))
        while killed % 2 and not ended and not unfinished(run):
            ended = wait(sentinels, 0.0002)
        time.sleep(dice.uniform(0, 0.004))
        for rank in dice.choice([[0], [1], [0, 1]]) if ranks == 2 else [0]:
            processes[rank].kill()
        found = codes(run, processes)
        done = check(run, wanted)
        for code in found:
            assert code in (0, 1, KILLED), f"exit codes {found}{outputs(run, ranks)}"
            assert code != 0 or done == EPOCHS, f"exit codes {found}{outputs(run, ranks)}"
            assert code != 1 or KILLED in found, f"exit codes {found}{outputs(run, ranks)}"
        killed, survived = killed + (KILLED in found), survived + (1 in found)
        left = unfinished(run)
        writing, torn = writing + bool(left), torn + any(map(is_torn, left))
        for path in left:
            path.unlink()
        if done == EPOCHS:  # once more from the start
            resumed += 1
            shutil.rmtree(run)
            run.mkdir()
    complete(run, start(run, ranks))
    assert check(run, wanted) == EPOCHS
    assert writing, "no kill came in the midst of a write"
    return {
        "kills": killed,
        "in the midst of a write": writing,
        "whose file was torn": torn,
        "survivors that ended by themselves": survived,
        "runs brought to their end": resumed + 1,
        "seconds": round(time.monotonic() - began, 1),
    }


def fail(folder: Path) -> dict[str, object]:
    """One rank of two raises: both end, the error is there to read, and what was saved before resumes."""
    wanted, _ = uninterrupted(folder / "whole", 2)
    seconds = []
    for rank, saving in ((0, False), (1, False), (0, True), (1, True)):
        run, began = folder / f"rank{rank}-{saving=}", time.monotonic()
        found = codes(run, start(run, 2, Fails(rank, saving)))
        seconds.append(round(time.monotonic() - began, 1))
        assert found == [1, 1], f"exit codes {found}{outputs(run, 2)}"
        assert "RuntimeError: planned failure" in output_of(run, rank).read_text(), outputs(run, 2)
        assert check(run, wanted) == 1
        complete(run, start(run, 2))
        assert check(run, wanted) == EPOCHS
    return {"seconds until a run with a rank that raises has ended": seconds}


def main(case: str, folder: Path, kills: int = 30, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{case}, seed {seed}", file=sys.stderr)
    figures = fail(folder) if case == "fail" else kill(folder, 1 + (case == "two"), kills, seed)
    print(json.dumps({"case": case, "seed": seed, **figures}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "launch":  # Lightning starts the other rank, which is this script again
        fit(Path(sys.argv[2]), 2, 1, Fails(1))
    else:
        main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
