"""Runs of two CPU processes (gloo) in a subspace: `python subspace_two_processes.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.trainer.subspace_callback import SubspaceCallback
from tests.helpers.models import Lit, checkpoints, data, net, trainer
from tests.helpers.strategy_runs import Sharded
from tests.helpers.two_processes import all_equal, end


class ShardedLit(Sharded):
    """`Lit`, sharded in `configure_model`."""

    def build(self) -> nn.Module:
        return net()


class Checkpointed(Lit):
    """Two segments under reentrant activation checkpointing, both of which read z."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.net.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return self.net.head(x)


def fit_checkpointed(static_graph: bool) -> object:
    """Whether both ranks have the same z, or why the run was refused."""
    module, strategy = Checkpointed(), DDPStrategy(process_group_backend="gloo", static_graph=static_graph)
    try:
        trainer(SubspaceCallback(20, merge=False), devices=2, strategy=strategy, max_epochs=1).fit(module, data())
    except MisconfigurationException as error:
        return str(error)
    [z] = [parameter for name, parameter in module.named_parameters() if name.endswith("subspace.z")]
    return all_equal(z.detach())


STRATEGIES = {
    "ddp": (lambda: DDPStrategy(process_group_backend="gloo"), Lit),
    "fsdp2": (lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"), ShardedLit),
}


def fit(name: str, folder: Path) -> dict[str, object]:
    strategy, make = STRATEGIES[name]
    module, files = make(), checkpoints(folder / name, monitor=None, every_n_epochs=1, save_top_k=1)
    callback = SubspaceCallback(20, structure=True, lr_scale=30.0)
    runner = trainer(callback, files, devices=2, strategy=strategy(), max_epochs=2)
    runner.fit(module, data())
    state = {key: value.detach().clone() for key, value in callback.method.state(module).items()}
    merged = [value.to_local() if hasattr(value, "to_local") else value for value in module.parameters()]
    same = all(all_equal(value) for value in state.values())
    return {"state": state, "same": same, "merged": [value.detach().clone() for value in merged]}


def main() -> None:
    folder = Path(sys.argv[1])
    results: dict[str, object] = {name: fit(name, folder) for name in STRATEGIES}
    results |= {f"checkpointed-{static}": fit_checkpointed(static) for static in (True, False)}
    rank = torch.distributed.get_rank()
    torch.save(results, folder / f"results-{rank}.pt")
    end(0)


if __name__ == "__main__":
    main()
