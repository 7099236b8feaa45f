"""What an adapter costs: this package, peft, full fine-tuning and the bound, side by side in one run.

The bound is the same step with the backbone frozen and no adapter: nothing that trains through the backbone can be
faster. A decoder of Llama's shapes (random weights, bf16, AdamW) is trained for some steps, eager and under
torch.compile; then single layers forward and backward, a merged model, and the injection itself. It needs transformers
and peft, no network and no weights.

    python examples/benchmarks/speed.py                              # all of it; small sizes where there is no GPU
    python examples/benchmarks/speed.py --only eager layers          # sections
    python examples/benchmarks/speed.py --out speed                  # and writes speed_<date>.md

Every time is a median, on a GPU of windows of several steps that end in a synchronization. The rows of a section are
measured in turns; where their models do not fit into memory together, one after the other. A peak of memory is what a
row's own model and steps take.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, merge_lora
from lightning_lora.model.base_dtype import cast_by_autocast, lower

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZES = {
    "1.1 B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_key_value_heads": 8},
    "7 B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 8},
}
SECTIONS = ("eager", "compiled", "mixed", "launches", "layers", "merged", "injection")
QV = ["q_proj", "v_proj"]
EVERY = [*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Step = Callable[[], object]
Make = Callable[[], nn.Module]


def decoder(size: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    config = LlamaConfig(
        **SIZES[size], num_attention_heads=32, vocab_size=32000, use_cache=False, attn_implementation="sdpa"
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


def bound(size: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Frozen but for one vector at the bottom, so that the gradient goes as far as it does to the first adapter."""
    model = decoder(size, dtype).requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.requires_grad_()
    return model


