"""Runs of two CPU processes (gloo), started by test_ddp.py as a script: `python two_processes.py CASE FOLDER`."""

from __future__ import annotations

import copy
import os
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from torch import distributed

from lightning_lora import LoRACallback, lora_parameters
from lightning_lora.ops.packed.quantized_tensors import stored_tensors
from tests.helpers.models import Lit, checkpoints, data, trainer
from tests.helpers.quantized_tensors import quantize

TWO = {"devices": 2, "strategy": "ddp"}


class RankSeeds(Lit):
    """Every rank draws another stream, as with `seed_everything(seed + rank)`."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(dropout=0.2, **kwargs)

    def on_train_start(self) -> None:
        if self.trainer.global_step == 0:
            torch.manual_seed(100 + self.global_rank)


class DrawnA(Callback):
    """A as each rank drew it, before DDP sends the first rank's to all."""

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            self.A = torch.cat([p.detach().flatten() for n, p in pl_module.named_parameters() if n.endswith(".A")])


def all_equal(tensor: torch.Tensor) -> bool:
    both = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(both, tensor.contiguous())
    return all(torch.equal(one, both[0]) for one in both)


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def run(folder: Path, epochs: int, ckpt: object = None, make=RankSeeds, more: tuple = (), **kwargs: object):
    files = checkpoints(folder)
    runner = trainer(LoRACallback(r=4, dropout=0.1, **kwargs), *more, files, max_epochs=epochs, **TWO)
    module = make()
    runner.fit(module, data(), data(1), ckpt_path=ckpt)
    return runner, module, files


def train(folder: Path) -> None:
    """Fit, merge on both ranks, test the best; equal ranks, and a fresh module tests the same."""
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))
    drawn = DrawnA()
    runner, module, files = run(folder / "fit", 2, more=(drawn,))
    result = {"keys": list(module.state_dict()), "equal": all_equal(flat(module)), "rank": runner.global_rank}
    result["drawn alike"] = all_equal(drawn.A)
    best = runner.test(module, data(2), ckpt_path="best", verbose=False)
    result["still equal"] = all_equal(flat(module))
    fresh = trainer(LoRACallback(r=4), **TWO).test(RankSeeds(), data(2), ckpt_path=files.best_model_path, verbose=False)
    result["best"], result["fresh"], result["path"] = best, fresh, files.best_model_path
    torch.save(result, folder / f"train-{runner.global_rank}.pt")


def resume(folder: Path) -> None:
    """Two epochs, and the second one again from the file of the first."""
    run(folder / "two", 2, merge=False)
    run(folder / "resumed", 2, folder / "two" / "epoch=0.ckpt", merge=False)


def forked(folder: Path) -> None:
    """A fit in workers that Lightning forks; then tests of the module and of a fresh one, of the file."""
    files, module = checkpoints(folder), Lit()
    callback = partial(LoRACallback, r=4, also_train=["head"])
    trainer(callback(), files, strategy="ddp_fork", devices=2, max_epochs=1).fit(module, data(), data(1))
    state, path = copy.deepcopy(module.state_dict()), files.best_model_path
    tested = [trainer(callback()).test(each, data(2), ckpt_path=path, verbose=False) for each in (module, Lit())]
    torch.save({"state": state, "tested": tested}, folder / "forked.pt")


class LoadedByOne(RankSeeds):
    """Only the first rank has the base; the others start from anything, and DDP gives them the values."""

    def __init__(self) -> None:
        super().__init__()
        if int(os.environ.get("LOCAL_RANK", 0)):
            for parameter in self.parameters():
                torch.nn.init.normal_(parameter)


def base_of_one(folder: Path) -> None:
    """Two epochs, the second one again, and tests, where one rank has the base; then merged weights on both ranks."""
    run(folder / "two", 2, make=LoadedByOne, merge=False)
    runner, module, _ = run(folder / "resumed", 2, folder / "two" / "epoch=0.ckpt", LoadedByOne)
    result = {"equal": all_equal(flat(module))}
    result["tested"] = runner.test(module, data(2), ckpt_path=folder / "resumed" / "last.ckpt", verbose=False)
    torch.save(result, folder / f"base_of_one-{runner.global_rank}.pt")


def other_arguments(folder: Path) -> None:
    """Each rank asks for other targets."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    try:
        trainer(LoRACallback(r=4, targets=["q", "vk"[rank]]), **TWO).fit(Lit(), data())
    except Exception as error:
        (folder / f"said-{os.environ.get('LOCAL_RANK', 0)}.txt").write_text(f"{type(error).__name__}: {error}")


class QuantizedByRank(Lit):
    """Each rank quantizes another base."""

    def __init__(self) -> None:
        super().__init__()
        rank = int(os.environ.get("LOCAL_RANK", 0))
        torch.nn.init.normal_(self.net.layers[0].q.weight, std=0.1 + rank)
        quantize(self.net.layers, "toy")


def quantized(folder: Path) -> None:
    """DDP gives every rank the codes and scales of the first."""
    module = QuantizedByRank()
    stored = [part.clone() for part in stored_tensors(module.net.layers[0].q.weight)]
    trainer(LoRACallback(r=4), **TWO).fit(module, data())
    now = stored_tensors(module.net.layers[0].q.weight)
    result = {
        "equal": all_equal(flat_adapters(module)) and all(all_equal(part.float()) for part in now),
        "kept": all(map(torch.equal, stored, now)),
        "left": [key for key in vars(module) if key.startswith("_ddp")],
    }
    torch.save(result, folder / f"quantized-{distributed.get_rank()}.pt")


def flat_adapters(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for _, parameter in lora_parameters(module)])


def end(code: int) -> None:
    """Leave without the interpreter's own end, in which gloo's threads may abort a process that has done its work."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        cases = {case.__name__: case for case in (train, resume, forked, base_of_one, other_arguments, quantized)}
        cases[sys.argv[1]](Path(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)
