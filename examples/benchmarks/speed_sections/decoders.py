"""Decoders of random weights with the shapes of Llama and Qwen, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from speed_sections.adapters import Case
from speed_sections.settings import DEVICE, Settings
from speed_sections.timing import Step
from speed_sections.training import drawn, training

QV = ["q_proj", "v_proj"]
EVERY = [*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA = {
    "1.1 B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "1.1 B, 4 of its 16 layers and a quarter of its vocabulary": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_key_value_heads": 8,
        "vocab_size": 8000,
    },
    "7 B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "7 B, 2 of its 32 layers": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 2,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_key_value_heads": 8,
        "vocab_size": 500,
    },
}
QWEN = {
    "0.5 B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936},
    "tiny": {"hidden_size": 56, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 500},
}
Prepare = Callable[[nn.Module], object]


def llama(size: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    config = LlamaConfig(**LLAMA[size], num_attention_heads=32, use_cache=False, attn_implementation="sdpa")
    return drawn(lambda: LlamaForCausalLM(config), dtype)


def qwen(size: str) -> nn.Module:
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    config = Qwen2Config(**QWEN[size], **heads, use_cache=False, tie_word_embeddings=True, attn_implementation="sdpa")
    return drawn(lambda: Qwen2ForCausalLM(config))


def first_norm(model: nn.Module) -> nn.Parameter:
    return model.model.layers[0].input_layernorm.weight


def step_of(shape: tuple[int, int], model: nn.Module, compiled: bool = False, autocast: bool = False) -> Step:
    """A step on ``shape`` tokens: batch, length."""
    ids = torch.randint(0, model.config.vocab_size, shape, device=DEVICE)
    return training(lambda call: call(input_ids=ids, labels=ids).loss, model, compiled, autocast)


def checkpointed_step(shape: tuple[int, int], model: nn.Module) -> Step:
    """The same, with activations recomputed as transformers does by default."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return step_of(shape, model)


def llama_shape(settings: Settings) -> tuple[str, tuple[int, int]]:
    """The size of the model that most sections train, and batch and length."""
    return ("tiny", (2, 64)) if settings.small else ("1.1 B", (8, 1024))


def llama_case(settings: Settings, r: int = 16, dropout: float = 0.0) -> Case:
    size, shape = llama_shape(settings)
    return Case(partial(llama, size), first_norm, partial(step_of, shape), EVERY, r, dropout)
