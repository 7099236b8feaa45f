"""What ``"attn"``, ``"qv"``, ``"mlp"`` and ``"all"`` mean on a model, told from its structure and names.

There is no table of models. An attention block is a module that owns a query map beside a key or value map, or one map
that fuses them; what repeats around it is a transformer block, and the other linear maps in there are its MLP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from lightning_lora import names
from lightning_lora.kinds import is_linear, root_of
from lightning_lora.on_read import holds_experts


def _words(words: str) -> re.Pattern[str]:
    before, after = r"(?:to_|proj_|linear_|lin_|w_?)?", r"(?:_?(?:proj|lin|linear|layer|global|[ab]_proj))?\d*"
    return re.compile(f"{before}(?:{words}){after}", re.IGNORECASE)


QUERY = _words("q|query|queries")
KEY = _words("k|key|keys")
VALUE = _words("v|value|values")
FUSED = _words("qkv|q_k_v|query_key_value|kv|key_value|qk|c_attn")
OUTPUT = _words("o|out|output|c_proj|dense|proj|projection|fc_out|attn_out")
ATTENTION = re.compile(r"att(?:n|ention)", re.IGNORECASE)
MLP = re.compile(
    r"mlps?|mlp_.*|ffn?|ffns|feed_?forward.*|denserelu.*|fc\d+|lin\d+|linear\d+|w\d+|wi(?:_\d+)?|c_fc|intermediate"
    r"|(?:up|gate|down|gate_up)_proj|dense_(?:h_to_4h|4h_to_h)|experts?|shared_experts?|moe",
    re.IGNORECASE,
)
EXPERTS = re.compile(r"\w*experts?", re.IGNORECASE)
ROUTER = re.compile(r"(?:\w+_)?(?:gate|router)", re.IGNORECASE)
HEAD = re.compile(
    r"(?:\w+_)?heads?|cls|classifiers?|score|logits|qa_outputs|embed_out|predictions?|vocab_projector"
    r"|output_projection",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Roles:
    """The maps of a model by first clean name, sorted by what they do."""

    linear: list[str]
    attention: list[str]
    whole: set[str]
    experts: list[str]
    routers: list[str]
    mlp: list[str]
    heads: list[str]
    convolutions: list[str]


def preset(model: nn.Module, which: str) -> dict[str, tuple[str, ...] | None]:
    """The names that the preset ``which`` chooses in ``model``, each with the matrices to take if that is not all."""
    roles = roles_in(model)
    if which == "qv":
        chosen = [name for name in roles.attention if _leaf_is(name, QUERY, VALUE, FUSED) or name in roles.whole]
        return {name: ("q", "v") if is_fused(name) or name in roles.whole else None for name in chosen}
    if which == "all":
        out = set(roles.heads) | set(roles.routers)
        found = {*roles.linear, *roles.attention, *roles.experts} - out
        return dict.fromkeys([name for name in _unique(model) if name in found] or roles.convolutions)
    return dict.fromkeys(roles.attention if which == "attn" else roles.mlp + roles.experts)


def roles_in(model: nn.Module) -> Roles:
    """Sort the linear maps and convolutions of ``model``."""
    modules = _unique(model)
    linear = [name for name, module in modules.items() if is_linear(module)]
    owners = _attention_owners(linear)
    attention = _attention(linear, owners, modules)
    convolutions = [name for name, module in modules.items() if is_convolution(module)]
    heads = _heads([name for name in linear if name not in attention], modules)
    if convolutions and len(linear) == 1:  # the one linear layer of a convolutional network is its output
        heads |= set(linear)
    routers = [name for name in linear if _leaf_is(name, ROUTER) and _has_experts(_parent(name), modules)]
    rest = attention | heads | set(routers)
    mlp = _mlp([name for name in linear if name not in rest], owners)
    whole = {name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    either = attention | whole | {names.join(name, "out_proj") for name in whole}
    return Roles(
        linear=linear,
        attention=[name for name in modules if name in either],
        whole=whole,
        experts=[name for name, module in modules.items() if holds_experts(module)],
        routers=routers,
        mlp=mlp,
        heads=[name for name in linear if name in heads],
        convolutions=convolutions,
    )


def is_fused(name: str) -> bool:
    """Whether the name says that the map holds query, key or value in one."""
    return _leaf_is(name, FUSED)


def is_convolution(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution."""
    return root_of(type(module)) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _has_experts(parent: str, modules: dict[str, nn.Module]) -> bool:
    return any(EXPERTS.fullmatch(child) for child in modules[parent]._modules)


