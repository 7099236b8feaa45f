"""Every method in two CPU processes (gloo), under DDP, FSDP1 and FSDP2: `python method_two_processes.py FOLDER`."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.helpers.method_cases import FAST, SEGMENTS, MethodCase
from tests.helpers.models import EncoderBlock, LitEncoder, checkpoints, data, trainer
from tests.helpers.strategy_runs import FSDP
from tests.helpers.two_processes import all_equal, end

DROPOUT = 0.2


class ShardedEncoder(LitEncoder):
    """The user shards in `configure_model`, before a callback can adapt anything."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.whole, self.net = [self.net], None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.whole.pop()
            mesh = self.device_mesh["data_parallel"]
            for unit in (*self.net.layers, self.net):
                fully_shard(unit, mesh=mesh)


STRATEGIES = {
    "ddp": (lambda: DDPStrategy(process_group_backend="gloo"), LitEncoder),
    "fsdp1": (lambda: FSDP(auto_wrap_policy={EncoderBlock}, process_group_backend="gloo"), LitEncoder),
    "fsdp2": (lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"), ShardedEncoder),
}


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()


def fit(strategy: str, case: MethodCase, folder: Path, epochs: int, ckpt: object = None) -> tuple:
    make_strategy, make = STRATEGIES[strategy]
    module, files = make(dropout=DROPOUT), checkpoints(folder)
    torch.manual_seed(5)
    runner = trainer(case.make(), files, devices=2, strategy=make_strategy(), max_epochs=epochs)
    runner.fit(module, data(), data(1), ckpt_path=ckpt)
    return runner, module, files


def life(strategy: str, case: MethodCase, folder: Path) -> dict[str, object]:
    """Two epochs, the second one again from the file of the first, and the best checkpoint in a test."""
    runner, module, files = fit(strategy, case, folder / "whole", 2)
    state = case.make().method.state(module)
    weights = [state[name] for name in sorted(case.trained)]
    result: dict[str, object] = {"equal": all(all_equal(weight) for weight in weights)}
    if strategy != "fsdp1":  # which keeps pieces after the run
        result["frozen"] = {name: full(p) for name, p in module.named_parameters() if name not in case.trained}
    fit(strategy, case, folder / "resumed", 2, folder / "whole" / "epoch=0.ckpt")
    if strategy == "ddp":
        result["best"] = runner.test(module, data(2), ckpt_path=files.best_model_path, verbose=False)
    result["path"] = files.best_model_path
    return result


def main() -> None:
    folder, results = Path(sys.argv[1]), {}
    for strategy in STRATEGIES:
        for case in (*FAST, SEGMENTS):
            try:
                results[strategy, case.name] = life(strategy, case, folder / strategy / case.name)
            except Exception:
                results[strategy, case.name] = {"error": traceback.format_exc()}
    torch.save(results, folder / f"results-{torch.distributed.get_rank()}.pt")
    end(0)


if __name__ == "__main__":
    main()
