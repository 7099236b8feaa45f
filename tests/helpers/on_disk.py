"""Models and adapters in files for the tests, made without the package."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."


def values(*shape, seed=0, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator)).to(dtype)


def base_tensors(dtype=torch.float32):
    """A small decoder: an embedding, two blocks with attention and MLP, a norm and a head."""
    found = {
        "model.embed_tokens.weight": values(20, 8, seed=1, dtype=dtype),
        "model.norm.weight": torch.ones(8).to(dtype),
    }
    for layer in range(2):
        for number, (name, shape) in enumerate(
            {
                "self_attn.q_proj": (8, 8),
                "self_attn.v_proj": (4, 8),
                "mlp.up_proj": (12, 8),
                "mlp.down_proj": (8, 12),
            }.items()
        ):
            found[f"model.layers.{layer}.{name}.weight"] = values(*shape, seed=10 * layer + number + 2, dtype=dtype)
    return found | {"lm_head.weight": values(20, 8, seed=99, dtype=dtype)}


def write_base(folder: Path, tensors, shards=1, config=None):
    """A directory as transformers writes it: one file, or shards with an index; config.json and a tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False} if config is None else config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def pair(out_features, in_features, r=3, seed=50, size=0.3):
    return values(r, in_features, seed=seed, size=size), values(out_features, r, seed=seed + 1, size=size)


def write_adapter(folder: Path, pairs, whole=None, metadata=None, **config):
    """A PEFT directory of ``pairs``: A and B by the map's name."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, (A, B) in pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = A, B
    tensors |= {PREFIX + name: value for name, value in (whole or {}).items()}
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors", metadata
    )
    said = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(pairs), "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def attention_pairs():
    """Pairs of every query and value map of the small decoder."""
    return {
        f"model.layers.{layer}.self_attn.{name}": pair(out, 8, seed=100 + 10 * layer + out)
        for layer in range(2)
        for name, out in (("q_proj", 8), ("v_proj", 4))
    }


def everything_in(folder: Path):
    """Every tensor of the safetensors files in a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def listing(folder: Path):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
