"""Weights that a model uses twice, its embedding and its output head, told from what is on disk.

A live model knows by object which of its modules share a parameter. In files one name holds the tensor, or both do and
the loader takes the embedding's.
"""

from __future__ import annotations

import re

from lightning_lora.cli.meta_model import is_embedding
from lightning_lora.files.weights import Weights

HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|output_projection|(?:predictions|lm_head)\.decoder)")
MODELS_WITH_HEAD = re.compile(r".*(?:LMHeadModel|ForCausalLM|ForMaskedLM|ForConditionalGeneration|ForPreTraining)")
APART = (
    "Make them two tensors in the base first: load it, give the head a copy of its weight, set "
    "`tie_word_embeddings=False` in its configuration, and save it."
)


def why_tied(name: str, base: Weights) -> str | None:
    """Why the map ``name`` of ``base`` cannot have an update of its own, and what to do; ``None`` where it can.

    Args:
        name: of the module, as in the base.
        base: the model; its ``config.json`` says whether the two are tied, and where it says nothing a language model
            without a tensor for its head is taken to be tied.
    """
    head = HEAD.fullmatch(name)
    if not (head or (is_embedding(name) and _is_token_embedding(name, base))) or not _is_tied(base):
        return None
    other = "the input embedding" if head else "the output head"
    return f"`{name}` is tied to {other}: they are one tensor, and merging into it would change both. {APART}"


def _is_tied(base: Weights) -> bool:
    inner = base.config.get("text_config")
    for config in (base.config, inner if isinstance(inner, dict) else {}):
        if config.get("tie_word_embeddings") is not None:
            return bool(config["tie_word_embeddings"])
    language = any(MODELS_WITH_HEAD.fullmatch(str(kind)) for kind in base.config.get("architectures") or [])
    return language and not any(HEAD.fullmatch(key.removesuffix(".weight")) for key in base.tensors)


def _is_token_embedding(name: str, base: Weights) -> bool:
    """Whether ``name`` is the embedding with a row for each token: the largest one."""
    sizes = {key: t.numel() for key, t in base.tensors.items() if is_embedding(key.removesuffix(".weight"))}
    return bool(sizes) and f"{name}.weight" in sizes and sizes[f"{name}.weight"] == max(sizes.values())
