"""Two CPU processes (gloo) train a tower under torch's DDP, on both sides: ``python weight_side_two_processes.py``.

Each rank compares its gradients with the mean of those of both ranks, written out in fp64.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.oracles import assert_close
from tests.helpers.two_processes import end
from tests.helpers.weight_side import WrittenOut, X, tower

# The layers that each rank calls, how they are checkpointed, and the arguments of DDP.
CASES: dict[str, tuple[Sequence[Sequence[int]], bool | None, dict[str, bool]]] = {
    "all": ([[0, 1, 2], [0, 1, 2]], None, {}),
    "unused by all": ([[0, 2], [0, 2]], None, {"find_unused_parameters": True}),
    "unused by one": ([[0, 1, 2], [0, 2]], None, {"find_unused_parameters": True}),
    "other order": ([[0, 1, 2], [2, 1, 0]], None, {"find_unused_parameters": True}),
    "static graph": ([[0, 1, 2], [0, 1, 2]], None, {"static_graph": True}),
    "static graph, unused": ([[0, 2], [0, 2]], None, {"static_graph": True}),
    "static graph, called twice": ([[0, 1, 0, 2], [0, 1, 0, 2]], None, {"static_graph": True}),
    "reentrant": ([[0, 1, 2], [0, 1, 2]], True, {}),
    "reentrant, static graph": ([[0, 1, 0, 2], [0, 1, 0, 2]], True, {"static_graph": True}),
    "saved tensors": ([[0, 1, 2], [0, 1, 2]], False, {}),
    "saved tensors, unused": ([[0, 2], [0, 1]], False, {"find_unused_parameters": True}),
    "saved tensors, static graph": ([[0, 1, 0], [0, 1, 0]], False, {"static_graph": True}),
    "views": ([[0, 2], [0, 2]], None, {"find_unused_parameters": True, "gradient_as_bucket_view": True}),
}


def expected_gradients(model: torch.nn.Module, orders: Sequence[Sequence[int]], passes: int) -> WrittenOut:
    """The mean of the gradients of both ranks, after a number of passes that accumulate."""
    expected = WrittenOut(model)
    loss = sum(
        expected(X + rank + 2 * n, order).square().sum() / 2 for n in range(passes) for rank, order in enumerate(orders)
    )
    loss.backward()
    return expected


def check(name: str, side: str, rank: int) -> None:
    """Three steps, of which the second accumulates over two passes."""
    orders, use_reentrant, arguments = CASES[name]
    model = tower(side)
    parallel = DistributedDataParallel(model, **arguments)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.3)
    for passes in (1, 1 if "static_graph" in arguments else 2, 1):
        optimizer.zero_grad()
        expected = expected_gradients(model, orders, passes)
        for n in range(passes):
            with parallel.no_sync() if n < passes - 1 else nullcontext():
                x = (X + rank + 2 * n).requires_grad_()
                parallel(x, orders[rank], use_reentrant=use_reentrant).square().sum().backward()
        for key, parameter in model.named_parameters():
            leaf = expected.leaves[key]
            if leaf.grad is None:
                assert parameter.grad is None or not parameter.grad.any(), (name, side, key)
                assert parameter.grad is None or "static_graph" in arguments, (name, side, key)
            else:
                assert_close(parameter.grad, leaf.grad, torch.float32)
        optimizer.step()


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo", init_method=(Path(folder) / "rendezvous").as_uri(), rank=rank, world_size=2
        )
        for name in CASES:
            for side in ("activations", "weights"):
                try:
                    check(name, side, rank)
                except Exception as error:
                    raise AssertionError(f"{name}, on the side of the {side}") from error
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as rendezvous:
        processes = [
            multiprocessing.get_context("fork").Process(target=run, args=(rank, rendezvous)) for rank in (0, 1)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        sys.exit(max(abs(process.exitcode or 0) for process in processes))
