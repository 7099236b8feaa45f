"""The contents of a PEFT directory for vLLM, which reads one rank and one scale and adapts linear layers only."""

from __future__ import annotations

from dataclasses import replace

from lightning_lora.peft_format.attention import INSIDE, attention_around
from lightning_lora.peft_format.contents import Contents
from lightning_lora.peft_format.layers import padded

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM accepts


def for_vllm(contents: Contents) -> Contents:
    """The same contents with one rank and one scale for all layers, as vLLM reads only these.

    Raises:
        ValueError: naming what vLLM refuses.
    """
    for key in contents.plain:
        raise ValueError(f"`{key}` is not part of a pair, and vLLM takes neither `also_train`, biases nor buffers.")
    for name, pair in contents.pairs.items():
        in_attention = f"{name}{INSIDE}" in contents.pairs or attention_around(name) is not None
        if in_attention or pair.A.dim() > 2 or pair.keys[0] != "lora_A.weight":
            raise ValueError(
                f"`{name}` is no linear layer, and vLLM adapts linear layers only: leave it out with `exclude`."
            )
    largest = max(pair.r for pair in contents.pairs.values())
    rank = next((allowed for allowed in RANKS if allowed >= largest), None)
    if rank is None:
        raise ValueError(f"A pair has rank {largest}, and vLLM takes ranks up to {RANKS[-1]}.")
    scales = {pair.scale for pair in contents.pairs.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    pairs = {name: padded(pair, rank, scale) for name, pair in contents.pairs.items()}
    return replace(contents, pairs=pairs)
