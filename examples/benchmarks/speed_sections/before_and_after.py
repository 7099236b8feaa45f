"""Before the first step the injection, and after the last one the inference of the merged model."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, merge_lora
from speed_sections.adapters import adapted
from speed_sections.bars import at_most
from speed_sections.comparison import heading, one_column
from speed_sections.decoders import EVERY, LLAMA, llama, llama_shape
from speed_sections.settings import DEVICE, Settings, compute_argument
from speed_sections.timing import in_turns, seconds

BASE = "base"


def injection(settings: Settings) -> list[str]:
    import peft

    size = "tiny" if settings.tiny else "7 B"

    def once(inject: Callable[[nn.Module], object]) -> float:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**LLAMA[size], num_attention_heads=32))
        return seconds(lambda: inject(model))

    def ours(compute: str) -> float:
        config = LoRAConfig(r=16, targets=EVERY)
        return once(lambda model: apply_lora(model, config, **compute_argument(compute)))

    def by_peft() -> float:
        config = peft.LoraConfig(r=16, target_modules=EVERY)
        return once(lambda model: peft.get_peft_model(model, config, low_cpu_mem_usage=True))

    actions = {"peft": by_peft, **settings.ours(ours)}
    times = {name: statistics.median(action() for _ in range(3)) for name, action in actions.items()}
    title = f"Injection into shapes of Llama, {size}, on the meta device, all projections"
    bars = [at_most(f"{name}, time over peft's", times[name] / times["peft"], 1) for name in settings.names()]
    return [*one_column(title, settings.tiny, "s", times), *bars]


def inference(settings: Settings) -> list[str]:
    size, shape = llama_shape(settings)
    ids = torch.randint(0, LLAMA[size]["vocab_size"], shape, device=DEVICE)

    def merged(compute: str) -> nn.Module:
        model = adapted(llama(size), LoRAConfig(r=16, targets=EVERY), compute)
        merge_lora(model)
        return model.eval()

    @torch.inference_mode()
    def forward(model: nn.Module) -> None:
        model(input_ids=ids)

    models = {BASE: llama(size).eval(), **{name: make() for name, make in settings.ours(merged).items()}}
    steps = {name: lambda model=model: forward(model) for name, model in models.items()}
    for step in steps.values():
        step()
    times = in_turns(steps, settings.windows(5, 3))
    title = f"Inference after the merge, shapes of Llama, {size}, {shape[0]} x {shape[1]} tokens"
    lines = [*heading(title, settings.small), "| | ms | the classes of the base |", "|---|---|---|"]
    classes = {name: [type(module) for module in model.modules()] for name, model in models.items()}
    for name, ms in times.items():
        lines.append(f"| {name} | {ms:.2f} | {'yes' if classes[name] == classes[BASE] else 'NO'} |")
    bars = [at_most(f"{name}, time over the base's", times[name] / times[BASE], 1.01) for name in settings.names()]
    return [*lines, "", *bars]