def ours(size: str, targets: list[str], r: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = decoder(size, dtype)
    apply_lora(model, LoRAConfig(r=r, alpha=2 * r, targets=targets))
    return trained(model, [p for name, p in lora_parameters(model) if name.endswith("B")])


def by_peft(size: str, targets: list[str], r: int, wide: bool, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets)
    model = peft.get_peft_model(decoder(size, dtype), config, autocast_adapter_dtype=wide)
    return trained(model, [p for name, p in model.named_parameters() if "lora_B" in name])


def trained(model: nn.Module, every_B: list[nn.Parameter]) -> nn.Module:
    """As after some steps: a B of zeros makes products that a GPU does faster."""
    for B in every_B:
        nn.init.normal_(B, std=0.02)
    return model


def training(model: nn.Module, shape: tuple[int, int], mode: str) -> Step:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    run = torch.compile(model) if mode == "compiled" else model
    ids = torch.randint(0, 32000, shape, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mode == "mixed"):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def window(step: Step, count: int) -> float:
    """Milliseconds of one of ``count`` steps."""
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return (time.perf_counter() - start) / count * 1000


def clear() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def started(make: Make, shape: tuple[int, int], mode: str) -> tuple[Step, float]:
    """A model's step, warm, and the peak of GPU memory in GiB that it adds to what was there."""
    clear()
    before = torch.cuda.memory_allocated() if CUDA else 0
    step = training(make(), shape, mode)
    for _ in range(2):
        step()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    return step, (torch.cuda.max_memory_allocated() - before) / 2**30 if CUDA else 0.0


def together(makes: dict[str, Make], shape: tuple[int, int], mode: str) -> dict[str, tuple[float, float]]:
    found = {name: started(make, shape, mode) for name, make in makes.items()}
    times = in_turns({name: step for name, (step, _) in found.items()}, 4 if CUDA else 1, 9 if CUDA else 3)
    return {name: (times[name], peak) for name, (_, peak) in found.items()}


def models(title: str, makes: dict[str, Make], shape: tuple[int, int], mode: str = "eager") -> list[str]:
    torch._dynamo.reset()
    try:
        rows = together(makes, shape, mode)
    except torch.cuda.OutOfMemoryError:
        rows = {name: row for name, make in makes.items() for row in together({name: make}, shape, mode).values()}
    clear()
    base, full = rows["bound"][0], rows.get("full fine-tuning", (float("nan"),))[0]
    lines = [f"\n## {title}\n", "| | ms | of the bound's speed | against full | peak GiB |", "|---|---|---|---|---|"]
    for name, (ms, peak) in rows.items():
        against = "" if full != full else f"{full / ms:.2f}x"
        lines.append(f"| {name} | {ms:.1f} | {base / ms:.3f} | {against} | {peak:.2f} |")
    return lines


def eager() -> list[str]:
    size, shape = ("1.1 B", (8, 1024)) if CUDA else ("tiny", (2, 64))
    makes = {
        "bound": lambda: bound(size),
        "full fine-tuning": lambda: decoder(size),
        "peft, its default (fp32)": lambda: by_peft(size, EVERY, 16, True),
        "peft, bf16": lambda: by_peft(size, EVERY, 16, False),
        "lightning_lora": lambda: ours(size, EVERY, 16),
        "peft, bf16, q and v": lambda: by_peft(size, QV, 16, False),
        "lightning_lora, q and v": lambda: ours(size, QV, 16),
    }
    return models(f"Eager, {size}, {shape[0]} x {shape[1]} tokens, r = 16 on all projections", makes, shape)


def compiled() -> list[str]:
    size, shape = ("1.1 B", (8, 1024)) if CUDA else ("tiny", (2, 64))
    makes = {
        "bound": lambda: bound(size),
        "peft, bf16": lambda: by_peft(size, EVERY, 16, False),
        "lightning_lora": lambda: ours(size, EVERY, 16),
    }
    return models(f"torch.compile, {size}, {shape[0]} x {shape[1]} tokens, r = 16 everywhere", makes, shape, "compiled")


def mixed() -> list[str]:
    size, shape = ("1.1 B", (8, 1024)) if CUDA else ("tiny", (2, 64))

    def lowered() -> nn.Module:
        model = ours(size, EVERY, 16, torch.float32)
        lower(list(cast_by_autocast(model)), torch.bfloat16)
        return model

    makes = {
        "bound": lambda: bound(size, torch.float32),
        "full fine-tuning": lambda: decoder(size, torch.float32),
        "peft": lambda: by_peft(size, EVERY, 16, True, torch.float32),
        "lightning_lora": lambda: ours(size, EVERY, 16, torch.float32),
        'lightning_lora, base_dtype="bf16"': lowered,
    }
    return models(f"bf16-mixed, {size}, {shape[0]} x {shape[1]} tokens, r = 16 everywhere", makes, shape, "mixed")


def launches() -> list[str]:
    size, shape = ("7 B", (1, 512)) if CUDA else ("tiny", (1, 16))
    makes = {
        "bound": lambda: bound(size),
        "peft, bf16": lambda: by_peft(size, QV, 8, False),
        "lightning_lora": lambda: ours(size, QV, 8),
    }
    return models(f"Bound by launches: {size}, {shape[0]} x {shape[1]} tokens, r = 8 on q and v", makes, shape)


def layer_step(layer: nn.Module, x: Tensor) -> Step:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    inputs = [x, *parameters] if x.is_floating_point() else parameters
    gradient = torch.randn_like(layer(x).detach())
    return lambda: torch.autograd.grad(layer(x), inputs, gradient) if inputs else layer(x)


def adapted(layer: nn.Module, dropout: float) -> nn.Module:
    apply_lora(layer, LoRAConfig(r=16, alpha=32, targets=["0"], dropout=dropout))
    return trained(layer, [p for name, p in lora_parameters(layer) if name.endswith("B")])


def peft_adapted(layer: nn.Module, dropout: float, wide: bool) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"], lora_dropout=dropout)
    model = peft.get_peft_model(layer, config, autocast_adapter_dtype=wide).to(DEVICE)
    return trained(model, [p for name, p in model.named_parameters() if "lora_B" in name or "embedding_B" in name])


def layers() -> list[str]:
    rows, scale = 8192 if CUDA else 64, 1 if CUDA else 64
    wide = [size // scale for size in (4096, 14336)]

    def made(make: Make) -> Make:
        return lambda: nn.Sequential(make()).to(DEVICE, torch.bfloat16).requires_grad_(False)

    def tokens(features: int) -> Tensor:
        return torch.randn(rows, features, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    image = torch.randn(32 if CUDA else 2, 64, 56, 56, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    cases = {
        f"Linear {wide[0]} -> {wide[0]}": (lambda: nn.Linear(wide[0], wide[0], bias=False), tokens(wide[0]), 0.0),
        f"Linear {wide[0]} -> {wide[1]}": (lambda: nn.Linear(wide[0], wide[1], bias=False), tokens(wide[0]), 0.0),
        "the same, dropout 0.1": (lambda: nn.Linear(wide[0], wide[1], bias=False), tokens(wide[0]), 0.1),
        f"Linear {wide[1]} -> {wide[0]}, bias": (lambda: nn.Linear(wide[1], wide[0]), tokens(wide[1]), 0.0),
        "Conv2d 64 -> 128, 3 x 3, 56 x 56": (lambda: nn.Conv2d(64, 128, 3, padding=1), image, 0.0),
        f"Embedding 32000 x {wide[0]}": (
            lambda: nn.Embedding(32000, wide[0]),
            torch.randint(0, 32000, (rows,), device=DEVICE),
            0.0,
        ),
    }
    lines = ["\n## One layer, forward and backward, r = 16, bf16\n"]
    lines += ["| | frozen ms | lightning_lora | peft, bf16 | peft, its default |", "|---|---|---|---|---|"]
    for name, (make, x, dropout) in cases.items():
        clear()
        plain = made(make)
        steps = {
            "frozen": layer_step(plain(), x),
            "ours": layer_step(adapted(plain(), dropout), x),
            "peft": layer_step(peft_adapted(plain(), dropout, False), x),
            "peft wide": layer_step(peft_adapted(plain(), dropout, True), x),
        }
        found = in_turns(steps, 20 if CUDA else 2)
        ratios = " | ".join(f"{found[key] / found['frozen']:.3f}x" for key in ("ours", "peft", "peft wide"))
        lines.append(f"| {name} | {found['frozen']:.3f} | {ratios} |")
    return lines


def in_turns(steps: dict[str, Step], count: int, rounds: int = 9) -> dict[str, float]:
    for step in steps.values():
        for _ in range(2):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(window(step, count))
    return {name: statistics.median(each) for name, each in times.items()}


def merged() -> list[str]:
    size, shape = ("1.1 B", (8, 1024)) if CUDA else ("tiny", (2, 64))
    base, model = decoder(size).eval(), ours(size, EVERY, 16).eval()
    merge_lora(model)
    ids = torch.randint(0, 32000, shape, device=DEVICE)

    def inference(network: nn.Module) -> Step:
        def step() -> None:
            with torch.inference_mode():
                network(input_ids=ids)

        return step

    found = in_turns({"base": inference(base), "merged": inference(model)}, 3)
    same = [type(m) for m in base.modules()] == [type(m) for m in model.modules()]
    return [
        f"\n## After the merge, {size}, inference on {shape[0]} x {shape[1]} tokens\n",
        f"base {found['base']:.2f} ms, merged {found['merged']:.2f} ms ({found['merged'] / found['base']:.3f}x); "
        f"the same modules: {'yes' if same else 'NO'}",
    ]


def injection() -> list[str]:
    import peft

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return LlamaForCausalLM(LlamaConfig(**SIZES["7 B"], num_attention_heads=32, vocab_size=32000))

    def once(inject: Callable[[nn.Module], object]) -> float:
        model = on_meta()
        start = time.perf_counter()
        inject(model)
        return time.perf_counter() - start

    config = peft.LoraConfig(r=16, target_modules=EVERY)
    actions = {
        "apply_lora, by names": lambda model: apply_lora(model, LoRAConfig(r=16, targets=EVERY)),
        'apply_lora, targets="all"': lambda model: apply_lora(model, LoRAConfig(r=16, targets="all")),
        "peft.get_peft_model": lambda model: peft.get_peft_model(model, config, low_cpu_mem_usage=True),
    }
    lines = ["\n## Injection into 7 B shapes on the meta device, all projections\n", "| | s |", "|---|---|"]
    for name, action in actions.items():
        lines.append(f"| {name} | {statistics.median(once(action) for _ in range(3)):.3f} |")
    return lines


def versions() -> str:
    hardware = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"{hardware}, Python {platform.python_version()}, {listed}, {datetime.date.today()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS, help="which sections")
    parser.add_argument("--out", help="where to write the tables, without the date and .md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    out = Path(f"{arguments.out}_{datetime.date.today()}.md") if arguments.out else None
    lines = [versions()]
    print(lines[0], flush=True)
    for section in arguments.only:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            found = globals()[section]()
            lines += found
            print("\n".join(found), flush=True)
        if out is not None:  # an interrupted run keeps its sections
            out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
