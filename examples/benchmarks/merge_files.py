"""Merging an adapter into a sharded bf16 checkpoint: memory and time of `lightning-lora merge` beside peft's.

A Llama of random weights is written into a temporary folder, with an adapter of rank 16 on every projection. Then each
way merges it in a process of its own: ours from files to files, peft by loading the model, `merge_and_unload` and
`save_pretrained`. Memory is the peak of the resident set above what it was after the imports. Needs transformers, peft,
Linux, and room on the disk for three times the model.

    python examples/benchmarks/merge_files.py                         # 7B: 13.5 GB
    python examples/benchmarks/merge_files.py --size 300m --out merge_files
    PYTHONPATH=. python examples/benchmarks/merge_files.py --tiny     # to try the script
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
    "300m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10, "vocab_size": 16000},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 500},
}
R, ALPHA = 16, 32
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
WAYS = ("lightning-lora merge", "peft merge_and_unload")


def shapes(size: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama, in the order of its blocks."""
    hidden, wide, vocab = size["hidden_size"], size["intermediate_size"], size["vocab_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(size["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        found |= {f"{block}.self_attn.{name}.weight": (hidden, hidden) for name in ATTENTION}
        found |= {f"{block}.mlp.{name}.weight": (wide, hidden) for name in MLP[:2]}
        found |= {f"{block}.mlp.down_proj.weight": (hidden, wide)}
        found |= {f"{block}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_base(folder: Path, size: dict[str, int], shard_bytes: int) -> int:
    """The model in shards with their index, one shard in memory at a time."""
    from transformers import LlamaConfig

    heads = max(1, size["hidden_size"] // 128)
    config = LlamaConfig(**size, num_attention_heads=heads, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    parts: list[list[str]] = [[]]
    total = held = 0
    for name, shape in shapes(size).items():
        count = 2 * torch.Size(shape).numel()
        if held and held + count > shard_bytes:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held, total = held + count, total + count
    weight_map = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        tensors = {name: torch.randn(shapes(size)[name]).mul_(0.02).bfloat16() for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_adapter(folder: Path, size: dict[str, int]) -> None:
    """Pairs on every projection, as after some training."""
    folder.mkdir()
    tensors = {}
    for name, shape in shapes(size).items():
        path = name.removesuffix(".weight")
        if path.endswith("_proj"):
            tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(R, shape[1]) / shape[1] ** 0.5
            tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(shape[0], R) * 1e-3
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": [*ATTENTION, *MLP], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.0, "task_type": "CAUSAL_LM"}))


def ours(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    from lightning_lora.cli.merge import merge_files

    start = measured()
    report = merge_files(base, adapter, out)
    return measured(start) | {"lost": report.lost()}


def peft(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    start = measured()
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return measured(start)


def measured(start: dict[str, float] | None = None) -> dict[str, float]:
    """Now; or seconds and MiB at the peak since ``start``."""
    if start is None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        return {"time": time.perf_counter(), "mib": memory("VmRSS")}
    return {"seconds": time.perf_counter() - start["time"], "mib": memory("VmHWM") - start["mib"]}


def memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def run(way: str, folder: Path, cores: int | None) -> dict[str, Any]:
    """One way in a process of its own."""
    command = [sys.executable, __file__, "--run", way, "--folder", str(folder)]
    command += [] if cores is None else ["--cores", str(cores)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def limit_cores(count: int) -> None:
    """Leave this process ``count`` cores, and torch as many threads."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    torch.set_num_threads(count)


def tensors_in(folder: Path) -> dict[str, Path]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def differing(one: Path, other: Path) -> float:
    """The share of numbers that differ between two models."""
    first, second = tensors_in(one), tensors_in(other)
    assert first.keys() == second.keys()
    unequal = total = 0
    for name in first:
        with safe_open(first[name], "pt") as a, safe_open(second[name], "pt") as b:
            x, y = a.get_tensor(name), b.get_tensor(name)
        unequal, total = unequal + int((x != y).sum()), total + x.numel()
    return unequal / total


def versions() -> str:
    names = ("torch", "safetensors", "transformers", "peft")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, {found}"


@dataclass
class Comparison:
    """What both ways took, and how far their models differ."""

    bytes: int
    shards: int
    ways: dict[str, dict[str, Any]]
    unequal: float

    def lines(self) -> list[str]:
        """The table, in Markdown."""
        size = f"{self.bytes / 2e6:,.0f} M parameters in bf16, {self.bytes / 1e6:,.0f} MB in {self.shards} files"
        lines = [f"A Llama of {size}; rank {R}.", "", "| way | peak memory MiB | seconds |", "|---|---|---|"]
        lines += [f"| {way} | {took['mib']:,.0f} | {took['seconds']:.1f} |" for way, took in self.ways.items()]
        lost = self.ways[WAYS[0]]["lost"]
        return [
            *lines,
            "",
            f"Rounding to bf16 lost {lost:.1%} of delta's norm. {self.unequal:.2%} of all numbers differ.",
        ]


def compare(size: str, cores: int | None = None) -> Comparison:
    """Write a model of ``size`` and an adapter, and merge them both ways on ``cores`` cores; ``None`` takes all."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = write_base(folder / "base", SIZES[size], 1_000_000_000 if size in ("7b", "1b") else 100_000_000)
        write_adapter(folder / "adapter", SIZES[size])
        shards = len(list((folder / "base").glob("*.safetensors")))
        ways = {way: run(way, folder, cores) for way in WAYS}
        return Comparison(total, shards, ways, differing(*(folder / way for way in WAYS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b", help="of the model")
    parser.add_argument("--tiny", action="store_const", const="tiny", dest="size", help="the same as --size tiny")
    parser.add_argument("--cores", type=int, help="how many cores each way has; all, if it is left out")
    parser.add_argument("--out", help="where to write the table, without the date and .md")
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        if arguments.cores is not None:
            limit_cores(arguments.cores)
        way = ours if arguments.run == WAYS[0] else peft
        places = [arguments.folder / name for name in ("base", "adapter", arguments.run)]
        print(json.dumps(way(*places)))
        return
    lines = [f"{versions()}, {datetime.date.today()}", "", *compare(arguments.size, arguments.cores).lines()]
    print("\n".join(lines))
    if arguments.out:
        Path(f"{arguments.out}_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
