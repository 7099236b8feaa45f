"""Two CPU processes (gloo) that save and load one sharded adapter: `python peft_two_processes.py FOLDER`."""

from __future__ import annotations

import socket
import sys
import tempfile

import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard

from lightning_lora import LoRAConfig, apply_lora, load_adapter, merge_lora, save_adapter


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2), nn.Linear(2, 2))


def run(rank: int, port: int, folder: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = net()
    apply_lora(model, LoRAConfig(r=2, targets=["0", "1"], also_train=["2", "3"]))
    with torch.no_grad():
        model[0].lora.default.B.fill_(0.5)
    expected = {name: value.detach().clone() for name, value in model.state_dict().items()}
    fully_shard(model[0])
    fully_shard(model)
    save_adapter(model, folder)
    tensors = load_file(f"{folder}/adapter_model.safetensors")  # the second process waited for the first
    assert torch.equal(tensors["base_model.model.0.lora_A.weight"], expected["0.lora.default.A"])
    assert torch.equal(tensors["base_model.model.2.weight"], expected["2.weight"])
    load_adapter(model, folder)
    bare = net()
    load_adapter(bare, folder)
    assert torch.equal(bare[0].lora.default.B, expected["0.lora.default.B"])
    merge_lora(model)
    save_adapter(model, folder)
    load_adapter(net(), folder)
    distributed.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            run, (port, sys.argv[1] if len(sys.argv) > 1 else folder), nprocs=2, start_method="fork"
        )
