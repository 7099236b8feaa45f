"""LoRA under every strategy of Lightning, beside full fine-tuning: step time, memory, and what a checkpoint costs.

A decoder of Llama's shapes (1.1 B parameters or 7 B, random weights, bf16), r = 16 on all of its linear maps, AdamW,
8 x 1024 tokens on each GPU. It needs transformers and GPUs, no network and no weights; a strategy that needs more than
is there is written down as not run.

    python examples/benchmarks/strategies.py --devices 1 2                    # prints the table
    python examples/benchmarks/strategies.py --devices 1 2 --out strategies   # and writes it to strategies_<date>.md
    python examples/benchmarks/strategies.py --devices 1 2 --size tiny        # a few thousand parameters, anywhere
    python examples/benchmarks/strategies.py --devices 1 2 4 8                # weak scaling; with four, hybrid sharding
    python examples/benchmarks/strategies.py --devices 1 8 --size 7b --only auto fsdp2
    python examples/benchmarks/strategies.py --devices 2 --only fsdp2 ddp     # those whose names hold one of these
    python examples/benchmarks/strategies.py --devices 2 --profile profiles   # and where each case spends a step

Each case is a process of its own for each device. A step is measured over windows of ten steps after a warm-up, the
median of them is shown; a save is one file with the state of the optimizer (of adapters the median of three), and its
host memory is what all processes together take more at its peak. At the end every rank must have the same adapters,
bit for bit, and the losses of DDP.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_lora import LoRACallback, lora_parameters

SIZES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
}
CASES = {
    1: ["auto lora", "auto full"],
    2: [
        *("ddp lora", "ddp full", "fsdp1 lora", "fsdp1 full", "fsdp2 lora", "fsdp2 full"),
        *("deepspeed-2 lora", "deepspeed-3 lora"),
    ],
    4: ["ddp lora", "fsdp1 lora", "fsdp2 lora", "fsdp2-hybrid lora"],
}
WARM, WINDOW, WINDOWS = 10, 10, 4
STEPS = WARM + WINDOW * WINDOWS
PROFILED = range(STEPS, STEPS + 3)  # steps, after those that are timed: a profiler slows what comes after it
TIMEOUT = 120  # seconds for a case


class Decoder(LightningModule):
    """A language model, made on its device; for FSDP2 it shards itself."""

    def __init__(self, size: str, kind: str) -> None:
        super().__init__()
        self.size, self.kind, self.model = size, kind, None
        self.losses: list[Tensor] = []

    def setup(self, stage: str) -> None:
        if self.kind.startswith("deepspeed"):  # in `configure_model` it would be drawn in parts, and another base
            self.build()

    def build(self) -> None:
        config = LlamaConfig(**SIZES[self.size], use_cache=False, attn_implementation="sdpa")
        torch.manual_seed(0)
        found = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # the same draws, whatever the strategy's context
        with torch.device(self.trainer.strategy.root_device):
            self.model = LlamaForCausalLM(config).to(torch.bfloat16).train()
        torch.set_default_dtype(found)

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.build()
        if self.kind.startswith("fsdp2"):
            mesh = self.device_mesh["data_parallel"]
            if self.kind == "fsdp2-hybrid":  # sharded over half of the GPUs, and the halves hold the same
                parts = (2, self.trainer.world_size // 2)
                mesh = init_device_mesh(self.device.type, parts, mesh_dim_names=("replicate", "shard"))
            for unit in (*self.model.model.layers, self.model):
                fully_shard(unit, mesh=mesh)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=self.device.type == "cuda")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock(Callback):
    """Times windows of steps, then a save and a load."""

    def __init__(self, folder: Path, profile: Path | None, saves: int) -> None:
        self.folder, self.profile, self.saves, self.windows, self.found = folder, profile, saves, [], {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if self.profile is not None and index == PROFILED.start:
            synchronize()
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        if WARM <= index < STEPS and (index - WARM) % WINDOW == 0:
            synchronize()
            self.start = time.perf_counter()
            if index == WARM and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if self.profile is not None and index == PROFILED.stop - 1:
            synchronize()
            self.profiler.stop()
            self.profile.write_text(spent(self.profiler.key_averages()))
        if WARM <= index < STEPS and (index - WARM) % WINDOW == WINDOW - 1:
            synchronize()
            self.windows.append((time.perf_counter() - self.start) / WINDOW * 1000)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
        self.found = {"ms": statistics.median(self.windows), "peak": peak}
        path = self.folder / "saved.ckpt"
        with HostMemory() as memory:
            saves = [timed(lambda: trainer.save_checkpoint(path))]
        self.found["host"] = total(memory.more / 2**20, module)
        saves += [timed(lambda: trainer.save_checkpoint(path)) for _ in range(self.saves - 1)]
        self.found["save"] = statistics.median(saves)
        self.found["bytes"] = sum(part.stat().st_size for part in files(path))
        self.found["load"] = timed(lambda: load(trainer, path))
        self.found["losses"] = [round(float(loss), 4) for loss in torch.stack(module.losses).tolist()]
        adapters = [parameter.detach().flatten() for _, parameter in lora_parameters(module)]
        self.found["equal"] = all_equal(torch.cat(adapters)) if adapters and "deepspeed" not in module.kind else None


def spent(averages: Any) -> str:
    """Where the profiled steps spend the device's time, and where the processor's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    orders = dict.fromkeys((f"self_{device}_time_total", "self_cpu_time_total"))
    return "\n".join(averages.table(sort_by=order, row_limit=25, max_name_column_width=60) for order in orders)


