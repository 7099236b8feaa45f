"""The role of each linear layer, by structure and names: attention, MLP, experts, router, output head.

There is no table of models. An attention block is a module that owns a query projection and a key or value projection,
or one fused projection. The numbered module around it is a transformer block, whose other linear layers are its MLP.
In such a block a convolution of kernel size 1 is a linear layer too, applied at each position; elsewhere, as in a
ResNet, it is a convolution.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lightning_lora.layers.parameter import holds_experts
from lightning_lora.layers.registry import is_convolution, is_linear, is_pointwise
from lightning_lora.names import join
from lightning_lora.targets.mlp import mlp_layers
from lightning_lora.targets.role_names import (
    ATTENTION,
    CLASSIFIER,
    EXPERTS,
    FUSED,
    HEAD,
    KEY,
    MLP,
    OUTPUT,
    QUERY,
    ROUTER,
    SCORES,
    VALUE,
    any_token,
    around,
    inside,
    is_fused,
    leaf_is,
    parent,
    stem,
    tokens,
)
from lightning_lora.targets.survey import Survey, survey_of


@dataclass(frozen=True)
class Roles:
    """The layers of a model by first clean name, in the model's order.

    Args:
        linear: all plain linear layers.
        attention: linear layers, pointwise convolutions, ``nn.MultiheadAttention`` and experts of attention.
        whole: every ``nn.MultiheadAttention``.
        experts: modules that keep the weights of many experts in one parameter, but those of attention.
        routers: linear layers that choose among experts.
        mlp: linear layers and pointwise convolutions of MLPs.
        heads: output heads.
        convolutions: all convolutions.
    """

    linear: list[str]
    attention: list[str]
    whole: set[str]
    experts: list[str]
    routers: list[str]
    mlp: list[str]
    heads: list[str]
    convolutions: list[str]


def roles_in(model: nn.Module | Survey) -> Roles:
    """The roles of the layers of ``model``, a module or its survey."""
    modules = survey_of(model).by_name
    linear = [name for name, module in modules.items() if is_linear(module)]
    layers = [name for name, module in modules.items() if is_linear(module) or is_pointwise(module)]
    owners = _attention_owners(layers, modules)
    attention = _attention(layers, owners, modules)
    convolutions = [name for name, module in modules.items() if is_convolution(module)]
    routers = [name for name in linear if _is_router(name, modules)]
    whole = {name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    heads = _heads([name for name in linear if name not in attention], [*owners, *whole], modules)
    if convolutions and len(linear) == 1:  # the one linear layer of a convolutional network is its output
        heads |= set(linear)
    outputs = {join(name, "out_proj") for name in whole}
    rest = attention | outputs | heads | set(routers)
    experts = [name for name, module in modules.items() if holds_experts(module)]
    in_attention = attention | whole | outputs | {name for name in experts if inside(name, set(owners))}
    return Roles(
        linear=linear,
        attention=[name for name in modules if name in in_attention],
        whole=whole,
        experts=[name for name in experts if name not in in_attention],
        routers=routers,
        mlp=mlp_layers([name for name in layers if name not in rest], in_attention, [*owners, *whole], modules),
        heads=[name for name in linear if name in heads],
        convolutions=convolutions,
    )


def attention_blocks(survey: Survey) -> dict[str, nn.Module]:
    """The modules that own the projections of an attention, and every ``nn.MultiheadAttention``, by name."""
    modules = survey.by_name
    layers = [name for name, module in modules.items() if is_linear(module) or is_pointwise(module)]
    owners = {*_attention_owners(layers, modules)}
    return {
        name: module for name, module in modules.items() if name in owners or isinstance(module, nn.MultiheadAttention)
    }


def _is_router(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether ``name`` chooses among experts: a gate in the same module as they, or a layer in a router."""
    gates = [name, *around(name)] if ROUTER.fullmatch(parent(name).rpartition(".")[2]) else [name]
    return any(leaf_is(gate, ROUTER) and _has_experts(parent(gate), modules) for gate in gates if gate)


def _has_experts(owner: str, modules: dict[str, nn.Module]) -> bool:
    children = {key: child for key, child in modules[owner]._modules.items() if child is not None}
    linear = any(is_linear(child) for key, child in children.items() if not ROUTER.fullmatch(key))
    return any(EXPERTS.fullmatch(key) for key in modules[owner]._modules) or (_called(owner, MLP) and not linear)


