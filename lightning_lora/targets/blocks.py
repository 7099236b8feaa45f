"""The sublayers of transformer blocks: where attention, the MLP and the whole block leave a module.

Methods that change activations, and not weights, act there. As for the presets there is no table of models: the roles
of the layers, their shapes and the numbered modules around them show the sublayers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.parameter import holds_experts
from lightning_lora.layers.registry import parts_of
from lightning_lora.layers.source_code import functions_of, names_in
from lightning_lora.names import join
from lightning_lora.targets.role_names import (
    ATTENTION,
    EXPERTS,
    GATED,
    KEY,
    MLP,
    OUTPUT,
    QUERY,
    RESULT,
    VALUE,
    any_token,
    around,
    is_fused,
    leaf_is,
    numbered,
    parent,
    stem,
    tokens,
)
from lightning_lora.targets.roles import Roles, roles_in
from lightning_lora.targets.survey import Survey

# BERT's two MLP layers lie in modules of their own, which these words pair: `intermediate.dense` and `output.dense`.
HALF = re.compile(r"(\w*?)_?(?:intermediate|inter|output)_?(\w*)")
LISTS = (nn.ModuleList, nn.ModuleDict)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Sublayer:
    """Attention, an MLP or a whole block, by the modules through which activations enter and leave it.

    Args:
        output: the name of the module whose output is the sublayer's.
        input: the name of the module whose first argument is the input of an MLP or a block.
        features: the number of features of the output, and of the input of an MLP or a block.
        channel_dim: the dimension of the features, counted from the last one.
        refusal: why nothing can act there, as the end of a sentence about ``output``; ``None`` where it can.
    """

    output: str
    input: str
    features: int = 0
    channel_dim: int = -1
    refusal: str | None = None


@dataclass(frozen=True)
class Sublayers:
    """The sublayers of a model, each kind in the model's order.

    Args:
        attention: every attention, self or cross.
        mlp: every MLP; a mixture of experts is one.
        blocks: every block that holds attention.
    """

    attention: list[Sublayer]
    mlp: list[Sublayer]
    blocks: list[Sublayer]


def sublayers_in(survey: Survey) -> Sublayers:
    """The sublayers of the model, as it is at the time of the survey."""
    roles = roles_in(survey)
    attention = _attention(survey, roles)
    mlp = _mlps(survey, roles, attention)
    return Sublayers(attention, mlp, _blocks(survey, roles, mlp, attention))


def _attention(survey: Survey, roles: Roles) -> list[Sublayer]:
    inner = {join(name, "out_proj") for name in roles.whole}
    layers = [name for name in roles.attention if name not in inner]
    outputs = [name for name in layers if name in roles.whole or _is_output(name, survey)]
    complete = {numbered(name) for name in outputs}
    incomplete = {numbered(name): _without_output(name) for name in layers if numbered(name) not in complete}
    return [*incomplete.values(), *(_attention_output(name, survey) for name in outputs)]


def _without_output(name: str) -> Sublayer:
    refusal = "is a projection of attention, but no layer of its block has the name of an output projection"
    return Sublayer(name, name, refusal=refusal)


def _is_output(name: str, survey: Survey) -> bool:
    if isinstance(survey.by_name.get(parent(name)), nn.ModuleList):  # four projections without names
        return name.endswith(".3")
    return leaf_is(name, OUTPUT, RESULT) and not leaf_is(name, QUERY, KEY, VALUE) and not is_fused(name)


def _attention_output(name: str, survey: Survey) -> Sublayer:
    sublayer, owner = _layer(name, name, survey), parent(name)
    owner_class: Any = type(survey.by_name[owner])
    if holds_experts(survey.by_name[name]):
        return replace(sublayer, refusal="holds the experts of attention, which give no output of all its heads")
    if calls_torch_attention(owner_class):  # it reads the weight of the layer, which is never called
        return replace(sublayer, output=owner, input=owner)
    return sublayer


@cache
def calls_torch_attention(cls: Any) -> bool:
    """Whether code of ``cls`` calls torch's function of attention, which calls no layer."""
    return any("multi_head_attention_forward" in names_in(function.__code__) for _, function in functions_of(cls))


def _mlps(survey: Survey, roles: Roles, attention: Sequence[Sublayer]) -> list[Sublayer]:
    mlps = []
    for key, names in _mlp_layers(survey, roles).items():
        if any(_mixture_of(name, survey) for name in names):
            mlps.append(_mixture(key, attention))
            continue
        last = _last(names, survey)
        if last is not None and (len(names) > 1 or any_token(names[0].split("."), MLP)):
            mlps.append(_layer(names[0], last, survey))
    return mlps


def _mlp_layers(survey: Survey, roles: Roles) -> dict[str, list[str]]:
    """The layers of each MLP, in the model's order."""
    chosen = {*roles.mlp, *roles.experts}
    branches: dict[str, list[str]] = {}
    direct: dict[str, list[str]] = {}
    for name in survey.by_name:
        if name in chosen and not _in_attention(name):
            key = _mlp_of(name, survey)
            (direct if key == numbered(name) else branches).setdefault(key, []).append(name)
    with_branch = {numbered(name) for names in branches.values() for name in names}
    # Single layers in a block that has an MLP as a module of its own are no second MLP.
    return branches | {block: names for block, names in direct.items() if block not in with_branch}


