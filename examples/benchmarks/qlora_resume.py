"""A run on a base in four bits is killed, resumed to the same bits, and merged: its outputs are those of the sum.

    python examples/benchmarks/qlora_resume.py                    # a model with the shapes of Llama-2-7B, on a GPU
    python examples/benchmarks/qlora_resume.py --out qlora_resume # appends to qlora_resume_<date>.md
    python examples/benchmarks/qlora_resume.py --size "7 B, 2 of its 32 layers"   # takes minutes on a CPU
    python examples/benchmarks/qlora_resume.py --tiny             # to try the script

The model has random weights, in NF4 with double quantization, and trains 50 steps through Lightning, with shuffled
batches and dropout in the adapters. A second process does the same at the same time and kills itself in step 25. A
third run resumes it from its checkpoint of step 20; then its adapters are merged into the dequantized weights.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from speed import versions, write
from speed_sections.decoders import llama
from speed_sections.four_bits import in_nf4
from speed_sections.settings import CUDA, DEVICE
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, lora_parameters, merge_lora

STEPS, STEPS_OF_EPOCH, KILLED_IN = 50, 10, 25
KILLED, RESUMED = "killed", "resumed"
SHAPES = {"7 B": (1, 256), "7 B, 2 of its 32 layers": (2, 16), "tiny": (2, 16)}  # batch, tokens


class Decoder(LightningModule):
    """A language model on a base that is quantized when it is made, as transformers loads one."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.network, self.losses = in_nf4(llama(size)), []

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        loss: Tensor = self.network(input_ids=ids, labels=ids).loss
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Killed(Callback):
    """Kills its own process, as a machine that is taken away does."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == KILLED_IN - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def batches(size: str, vocabulary: int) -> DataLoader:
    batch, length = SHAPES[size]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (STEPS_OF_EPOCH * batch, length), generator=generator)
    return DataLoader(ids, batch_size=batch, shuffle=True)


def fit(role: str, size: str, folder: Path) -> Decoder:
    """Train as ``role``; a killed run does not return."""
    seed_everything(3, verbose=False)
    module = Decoder(size)
    files = ModelCheckpoint(folder / role)
    trainer = Trainer(
        max_epochs=STEPS // STEPS_OF_EPOCH,
        accelerator="gpu" if CUDA else "cpu",
        devices=1,
        callbacks=[
            LoRACallback(r=8, targets="all", dropout=0.05, merge=False),
            files,
            *[Killed()] * (role == KILLED),
        ],
        deterministic="warn",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = batches(size, module.network.config.vocab_size)
    file = next((folder / KILLED).glob("*.ckpt")) if role == RESUMED else None
    trainer.fit(module, data, ckpt_path=file)
    return module


def result_of(module: Decoder) -> dict[str, Any]:
    adapters = {name: parameter.detach().cpu() for name, parameter in lora_parameters(module)}
    return {"losses": torch.stack(module.losses).cpu(), "adapters": adapters}


@torch.no_grad()
def merged(network: nn.Module, size: str) -> dict[str, float]:
    """Relative differences of the outputs of the merged model to those of the sum, and of the model with adapters.

    The first is taken in fp32: in bf16 the layers make a last bit of one weight as large as any rounding.
    """
    ids = torch.randint(0, network.config.vocab_size, SHAPES[size], device=DEVICE)
    with_adapters = network(input_ids=ids).logits
    sums = {name: written_out(layer) for name, layer in network.named_modules() if hasattr(layer, "lora")}
    merge_lora(network, dequantize=True, undo=False)
    of_merged = network(input_ids=ids).logits
    dtype, of_merged_fp32 = of_merged.dtype, network.float()(input_ids=ids).logits
    other = sum(int((network.get_submodule(name).weight != value).sum()) for name, value in sums.items())
    for name, value in sums.items():
        network.get_submodule(name).weight = nn.Parameter(value.float())
    of_sums_fp32 = network(input_ids=ids).logits
    of_sums = network.to(dtype)(input_ids=ids).logits
    return {
        "of merged, in fp32": difference(of_merged_fp32, of_sums_fp32),
        "of merged": difference(of_merged, of_sums),
        "of bf16": difference(of_sums, of_sums_fp32),
        "of adapted": difference(with_adapters, of_sums),
        "rounded otherwise": other / sum(value.numel() for value in sums.values()),
    }


def written_out(layer: Any) -> Tensor:
    """``W0 + scale * B A`` in fp64, in the dtype of the other parameters; bitsandbytes itself computes W0."""
    from bitsandbytes.functional import dequantize_4bit

    pair, weight = layer.lora.default, layer.weight
    base = dequantize_4bit(weight.data, weight.quant_state).double()
    return (base + pair.scale * pair.B.double() @ pair.A.double()).to(layer.compute_dtype)


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def sentences(whole: dict[str, Any], resumed: dict[str, Any], outputs: dict[str, float]) -> list[str]:
    rest, losses = len(resumed["losses"]), whole["losses"]
    same = all(torch.equal(value, resumed["adapters"][name]) for name, value in whole["adapters"].items())
    return [
        f"Adapters after {STEPS} steps, resumed after step {STEPS - rest}: {words(same)} as without an interruption "
        f"({len(whole['adapters'])} tensors).",
        f"Losses of these {rest} steps: {words(torch.equal(losses[-rest:], resumed['losses']))} "
        f"(the first of all {float(losses[0]):.4f}, the last {float(losses[-1]):.4f}).",
        f"Outputs of the merged model, relative difference to those of the sum written out in fp64, both computed in "
        f"fp32: {outputs['of merged, in fp32']:.1e}; both in bf16: {outputs['of merged']:.1e}. Of the model with "
        f"adapters, in bf16: {outputs['of adapted']:.1e}. Of the sum in bf16 to itself in fp32: "
        f"{outputs['of bf16']:.1e}. Weights that the two sums round to different numbers: "
        f"{100 * outputs['rounded otherwise']:.5f} %.",
    ]


def words(same: bool) -> str:
    return "the same bits" if same else "DIFFERENT"


def killed_process(size: str, folder: Path) -> subprocess.Popen[bytes]:
    """The run that kills itself, which goes on while this process does the uninterrupted one."""
    command = [sys.executable, __file__, "--killed", str(folder), "--size", size]
    return subprocess.Popen(command)


def runs(size: str, folder: Path) -> list[str]:
    """All runs, in sentences."""
    lines, start = [], time.perf_counter()
    process = killed_process(size, folder)
    whole = result_of(fit("uninterrupted", size, folder))
    code = process.wait()
    if code != -signal.SIGKILL:
        raise SystemExit(f"The run that should be killed ended with {code}.")
    print(f"trained and killed after {time.perf_counter() - start:.0f} s", flush=True)
    module = fit(RESUMED, size, folder)
    print(f"resumed after {time.perf_counter() - start:.0f} s", flush=True)
    resumed = result_of(module)
    lines = sentences(whole, resumed, merged(module.network.to(DEVICE).eval(), size))
    return [*lines, f"({time.perf_counter() - start:.0f} s)"]


def main(words: list[str] | None = None) -> int:
    """Run all three and compare them; 1 if what should be equal is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="where to append the result, without the date and .md")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--size", choices=SHAPES, help="of the model; 7 B on a GPU, else tiny")
    parser.add_argument("--killed", help=argparse.SUPPRESS)  # the folder of the process that is killed
    arguments = parser.parse_args(words)
    size = "tiny" if arguments.tiny else arguments.size or ("7 B" if CUDA else "tiny")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is then deterministic
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.killed:
        fit(KILLED, size, Path(arguments.killed))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        lines = runs(size, Path(folder))
    batch, length = SHAPES[size]
    title = f"## Killed and resumed: shapes of Llama-2, {size}, NF4, {batch} x {length} tokens, r = 8 on all"
    out = Path(f"{arguments.out}_{datetime.date.today()}.md") if arguments.out else None
    write([versions("bitsandbytes"), "", title, "", *lines], out)
    return int(any("DIFFERENT" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