def _called(name: str, pattern: re.Pattern[str], modules: dict[str, nn.Module] | None = None) -> bool:
    """Whether the last word of a module's name that is no number, or its class's name, fits ``pattern``."""
    last = next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
    class_name = type(modules[name]).__name__ if modules and name in modules else ""
    return bool(pattern.search(last) or pattern.search(class_name)) if modules else bool(pattern.fullmatch(last))


def _attention_owners(linear: list[str], modules: dict[str, nn.Module]) -> list[str]:
    children: dict[str, list[str]] = {}
    for name in linear:
        children.setdefault(parent(stem(name)), []).append(name)

    def has(leaves: list[str], *patterns: re.Pattern[str]) -> bool:
        return any(leaf_is(leaf, *patterns) for leaf in leaves)

    return [
        owner
        for owner, leaves in children.items()
        if any(map(is_fused, leaves))
        or (has(leaves, QUERY) and has(leaves, KEY, VALUE))
        or (has(leaves, VALUE) and has(leaves, OUTPUT) and _called(owner, ATTENTION, modules))
    ] + [parent(name) for name, module in modules.items() if _is_list_of_projections(name, module, modules)]


def _is_list_of_projections(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """Whether ``module`` is the list of an attention block whose projections have no names: ``linears.0`` to ``.3``."""
    if not isinstance(module, nn.ModuleList) or len(module) not in (3, 4) or not all(map(is_linear, module)):
        return False
    return bool(name) and _called(parent(name), ATTENTION, modules)


def _attention(layers: list[str], owners: list[str], modules: dict[str, nn.Module]) -> set[str]:
    members: set[str] = set()
    within: dict[str, list[str]] = {}
    for name in layers:
        for container in around(name):
            within.setdefault(container, []).append(name)
    for owner in owners:
        members |= _members(within[owner], owner, _projection)
        if _called(owner, ATTENTION, modules):
            members |= _members([name for name in within[owner] if is_linear(modules[name])], owner, _anything)
        outer = parent(owner)  # BERT's output projection is not in the owner but in a module around both
        if owner and outer and _called(outer, ATTENTION, modules):
            members |= _members(within[outer], outer, _output)
    return members


def _anything(path: list[str]) -> bool:
    return True


def _projection(path: list[str]) -> bool:
    return any(any_token(path[:1], pattern) for pattern in (QUERY, KEY, VALUE, FUSED, OUTPUT))


def _output(path: list[str]) -> bool:
    return any_token(path, OUTPUT)


def _members(within: list[str], container: str, belongs: Callable[[list[str]], bool]) -> set[str]:
    paths = {name: tokens(name, container) for name in within}
    return {name for name, path in paths.items() if belongs(path) and not any_token(path, MLP)}


def _heads(linear: list[str], owners: list[str], modules: dict[str, nn.Module]) -> set[str]:
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    tied = {name for name in linear if id(modules[name]._parameters.get("weight")) in embeddings}
    in_head: dict[str, list[str]] = {}
    for name in linear:
        container = head_container(name, modules)
        if container is not None and not any(container in around(owner) for owner in owners):
            in_head.setdefault(container, []).append(name)
    last = {layers[-1] for container, layers in in_head.items() if not _ends_in_convolution(container, layers, modules)}
    last |= {name for name in linear if leaf_is(name, SCORES)}  # of several layers in a head the last gives the output
    whole = {name for container, layers in in_head.items() if _is_all_head(container, modules) for name in layers}
    return tied | last | (whole if len(whole) < len(linear) else set())


def _ends_in_convolution(container: str, layers: list[str], modules: dict[str, nn.Module]) -> bool:
    """Whether the output of a head comes from a convolution after its linear ``layers``."""
    after = list(modules)[list(modules).index(layers[-1]) :]
    return any(is_convolution(modules[name]) for name in after if name.startswith(f"{container}."))


def _is_all_head(container: str, modules: dict[str, nn.Module]) -> bool:
    return leaf_is(container, CLASSIFIER) or is_linear(modules[container])


def head_container(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The outermost module around the layer ``name`` that is called a head; of a list of heads the one in it."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        if HEAD.fullmatch(parts[length - 1]):
            container = ".".join(parts[:length])
            many = isinstance(modules.get(container), (nn.ModuleList, nn.ModuleDict))
            return ".".join(parts[: length + 1]) if many else container
    return None