def _unique(model: nn.Module) -> dict[str, nn.Module]:
    first: dict[int, str] = {}
    found = {}
    for name, module in names.named_modules(model):
        if first.setdefault(id(module), name) == name:
            found[name] = module
    return found


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _around(name: str) -> list[str]:
    """The names of all that ``name`` lies in, the model itself first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts))]


def _inside(name: str, containers: set[str]) -> bool:
    return any(container in containers for container in _around(name))


def _leaf_is(name: str, *patterns: re.Pattern[str]) -> bool:
    return any(pattern.fullmatch(name.rpartition(".")[2]) for pattern in patterns)


def _tokens(name: str, container: str) -> list[str]:
    return name.removeprefix(f"{container}." if container else "").split(".")


def _any_token(tokens: Iterable[str], pattern: re.Pattern[str]) -> bool:
    return any(pattern.fullmatch(token) for token in tokens)


def _attention_owners(linear: list[str]) -> list[str]:
    children: dict[str, list[str]] = {}
    for name in linear:
        children.setdefault(_parent(name), []).append(name)

    def has(leaves: list[str], pattern: re.Pattern[str]) -> bool:
        return any(_leaf_is(leaf, pattern) for leaf in leaves)

    return [
        owner
        for owner, leaves in children.items()
        if has(leaves, FUSED) or (has(leaves, QUERY) and (has(leaves, KEY) or has(leaves, VALUE)))
    ]


def _attention(linear: list[str], owners: list[str], modules: dict[str, nn.Module]) -> set[str]:
    def called_attention(name: str) -> bool:
        leaf, kind = name.rpartition(".")[2], type(modules[name]).__name__ if name in modules else ""
        return bool(ATTENTION.search(leaf) or ATTENTION.search(kind))

    found: set[str] = set()
    within: dict[str, list[str]] = {}
    for name in linear:
        for container in _around(name):
            within.setdefault(container, []).append(name)
    for owner in owners:
        found |= _members(within[owner], owner, _anything if called_attention(owner) else _projection)
        around = _parent(owner)  # BERT keeps the output map beside the owner, in a module that is called attention
        if owner and around and called_attention(around):
            found |= _members(within[around], around, _output)
    return found


def _anything(tokens: list[str]) -> bool:
    return True


def _projection(tokens: list[str]) -> bool:
    return any(pattern.fullmatch(tokens[0]) for pattern in (QUERY, KEY, VALUE, FUSED, OUTPUT))


def _output(tokens: list[str]) -> bool:
    return _any_token(tokens, OUTPUT)


def _members(within: list[str], container: str, belongs: Callable[[list[str]], bool]) -> set[str]:
    inside = {name: _tokens(name, container) for name in within}
    return {name for name, tokens in inside.items() if belongs(tokens) and not _any_token(tokens, MLP)}


def _heads(linear: list[str], modules: dict[str, nn.Module]) -> set[str]:
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    tied = {name for name in linear if id(modules[name]._parameters.get("weight")) in embeddings}
    last: dict[str, str] = {}
    for name in linear:
        container = _head_container(name, modules)
        if container is not None:
            last[container] = name  # of several maps in a head only the last one gives the output
    return tied | set(last.values())


def _head_container(name: str, modules: dict[str, nn.Module]) -> str | None:
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        if HEAD.fullmatch(parts[length - 1]):
            container = ".".join(parts[:length])
            many = isinstance(modules.get(container), (nn.ModuleList, nn.ModuleDict))
            return ".".join(parts[: length + 1]) if many else container
    return None


def _mlp(linear: list[str], owners: list[str]) -> list[str]:
    blocks = {_block(owner) for owner in owners} - {""}
    return [name for name in linear if _any_token(name.split("."), MLP) or _inside(name, blocks)]


def _block(owner: str) -> str:
    """What repeats around an attention block: the nearest numbered module, else the one that it lies in."""
    parts = owner.split(".")[:-1]
    numbered = [length for length in range(len(parts), 0, -1) if parts[length - 1].isdigit()]
    return ".".join(parts[: numbered[0]] if numbered else parts)
