"""Runs of two CPU processes (gloo) with several adapters: `python routed_two_processes.py FOLDER`."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_lora import LoRACallback, LoRAConfig, apply_lora
from tests.helpers.models import checkpoints, net, trainer
from tests.helpers.routed import ADAPTERS, ChoosesItself, ChoosesOneMore, RoutedLit, Trace, rows
from tests.helpers.strategy_runs import Sharded, fsdp1, fsdp2
from tests.helpers.two_processes import all_equal, end


class RoutedSharded(RoutedLit):
    """Sharded in `configure_model`, before it has adapters or after it."""

    def __init__(self, *args: object, before: bool = False) -> None:
        super().__init__(*args)
        self.before, self.done = before, False

    def configure_model(self) -> None:
        if not self.done:
            self.done, self.net = True, net()
            if self.before:
                apply_lora(self, LoRAConfig(r=2, adapters=ADAPTERS))
            Sharded.shard(self, self.net)


class OneMoreSharded(ChoosesOneMore, RoutedSharded):
    """Chooses an adapter itself, and is sharded."""


STRATEGIES = {
    "ddp": (DDPStrategy, RoutedLit),
    "ddp-find-unused": (lambda: DDPStrategy(find_unused_parameters=True), RoutedLit),
    "ddp-step-chooses": (lambda: DDPStrategy(find_unused_parameters=True), ChoosesItself),
    "ddp-static-graph": (lambda: DDPStrategy(static_graph=True), RoutedLit),
    "ddp-bucket-view": (lambda: DDPStrategy(gradient_as_bucket_view=True), RoutedLit),
    "fsdp1": (fsdp1, RoutedLit),
    "fsdp2": (fsdp2, RoutedSharded),
    "fsdp2-apply-before": (fsdp2, lambda *args: RoutedSharded(*args, before=True)),
}


ONE_MORE = dict.fromkeys(("ddp", "ddp-find-unused", "fsdp1"), ChoosesOneMore) | {"fsdp2": OneMoreSharded}
RANK = int(os.environ.get("LOCAL_RANK", 0))
TWO = {name: own for name, own in ADAPTERS.items() if name != "it"}


def resume(name: str, folder: Path) -> dict:
    """The adapters after each step of a resumed run: of one with an adapter more, and of one with an adapter fewer."""
    strategy, make = STRATEGIES[name]

    def run(epochs: int, adapters: dict, ckpt: object = None) -> tuple[object, list]:
        files, trace = checkpoints(folder / f"{name}-{len(adapters)}-{epochs}", monitor=None, save_top_k=1), Trace()
        own = LoRACallback(r=2, adapters=adapters, route="task", merge=False)
        settings = {"devices": 2, "strategy": strategy(), "max_epochs": epochs, "use_distributed_sampler": False}
        batches = rows(4, RANK, without=None if "it" in adapters else "it")
        trainer(own, files, trace, **settings).fit(make("adamw"), batches, ckpt_path=ckpt)
        return files.last_model_path, trace.steps

    (of_two, _), (of_three, _) = run(2, TWO), run(2, ADAPTERS)
    return {"more": run(4, {"it": ADAPTERS["it"], **TWO}, of_two)[1], "fewer": run(4, TWO, of_three)[1]}


def fit(
    name: str,
    optimizer: str,
    reduction: str = "sum",
    accumulate: int = 1,
    one_more: bool = False,
    **kwargs: object,
) -> dict:
    """The adapters after each step, and whether both ranks have the same."""
    strategy, make = STRATEGIES[name]
    make = ONE_MORE[name] if one_more else make
    trace, module = Trace(), make(optimizer, reduction)
    route = None if make is ChoosesItself else "task"
    callback = LoRACallback(r=2, adapters=ADAPTERS, route=route, merge=False, **kwargs)
    settings = {"devices": 2, "strategy": strategy(), "max_epochs": 2, "accumulate_grad_batches": accumulate}
    batches = rows(4 // accumulate, RANK, without="it" if one_more else None)
    trainer(callback, trace, **settings, use_distributed_sampler=False).fit(module, batches)
    same = all_equal(torch.cat([value.flatten() for value in trace.steps[-1].values()]))
    return {"steps": trace.steps, "same": same}


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        folder, results = Path(sys.argv[1]), {}
        for name in STRATEGIES:
            for optimizer in ("sgd", "adamw"):
                results[name, optimizer] = fit(name, optimizer)
            if name != "ddp-static-graph":  # it cannot leave a pass unaveraged
                results[name, "accumulated"] = fit(name, "adamw", accumulate=2)
            if name != "ddp-step-chooses":
                results[name, "balanced"] = fit(name, "adamw", "mean", balance=True)
        for name in ONE_MORE:
            results[name, "one more"] = fit(name, "adamw", one_more=True)
        for name in ("ddp", "fsdp2"):
            results[name, "resumed"] = resume(name, folder)
        torch.save(results, folder / "results.pt")
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)