def files(path: Path) -> list[Path]:
    return [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]


def load(trainer: Any, path: Path) -> None:
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=False)
    trainer.strategy.load_model_state_dict(checkpoint, strict=True)


def timed(action: Any) -> float:
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def total(value: float, module: Any) -> float:
    """The sum over ranks."""
    values = torch.tensor(value, device=module.device)
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return float(values)


def all_equal(tensor: Tensor) -> bool:
    if not distributed.is_initialized():
        return True
    every = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, tensor.contiguous())
    return all(torch.equal(one, every[0]) for one in every)


class HostMemory:
    """How much more memory this process has at its peak than at the start, in bytes."""

    def __enter__(self) -> HostMemory:
        self.before = self.now()
        self.more, self.ended = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.ended.wait(0.002):
            self.more = max(self.more, self.now() - self.before)

    def now(self) -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def strategy(kind: str) -> Any:
    if kind == "fsdp1":
        return FSDPStrategy(auto_wrap_policy={LlamaDecoderLayer})
    if kind.startswith("fsdp2"):
        size = int(os.environ["STRATEGIES_DEVICES"])
        return ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    if kind.startswith("deepspeed"):
        return DeepSpeedStrategy(stage=int(kind[-1]))
    return kind


def run_case(case: str, devices: int, size: str, out: Path, profiles: Path | None) -> None:
    """One case, in a process of its own for each device; rank zero writes what it found."""
    os.environ["STRATEGIES_DEVICES"] = str(devices)
    kind, method = case.split()
    steps = STEPS if profiles is None else PROFILED.stop
    name = f"{case.replace(' ', '-')}-{devices}-{os.environ.get('LOCAL_RANK', 0)}.txt"
    clock = Clock(
        out.parent / case.replace(" ", "-"), None if profiles is None else profiles / name, 3 if method == "lora" else 1
    )
    lora = [LoRACallback(r=16, targets="all", merge=False)] if method == "lora" else []
    trainer = Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=devices,
        strategy=strategy(kind),
        precision="bf16-true",
        max_steps=steps,
        callbacks=[*lora, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch, length = (2, 16) if size == "tiny" else (8, 1024)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SIZES[size]["vocab_size"], (steps * batch * devices, length), generator=generator)
    trainer.fit(Decoder(size, kind), DataLoader(TensorDataset(ids), batch_size=batch))
    if trainer.is_global_zero:
        out.write_text(json.dumps(clock.found))
    sys.stdout.flush()
    os._exit(0)  # every rank has what it needs; process groups can hang at the end


