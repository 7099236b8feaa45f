"""What the maps of a model do, told from its structure and names: attention, MLP, experts, routers, output heads.

There is no table of models. An attention block is a module that owns a query map beside a key or value map, or one map
that fuses them; what repeats around it is a transformer block, and the other linear maps in there are its MLP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from lightning_lora import names
from lightning_lora.layers.parameter import holds_experts
from lightning_lora.layers.registry import is_linear, root_of


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
    """The maps of a model by first clean name, sorted by what they do."""

    linear: list[str]
    attention: list[str]
    whole: set[str]
    experts: list[str]
    routers: list[str]
    mlp: list[str]
    heads: list[str]
    convolutions: list[str]


def roles_in(model: nn.Module) -> Roles:
    """Sort the linear maps and convolutions of ``model``."""
    modules = unique(model)
    linear = [name for name, module in modules.items() if is_linear(module)]
    owners = _attention_owners(linear, modules)
    attention = _attention(linear, owners, modules)
    convolutions = [name for name, module in modules.items() if is_convolution(module)]
    routers = [name for name in linear if _is_router(name, modules)]
    whole = {name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    heads = _heads([name for name in linear if name not in attention], [*owners, *whole], modules)
    if convolutions and len(linear) == 1:  # the one linear layer of a convolutional network is its output
        heads |= set(linear)
    outputs = {names.join(name, "out_proj") for name in whole}
    rest = attention | outputs | heads | set(routers)
    experts = [name for name, module in modules.items() if holds_experts(module)]
    either = attention | whole | outputs
    either |= {name for name in experts if _inside(name, set(owners))}
    return Roles(
        linear=linear,
        attention=[name for name in modules if name in either],
        whole=whole,
        experts=[name for name in experts if name not in either],
        routers=routers,
        mlp=_mlp([name for name in linear if name not in rest], [*owners, *whole], modules),
        heads=[name for name in linear if name in heads],
        convolutions=convolutions,
    )


def is_fused(name: str) -> bool:
    """Whether the name says that the map holds query, key or value in one."""
    return _leaf_is(name, FUSED) or (_leaf_is(name, IN_ATTENTION) and bool(ATTENTION.search(_parent(name))))


def family_of(name: str) -> str | None:
    """What the maps of one module are called that mostly read the same input: those of attention, or a gated MLP's."""
    if _leaf_is(name, QUERY, KEY, VALUE):
        return "attention"
    return "gated" if GATED.fullmatch(name) else None


def is_query_or_value(name: str) -> bool:
    """Whether the name says that the map gives queries or values."""
    return _leaf_is(name, QUERY, VALUE)


def is_convolution(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution."""
    return root_of(type(module)) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_router(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether ``name`` chooses among experts: a gate beside them, or what lies in a router."""
    gates = [name, *_around(name)] if ROUTER.fullmatch(_parent(name).rpartition(".")[2]) else [name]
    return any(_leaf_is(gate, ROUTER) and _has_experts(_parent(gate), modules) for gate in gates if gate)


def _has_experts(parent: str, modules: dict[str, nn.Module]) -> bool:
    inside = modules[parent]._modules
    linear = any(
        is_linear(module) for child, module in inside.items() if module is not None and not ROUTER.fullmatch(child)
    )
    return any(EXPERTS.fullmatch(child) for child in inside) or (_called(parent, MLP) and not linear)


def unique(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of ``model`` under its first clean name."""
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
    return any(pattern.fullmatch(stem(name).rpartition(".")[2]) for pattern in patterns)


def stem(name: str) -> str:
    """The name that says what a map is for: a map and its norm may lie in a module that is called so (LeViT)."""
    head, _, last = name.rpartition(".")
    wrapped = last in ("linear", "ln") and head and not head.rpartition(".")[2].isdigit()
    return stem(head) if wrapped else name


def _tokens(name: str, container: str) -> list[str]:
    return name.removeprefix(f"{container}." if container else "").split(".")


def _any_token(tokens: Iterable[str], pattern: re.Pattern[str]) -> bool:
    return any(pattern.fullmatch(token) for token in tokens)


def _called(name: str, pattern: re.Pattern[str], modules: dict[str, nn.Module] | None = None) -> bool:
    """Whether the name of a module, a number in a list aside, or the name of its class says so."""
    last = next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
    kind = type(modules[name]).__name__ if modules and name in modules else ""
    return bool(pattern.search(last) or pattern.search(kind)) if modules else bool(pattern.fullmatch(last))


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
    found: set[str] = set()
    within: dict[str, list[str]] = {}
    for name in linear:
        for container in _around(name):
            within.setdefault(container, []).append(name)
    for owner in owners:
        anything = _called(owner, ATTENTION, modules)
        found |= _members(within[owner], owner, _anything if anything else _projection)
        around = _parent(owner)  # BERT keeps the output map beside the owner, in a module that is called attention
        if owner and around and _called(around, ATTENTION, modules):
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


def _heads(linear: list[str], owners: list[str], modules: dict[str, nn.Module]) -> set[str]:
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    tied = {name for name in linear if id(modules[name]._parameters.get("weight")) in embeddings}
    inside: dict[str, list[str]] = {}
    for name in linear:
        container = _head_container(name, modules)
        if container is not None and not any(container in _around(owner) for owner in owners):
            inside.setdefault(container, []).append(name)
    last = {each[-1] for each in inside.values()}  # of several maps in a head the last one gives the output
    whole = {name for container, each in inside.items() if _is_all_head(container, modules) for name in each}
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
    """The maps that are called so, and what else lies in the blocks that repeat around attention."""
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
    """BERT's second map lies in ``output``, beside ``intermediate``."""
    around = [container for container in _around(name) if container.rpartition(".")[2] == "output"]
    return any("intermediate" in modules[_parent(container)]._modules for container in around)


def _numbered(name: str) -> str:
    """What repeats around ``name``: the nearest module that it lies in whose name is a number."""
    parts = name.split(".")[:-1]
    return next((".".join(parts[:length]) for length in range(len(parts), 0, -1) if parts[length - 1].isdigit()), "")