def _in_attention(name: str) -> bool:
    """Whether ``name`` lies in the attention of its block, as an MLP of position biases does."""
    block = numbered(name)
    return bool(block) and any(ATTENTION.search(word) for word in tokens(name, block)[:-1])


def _mlp_of(name: str, survey: Survey) -> str:
    """A key for the MLP that the layer ``name`` belongs to: by its module, or by its block."""
    mixture = _mixture_of(name, survey)
    if mixture:
        return mixture
    block = numbered(name)
    inner = tokens(stem(name), block)[:-1]
    half = HALF.fullmatch(inner[0]) if inner else None
    if half is not None:
        return join(block, f"{half[1]}|{half[2]}")
    named = next((number for number, word in enumerate(inner, 1) if any_token([word], MLP)), 1)
    return join(block, ".".join(inner[:named])) if inner else block


def _mixture_of(name: str, survey: Survey) -> str:
    """The module of a mixture of experts, with its router, around the expert ``name``; empty for other layers."""
    parts = name.split(".")
    experts = next((number for number, part in enumerate(parts) if number and EXPERTS.fullmatch(part)), None)
    if experts is not None:
        return ".".join(parts[:experts])
    return parent(name) if holds_experts(survey.by_name[name]) else ""


def _mixture(name: str, attention: Sequence[Sublayer]) -> Sublayer:
    """A mixture of experts as one module; it has the features of the attention nearest to it."""
    near = max(attention, key=lambda sublayer: _shared(sublayer.output, name), default=None)
    if near is None or not near.features:
        return Sublayer(name, name, refusal="is a mixture of experts with no attention that shows its features")
    return Sublayer(name, name, near.features)


def _shared(name: str, other: str) -> int:
    """The number of modules that both names lie in."""
    return len({*around(name)} & {*around(other)})


def _last(names: Sequence[str], survey: Survey) -> str | None:
    """The layer that leads back to the features of the MLP's input; a gated MLP may define its gate after it."""
    features, _ = _features(survey.by_name[names[0]])
    if not features:
        return names[-1]
    back = [name for name in names if _features(survey.by_name[name])[1] == features]
    ungated = [name for name in back if not GATED.fullmatch(name.rpartition(".")[2])]
    return next(reversed(ungated or back), None)


def _layer(first: str, last: str, survey: Survey) -> Sublayer:
    """The sublayer from the input of the layer ``first`` to the output of the layer ``last``."""
    (inputs, _), (_, features) = (_features(survey.by_name[name]) for name in (first, last))
    refusal = None if inputs and features else "has no shape yet (a lazy module): run one batch through the model first"
    return Sublayer(last, first, features, _channel_dim(survey.by_name[last]), refusal)


def _features(module: nn.Module) -> tuple[int, int]:
    """The features of the input and the output of a layer; 0 where they are not known yet."""
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim), int(module.embed_dim)
    if isinstance(module, nn.Linear):  # the weight of a quantized one has another shape
        return module.in_features, module.out_features
    if isinstance(module, CONVOLUTIONS):  # the weight of one with groups has fewer columns
        return module.in_channels, module.out_channels
    part = parts_of(module)[0]
    weight = parameter_of(module, part.key)
    return (0, 0) if is_lazy(weight) else part.full_features(weight)


def _channel_dim(module: nn.Module) -> int:
    """The dimension of features: the last one, or that of a convolution's channels."""
    return -1 - len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else -1


def _blocks(survey: Survey, roles: Roles, mlps: Sequence[Sublayer], attention: Sequence[Sublayer]) -> list[Sublayer]:
    """Each block that holds attention, with the features of its MLP, or else of its attention."""
    blocks: dict[str, Sublayer] = {}
    outputs = [mlp.output for mlp in mlps]
    for name in roles.attention:
        block = _block_of(name, outputs)
        if block and block not in blocks:
            blocks[block] = _block(block, survey, [*mlps, *attention])
    return list(blocks.values())


def _block_of(name: str, mlps: Sequence[str]) -> str:
    """The nearest module around the attention layer ``name`` that holds an MLP too; empty where there is none.

    Where blocks are numbered it is one of these. In a model without MLPs it is the numbered module around attention.
    """
    block = numbered(name)
    if not mlps:
        return block
    like = [mlp for mlp in mlps if bool(numbered(mlp)) == bool(block)]
    holders = {container for mlp in like for container in around(mlp)} - {""}
    containers = [container for container in around(name) if container in holders]
    if block:
        containers = [container for container in containers if container.rpartition(".")[2].isdigit()]
    return containers[-1] if containers else ""


def _block(name: str, survey: Survey, inside: Sequence[Sublayer]) -> Sublayer:
    if isinstance(survey.by_name[name], LISTS):
        return Sublayer(name, name, refusal="is a list of the parts of a block, which is not called itself")
    within = next(sublayer for sublayer in inside if sublayer.output.startswith(f"{name}."))
    return replace(within, output=name, input=name)
