"""What the merge of adapters on a 4-bit base costs: the loss of SmolLM2-135M on held-out text after each kind of merge.

`python examples/benchmarks/qlora_merge.py` trains LoRA on an NF4 base and the novels of Jane Austen, a few minutes on a
CPU, and then measures the loss per token of held-out windows: as trained, merged into the dequantized base and into
the original weights (in fp32, and rounded to bf16), and of the merged models put into NF4 again. The differences are
paired: window by window from the model as it was trained.

`--steps`, `--seeds`, `--windows` and `--out` choose a longer or a shorter study; `--data` names the folder with the
model and the tokens, as `python examples/findings.py` writes it. It needs bitsandbytes and gguf.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bitsandbytes
import torch
from austen_runs import Setting, Study, data_folder, load_base
from safetensors.torch import save_file
from torch import nn

from lightning_lora import apply_lora, lora_parameters, merge_lora, remove_lora, unmerge_lora

CPU = {"targets": "qkvo", "r": 16, "alpha": 16.0, "rate": 2e-3, "steps": 60}
PACKAGES = ("torch", "bitsandbytes", "transformers", "lightning-lora")
AS_TRAINED = "NF4 and adapters, as trained"
Losses = dict[str, list[float]]


class QuantizedStudy(Study):
    """As :class:`Study`, on the base in NF4, everything else in fp32.

    Args:
        folder: of the model and the tokens.
        original: file to write the model in full precision to.
        windows: how many held-out windows to take, at most.
    """

    def __init__(self, folder: Path, original: Path, windows: int) -> None:
        device, self.original = "cuda" if torch.cuda.is_available() else "cpu", original
        super().__init__(folder, model=load_base(folder).to(device))
        self.held_out = self.held_out[:: -(-len(self.held_out) // windows)]
        self.plain_loss = statistics.fmean(self.losses())
        state = self.model.state_dict()
        save_file({name: value for name, value in state.items() if name != "lm_head.weight"}, original)  # it is tied
        quantize(self.model)

    def measure(self, setting: Setting) -> Losses:
        """Train adapters, and measure every way to merge them; the model is as it was afterwards."""
        apply_lora(self.model, setting.config)
        # Without adapters an evaluation on a CPU would pack the weights anew, and round their blocks.
        self.base_loss = statistics.fmean(self.losses())
        self.fit([parameter for _, parameter in lora_parameters(self.model)], setting)
        losses = {AS_TRAINED: self.losses()}
        for words, merge in {
            "the dequantized base": lambda: merge_lora(self.model, dequantize=True),
            "the original weights": lambda: merge_lora(self.model, base=self.original),
        }.items():
            merge()
            losses[f"merged into {words}"] = self.losses()
            for way, change in {"rounded to bf16": to_bf16, "put into NF4 again": to_nf4}.items():
                with Changed(self.model, change):
                    losses[f"merged into {words}, {way}"] = self.losses()
            unmerge_lora(self.model)
        remove_lora(self.model)
        return losses


def quantize(model: nn.Module) -> None:
    """Put every linear layer of the decoder into NF4 with double quantization, as QLoRA does."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith("_proj"):
            sizes, device = (layer.in_features, layer.out_features), layer.weight.device
            few = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            few.load_state_dict(layer.cpu().state_dict())
            model.set_submodule(name, few.to(device))


class Changed:
    """Inside the ``with`` block the weights of the linear layers of ``model`` are what ``change`` makes of them."""

    def __init__(self, model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.weights = [weight for name, weight in model.named_parameters() if "_proj." in name]
        self.change = change

    def __enter__(self) -> None:
        self.before = [weight.detach().clone() for weight in self.weights]
        self.write(self.change(weight.detach()) for weight in self.weights)

    def __exit__(self, *_: object) -> None:
        self.write(self.before)

    def write(self, values: Iterator[torch.Tensor] | list[torch.Tensor]) -> None:
        with torch.no_grad():
            for weight, value in zip(self.weights, values, strict=True):
                weight.copy_(value)


def to_bf16(weight: torch.Tensor) -> torch.Tensor:
    return weight.bfloat16()


def to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What NF4 with double quantization makes of a weight, as the base was quantized."""
    packed = bitsandbytes.functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return bitsandbytes.functional.dequantize_4bit(*packed)


def table(records: Sequence[dict]) -> str:
    """The mean loss over seeds of each model, and its difference from the model as trained, with its standard error."""
    first = records[0]
    lines = ["| model | loss per token | difference, with standard error |", "|---|---|---|"]
    lines += [f"| {name} | {first[key]:.4f} | |" for name, key in BASES.items()]
    for name in first["losses"]:
        means = [statistics.fmean(record["losses"][name]) for record in records]
        lines.append(f"| {name} | {statistics.fmean(means):.4f} | {difference(records, name)} |")
    return "\n".join(lines)


BASES = {"original weights, no adapters": "plain_loss", "NF4, no adapters": "base_loss"}


def difference(records: Sequence[dict], name: str) -> str:
    if name == AS_TRAINED:
        return ""
    pairs = [
        now - trained
        for record in records
        for now, trained in zip(record["losses"][name], record["losses"][AS_TRAINED], strict=True)
    ]
    return f"{statistics.fmean(pairs):+.4f} ± {statistics.stdev(pairs) / math.sqrt(len(pairs)):.4f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the model and the tokens")
    parser.add_argument("--steps", type=int, default=CPU["steps"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--windows", type=int, default=10_000, help="held-out windows, at most")
    parser.add_argument("--out", type=Path, help="file of JSON lines to write")
    parser.add_argument("--report", type=Path, help="print the table of such a file, and stop")
    options = parser.parse_args(arguments)
    if options.report is not None:
        print(table([json.loads(line) for line in options.report.read_text().splitlines()]))
        return 0
    folder, start, records = data_folder(options.data), time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        study = QuantizedStudy(folder, Path(scratch) / "original.safetensors", options.windows)
        for seed in range(options.seeds):
            losses = study.measure(Setting(**{**CPU, "steps": options.steps}, seed=seed))
            about = {"plain_loss": study.plain_loss, "base_loss": study.base_loss, "seed": seed, "steps": options.steps}
            records.append({**about, "device": device_name(study.device), "losses": losses})
            if options.out is not None:
                options.out.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    versions = ", ".join(map(version_of, PACKAGES))
    print(f"{records[0]['device']}, {versions}; {options.steps} steps, {time.perf_counter() - start:.0f} s\n")
    print(table(records))
    return 0


def version_of(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # as where the folder of the clone is on the path
        return f"no installed {package}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"


if __name__ == "__main__":
    sys.exit(main())
