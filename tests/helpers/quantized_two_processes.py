"""Runs of two CPU processes (gloo) on a quantized base: `python quantized_two_processes.py FOLDER`."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import bitsandbytes
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_lora import LoRACallback, lora_state_dict
from tests.helpers.models import Block, Lit, checkpoints, data, trainer
from tests.helpers.quantized import WideNet, four_bits
from tests.helpers.strategy_runs import CPUFSDP, fsdp2
from tests.helpers.two_processes import all_equal, end


def eight_bits(layer: nn.Linear) -> nn.Module:
    quantized = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    quantized.load_state_dict(layer.state_dict())
    return quantized.to("cpu")


class Loaded(Lit):
    """Loads its quantized base in ``__init__``."""

    def __init__(self, storage: torch.dtype | None) -> None:
        super().__init__()
        self.storage, self.net = storage, None
        self.load()

    def load(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = WideNet()
        for block in self.net.layers:
            for key in ("q", "k", "v", "o", "mlp"):
                layer = getattr(block, key)
                few = eight_bits(layer) if self.storage is None else four_bits(layer, quant_storage=self.storage)
                setattr(block, key, few)


class Sharded(Loaded):
    """Shards it in `configure_model`, as ModelParallelStrategy wants it."""

    def configure_model(self) -> None:
        if not isinstance(self.net.up.weight, DTensor):
            for unit in (*self.net.layers, self.net):
                fully_shard(unit, mesh=self.device_mesh["data_parallel"])


def fsdp1() -> CPUFSDP:
    return CPUFSDP(auto_wrap_policy={Block})


RUNS = {
    "ddp": (Loaded, lambda: "ddp", torch.uint8),
    "ddp-8": (Loaded, lambda: "ddp", None),
    "fsdp1": (Loaded, fsdp1, torch.float32),
    "fsdp2": (Sharded, fsdp2, torch.uint8),
    "fsdp2-stored-as-float": (Sharded, fsdp2, torch.float32),
    "fsdp1-integers": (Loaded, fsdp1, torch.uint8),
    "fsdp1-other-dtype": (Loaded, fsdp1, torch.bfloat16),
    "fsdp1-8": (Loaded, fsdp1, None),
    "fsdp2-8": (Sharded, fsdp2, None),
}


def run(name: str, folder: Path) -> dict[str, object]:
    make, strategy, storage = RUNS[name]

    def fit(part: str, epochs: int, ckpt: object = None) -> dict[str, torch.Tensor]:
        module, files = make(storage), checkpoints(folder / name / part)
        runner = trainer(LoRACallback(r=4), files, max_epochs=epochs, devices=2, strategy=strategy())
        runner.fit(module, data(), data(1), ckpt_path=ckpt)
        return {key: value.clone() for key, value in lora_state_dict(module).items()}

    whole = fit("whole", 2)
    resumed = fit("resumed", 2, folder / name / "whole" / "epoch=0.ckpt")
    return {
        "state": whole,
        "equal ranks": all(all_equal(value) for value in whole.values()),
        "resumed": all(torch.equal(resumed[key], value) for key, value in whole.items()),
    }


def main(folder: Path) -> None:
    results = {}
    for name in RUNS:
        try:
            results[name] = run(name, folder)
        except MisconfigurationException as error:
            results[name] = {"refused": str(error)}
    torch.save(results, folder / f"results-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)