def measure(case: str, devices: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The case in other processes, and what it found, or why it did not run."""
    kind = case.split()[0]
    if kind.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        return {"failed": "not run: deepspeed is not installed"}
    if not torch.cuda.is_available() and kind in ("fsdp1", "deepspeed-2", "deepspeed-3"):
        return {"failed": "not run: Lightning wants a GPU"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--case", case, "--devices", str(devices), "--found", str(out)]
        command += ["--size", arguments.size]
        command += [] if arguments.profile is None else ["--profile", str(arguments.profile)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"did not end in {TIMEOUT} s"}
        print(f"{case} on {devices}: {done.returncode}", file=sys.stderr, flush=True)
        if not out.exists():
            print(done.stderr[-4000:], file=sys.stderr, flush=True)
            return {"failed": next(reversed(done.stderr.strip().splitlines()), "failed")[:120]}
        return json.loads(out.read_text())


def row(case: str, devices: int, found: dict[str, Any], one: float | None) -> str:
    head = f"| {devices} | {case} |"
    if "failed" in found:
        return f"{head} {found['failed']} | | | | | | | |"
    throughput = "" if one is None else f"{devices * one / found['ms']:.2f}"
    equal = {True: "yes", False: "NO", None: ""}[found["equal"]]
    return (
        f"{head} {found['ms']:.1f} | {throughput} | {found['peak']:.2f} | {found['bytes'] / 1e6:,.1f} | "
        f"{found['save']:.3f} | {found['host']:,.0f} | {found['load']:.3f} | {equal} |"
    )


def versions() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    found = {"torch": torch.__version__, "lightning": lightning.__version__}
    for name in ("transformers", "deepspeed"):
        if importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(name)
    return f"{gpu} x {max(1, torch.cuda.device_count())}, Python {platform.python_version()}, " + ", ".join(
        f"{name} {version}" for name, version in found.items()
    )


def compare(results: dict[tuple[int, str], dict[str, Any]]) -> list[str]:
    """How far the losses of each sharded strategy are from DDP's, on as many devices."""
    lines = []
    for (devices, case), found in results.items():
        plain = results.get((devices, "ddp lora"), {})
        if case.endswith("lora") and case != "ddp lora" and "losses" in found and "losses" in plain:
            pairs = zip(found["losses"], plain["losses"], strict=True)
            worst = max(abs(one - other) / other for one, other in pairs)
            lines.append(f"Losses of {case} on {devices}: at most {worst:.2%} from DDP's in {STEPS} steps.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1], help="how many GPUs, one table for all")
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose names hold one of these")
    parser.add_argument("--size", choices=SIZES, default="1b", help="of the model; a tiny one tries the script")
    parser.add_argument("--out", help="where to write the table, without the date and .md")
    parser.add_argument("--profile", type=Path, help="a folder for what each rank spends three steps on")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        return run_case(arguments.case, arguments.devices[0], arguments.size, arguments.found, arguments.profile)
    if arguments.profile is not None:
        arguments.profile.mkdir(parents=True, exist_ok=True)
    results: dict[tuple[int, str], dict[str, Any]] = {}
    out = Path(f"{arguments.out}_{datetime.date.today()}.md") if arguments.out else None
    lines = [f"{versions()}, {datetime.date.today()}", ""]
    lines += [
        "| GPUs | case | ms a step | throughput of one | peak GPU GiB | file MB | save s | host MiB | load s | equal |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for devices in arguments.devices:
        for case in CASES[max(count for count in CASES if count <= devices)]:
            if any(part in case for part in arguments.only):
                found = results[devices, case] = measure(case, devices, arguments)
                alone = results.get((1, f"auto {case.split()[1]}"), {}).get("ms")
                lines.append(row(case, devices, found, alone))
                print(lines[-1], flush=True)
                if out is not None:  # an interrupted run keeps its rows
                    out.write_text("\n".join(lines) + "\n")
    text = "\n".join([*lines, "", *compare(results)])
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    return None


if __name__ == "__main__":
    main()
