"""Modules on the meta device from names and shapes alone: enough for a plan."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

EMBEDDING = re.compile(r"(?:\w+_)?embed(?:s|ding|dings)?(?:_(?!out)\w+)?|wte|wpe|shared|relative_attention_bias")


def is_embedding(name: str) -> bool:
    """Whether the name of a module says that it is an embedding.

    Example:
        >>> [is_embedding(name) for name in ("model.embed_tokens", "bert.embeddings.word_embeddings", "lm_head", "wte")]
        [True, True, False, True]
    """
    return EMBEDDING.fullmatch(name.rpartition(".")[2]) is not None


def skeleton(shapes: Mapping[str, tuple[int, ...]], transposed: bool = False) -> nn.Module:
    """Make modules that hold parameters of these names and shapes.

    A matrix that is called ``weight`` belongs to an ``nn.Linear``, or to an ``nn.Embedding`` if its name is like one;
    every other tensor is a parameter of a plain module.

    Args:
        shapes: by parameter name.
        transposed: whether matrices have the shape ``(in_features, out_features)``, as in GPT-2.
    """
    root = nn.Module()
    for name, shape in shapes.items():
        path, _, key = name.rpartition(".")
        if key == "weight" and len(shape) == 2 and path:
            _put(root, path, _layer(path, shape, transposed))
    for name, shape in shapes.items():
        path, _, key = name.rpartition(".")
        owner = _module_at(root, path)
        if key not in owner._parameters:
            owner._parameters[key] = nn.Parameter(torch.empty(shape, device="meta"))
    return root


def _layer(path: str, shape: tuple[int, ...], transposed: bool) -> nn.Module:
    if is_embedding(path):
        return nn.Embedding(shape[0], shape[1], device="meta")
    out_features, in_features = reversed(shape) if transposed else shape
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    del layer._parameters["bias"]
    return layer


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    owner = _module_at(root, parent)
    module._modules.update(owner._modules.get(last, nn.Module())._modules)  # type: ignore[union-attr]
    owner._modules[last] = module


def _module_at(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        child = root._modules.get(part)
        if child is None:
            child = root._modules[part] = nn.Module()
        root = child
    return root
