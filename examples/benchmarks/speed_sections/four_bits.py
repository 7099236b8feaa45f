"""A model whose linear layers, but the head, have weights in NF4 with double quantization."""

from __future__ import annotations

import importlib.util

from torch import nn

from speed_sections.settings import DEVICE


def linear_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of ``model`` but its head, each with its parent and its name there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and name != "lm_head"
    ]


def in_nf4(model: nn.Module) -> nn.Module:
    """``model`` with layers of bitsandbytes, as transformers makes them, that compute in the dtype of the weights."""
    import bitsandbytes as bnb

    for parent, name, layer in linear_layers(model):
        weight = layer.weight.data
        quantized = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            compress_statistics=True,
            device="meta",
        )
        quantized.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=quantized
        )
        setattr(parent, name, quantized.to(DEVICE).train())
    model.is_loaded_in_4bit = True  # for which peft looks
    return model


def in_nf4_of_torchao(model: nn.Module) -> nn.Module:
    """``model`` with weights of torchao."""
    from torchao.dtypes import to_nf4

    for _, _, layer in linear_layers(model):
        layer.weight = nn.Parameter(to_nf4(layer.weight.data), requires_grad=False)
    return model


def has_torchao() -> bool:
    return importlib.util.find_spec("torchao") is not None
