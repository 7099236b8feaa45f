"""The role of each linear layer, by structure and names: attention, MLP, experts, router, output head.

There is no table of models. An attention block is a module that owns a query projection and a key or value projection,
or one fused projection. The numbered module around it is a transformer block, whose other linear layers are its MLP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from lightning_lora.layers.parameter import holds_experts
from lightning_lora.layers.registry import adaptable_base, is_linear
from lightning_lora.names import join
from lightning_lora.targets.survey import Survey, survey_of


def _words(words: str) -> re.Pattern[str]:
    before = r"(?:to_|proj_|linear_|lin_|[a-z]2[a-z]_|w_?)?"
    after = r"(?:_?(?:proj|lin|linear|layer|head|attn|global|[ab]_proj))?\d*"
    return re.compile(f"{before}(?:{words}){after}", re.IGNORECASE)


QUERY = _words("q|query|queries")
KEY = _words("k|key|keys")
VALUE = _words("v|value|values")
FUSED = _words("qkv|q_k_v|query_key_value|queries_keys_values|kv|key_value|keys_values|qk|c_attn")
IN_ATTENTION = re.compile(r"(?:in|att|attn)_proj")  # fused too, where it lies in a module that is called attention
OUTPUT = _words("o|out|output|post|c_proj|dense|proj|projection|fc_out|attn_out")
ATTENTION = re.compile(r"att(?:n|ention)", re.IGNORECASE)
MLP = re.compile(
    r"mlps?|mlp_.*|\w+_mlp|ffn?|ffns|feed_?forward.*|denserelu.*|fc\d+|lin\d+|linear(?:\d+|_up|_down)|w\d+|wi(?:_\d+)?|c_fc|intermediate"
    r"|pwconv\d+|(?:up|gate|down|gate_up)_proj|dense_(?:h_to_4h|4h_to_h)|experts?|shared_experts?|moe",
    re.IGNORECASE,
)
GATED = re.compile(r"(?:gate|up)(?:_proj)?|w[13]|wi_[01]|fc1_[gx]|(?:linear|lin)_(?:gate|up)", re.IGNORECASE)
OTHER_MIXER = re.compile(r"\w*(?:mamba|ssm|lstm|rnn|recurrent|mixer)\w*|temporal_block|rec", re.IGNORECASE)
EXPERTS = re.compile(r"\w*experts?", re.IGNORECASE)
ROUTER = re.compile(r"(?:\w+_)?(?:gate|router)", re.IGNORECASE)
CLASSIFIER = re.compile(r"(?!pre_)(?:\w+_)?classifiers?", re.IGNORECASE)
HEAD = re.compile(
    r"(?:\w+_)?heads?|head_dist|cls|(?!pre_)(?:\w+_)?classifiers?|score|logits|qa_outputs|embed_out|predictions?|vocab_projector"
    r"|output_projection",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Roles:
    """The layers of a model by first clean name, in the model's order.

    Args:
        linear: all plain linear layers.
        attention: linear layers, ``nn.MultiheadAttention`` and experts that belong to attention.
        whole: every ``nn.MultiheadAttention``.
        experts: modules that keep the weights of many experts in one parameter, but those of attention.
        routers: linear layers that choose among experts.
        mlp: linear layers of MLPs.
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
    owners = _attention_owners(linear, modules)
    attention = _attention(linear, owners, modules)
    convolutions = [name for name, module in modules.items() if is_convolution(module)]
    routers = [name for name in linear if _is_router(name, modules)]
    whole = {name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    heads = _heads([name for name in linear if name not in attention], [*owners, *whole], modules)
    if convolutions and len(linear) == 1:  # the one linear layer of a convolutional network is its output
        heads |= set(linear)
    outputs = {join(name, "out_proj") for name in whole}
    rest = attention | outputs | heads | set(routers)
    experts = [name for name, module in modules.items() if holds_experts(module)]
    in_attention = attention | whole | outputs | {name for name in experts if _inside(name, set(owners))}
    return Roles(
        linear=linear,
        attention=[name for name in modules if name in in_attention],
        whole=whole,
        experts=[name for name in experts if name not in in_attention],
        routers=routers,
        mlp=_mlp([name for name in linear if name not in rest], [*owners, *whole], modules),
        heads=[name for name in linear if name in heads],
        convolutions=convolutions,
    )


def is_fused(name: str) -> bool:
    """Whether the name says that the layer is a fused projection: query, key or value in one weight."""
    return _leaf_is(name, FUSED) or (_leaf_is(name, IN_ATTENTION) and bool(ATTENTION.search(_parent(name))))


def family_of(name: str) -> str | None:
    """The group of layers in one module that mostly read the same input: ``"attention"``, ``"gated"`` (MLP) or none."""
    if _leaf_is(name, QUERY, KEY, VALUE):
        return "attention"
    return "gated" if GATED.fullmatch(name) else None


def is_query_or_value(name: str) -> bool:
    """Whether the name says that the layer computes queries or values."""
    return _leaf_is(name, QUERY, VALUE)


def is_convolution(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution."""
    return adaptable_base(type(module)) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_router(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether ``name`` chooses among experts: a gate in the same module as they, or a layer in a router."""
    gates = [name, *_around(name)] if ROUTER.fullmatch(_parent(name).rpartition(".")[2]) else [name]
    return any(_leaf_is(gate, ROUTER) and _has_experts(_parent(gate), modules) for gate in gates if gate)


def _has_experts(parent: str, modules: dict[str, nn.Module]) -> bool:
    children = {key: child for key, child in modules[parent]._modules.items() if child is not None}
    linear = any(is_linear(child) for key, child in children.items() if not ROUTER.fullmatch(key))
    return any(EXPERTS.fullmatch(key) for key in modules[parent]._modules) or (_called(parent, MLP) and not linear)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _around(name: str) -> list[str]:
    """The names of all modules that ``name`` lies in, the model itself first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts))]


def _inside(name: str, containers: set[str]) -> bool:
    return any(container in containers for container in _around(name))


def _leaf_is(name: str, *patterns: re.Pattern[str]) -> bool:
    return any(pattern.fullmatch(stem(name).rpartition(".")[2]) for pattern in patterns)


def stem(name: str) -> str:
    """The name that says what a layer is for: where it and its norm lie in a module, as in LeViT, the module's name."""
    head, _, last = name.rpartition(".")
    wrapped = last in ("linear", "ln") and head and not head.rpartition(".")[2].isdigit()
    return stem(head) if wrapped else name


def _tokens(name: str, container: str) -> list[str]:
    return name.removeprefix(f"{container}." if container else "").split(".")


def _any_token(tokens: Iterable[str], pattern: re.Pattern[str]) -> bool:
    return any(pattern.fullmatch(token) for token in tokens)


def _called(name: str, pattern: re.Pattern[str], modules: dict[str, nn.Module] | None = None) -> bool:
    """Whether the last word of a module's name that is no number, or its class's name, fits ``pattern``."""
    last = next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
    class_name = type(modules[name]).__name__ if modules and name in modules else ""
    return bool(pattern.search(last) or pattern.search(class_name)) if modules else bool(pattern.fullmatch(last))


def _attention_owners(linear: list[str], modules: dict[str, nn.Module]) -> list[str]:
    children: dict[str, list[str]] = {}
    for name in linear:
        children.setdefault(_parent(stem(name)), []).append(name)

    def has(leaves: list[str], *patterns: re.Pattern[str]) -> bool:
        return any(_leaf_is(leaf, *patterns) for leaf in leaves)

    return [
        owner
        for owner, leaves in children.items()
        if any(map(is_fused, leaves))
        or (has(leaves, QUERY) and has(leaves, KEY, VALUE))
        or (has(leaves, VALUE) and has(leaves, OUTPUT) and _called(owner, ATTENTION, modules))
    ]


def _attention(linear: list[str], owners: list[str], modules: dict[str, nn.Module]) -> set[str]:
    members: set[str] = set()
    within: dict[str, list[str]] = {}
    for name in linear:
        for container in _around(name):
            within.setdefault(container, []).append(name)
    for owner in owners:
        belongs = _anything if _called(owner, ATTENTION, modules) else _projection
        members |= _members(within[owner], owner, belongs)
        around = _parent(owner)  # BERT's output projection is not in the owner but in a module around both
        if owner and around and _called(around, ATTENTION, modules):
            members |= _members(within[around], around, _output)
    return members


def _anything(tokens: list[str]) -> bool:
    return True


def _projection(tokens: list[str]) -> bool:
    return any(pattern.fullmatch(tokens[0]) for pattern in (QUERY, KEY, VALUE, FUSED, OUTPUT))


def _output(tokens: list[str]) -> bool:
    return _any_token(tokens, OUTPUT)


def _members(within: list[str], container: str, belongs: Callable[[list[str]], bool]) -> set[str]:
    inside = {name: _tokens(name, container) for name in within}
    return {name for name, tokens in inside.items() if belongs(tokens) and not _any_token(tokens, MLP)}


def _heads(linear: list[str], owners: list[str], modules: dict[str, nn.Module]) -> set[str]:
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    tied = {name for name in linear if id(modules[name]._parameters.get("weight")) in embeddings}
    inside: dict[str, list[str]] = {}
    for name in linear:
        container = _head_container(name, modules)
        if container is not None and not any(container in _around(owner) for owner in owners):
            inside.setdefault(container, []).append(name)
    last = {layers[-1] for layers in inside.values()}  # of several layers in a head the last one gives the output
    whole = {name for container, layers in inside.items() if _is_all_head(container, modules) for name in layers}
    return tied | last | (whole if len(whole) < len(linear) else set())


def _is_all_head(container: str, modules: dict[str, nn.Module]) -> bool:
    return _leaf_is(container, CLASSIFIER) or is_linear(modules[container])


def _head_container(name: str, modules: dict[str, nn.Module]) -> str | None:
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        if HEAD.fullmatch(parts[length - 1]):
            container = ".".join(parts[:length])
            many = isinstance(modules.get(container), (nn.ModuleList, nn.ModuleDict))
            return ".".join(parts[: length + 1]) if many else container
    return None


def _mlp(linear: list[str], owners: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """The linear layers whose names say MLP, and the other ones in the blocks that repeat around attention."""
    called = {name for name in linear if _any_token(name.split("."), MLP) or _follows_intermediate(name, modules)}
    blocks = {block for owner in owners if (block := _numbered(owner))}
    nameless = {around for owner in owners if not _numbered(owner) for around in (owner, *_around(owner)[-2:])} - {""}
    if not blocks:  # one block without a number, or none
        return [name for name in linear if name in called or _inside(name, {_parent(owner) for owner in owners} - {""})]
    return [
        name
        for name in linear
        if (name in called and (_numbered(name) or _inside(name, nameless)))
        or (_inside(name, blocks) and not _any_token(name.split("."), OTHER_MIXER))
    ]


def _follows_intermediate(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether ``name`` lies in ``output``, and ``intermediate`` in the same module: BERT's second MLP layer."""
    around = [container for container in _around(name) if container.rpartition(".")[2] == "output"]
    return any("intermediate" in modules[_parent(container)]._modules for container in around)


def _numbered(name: str) -> str:
    """The nearest module around ``name`` whose own name is a number: a block that repeats."""
    parts = name.split(".")[:-1]
    return next((".".join(parts[:length]) for length in range(len(parts), 0, -1) if parts[length - 1].isdigit()), "")
