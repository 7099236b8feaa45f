"""What the names of layers say: query, key, value, output, MLP, router, head; no model is looked at."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache


def _words(words: str) -> re.Pattern[str]:
    before = r"(?:to_|to(?=[qkv][a-z]{2})|proj(?:ect)?_|linear_|lin_|fc_|dense_|attn?_|fused_|[a-z]2[a-z]_|w_?)?"
    after = (
        r"(?:_?(?:proj(?:ect(?:ion)?)?s?|lin(?:ear)?s?|layers?|heads?|attn|global|fc|net|dense|conv|[ab](?:_proj)?))?"
    )
    return re.compile(rf"{before}(?:{words}){after}\d*", re.IGNORECASE)


QUERY = _words("qs?|query|queries")
KEY = _words("ks?|keys?")
VALUE = _words("vs?|values?")
FUSED = _words("qkv|q_k_v|query_key_value|queries_keys_values|kv|key_value|keys_values|qk|c_attn")
IN_ATTENTION = re.compile(r"(?:in|att|attn)_proj")  # fused too, where it lies in a module that is called attention
OUTPUT = _words("o|out|output|post|c_proj|dense|proj|projection|fc_out|attn_out")
RESULT = _words("o|out|output")  # of attention, whatever it lies in; `q.proj` is a query
ATTENTION = re.compile(r"att(?:n|ention)", re.IGNORECASE)
MLP = re.compile(
    r"mlps?|mlp_.*|\w+_mlp|ffn?|ffns|feed_?forward.*|denserelu.*|fc\d+|lin\d+|linear(?:\d+|_up|_down)|w\d+|wi(?:_\d+)?|c_fc|intermediate"
    r"|\w+_ffn|pwconv\d+|(?:up|gate|down|gate_up)_proj|dense_(?:h_to_4h|4h_to_h)|experts?|shared_experts?|moe",
    re.IGNORECASE,
)
GATED = re.compile(r"(?:gate|up)(?:_proj)?|w[13]|wi_[01]|fc1_[gx]|(?:linear|lin)_(?:gate|up)", re.IGNORECASE)
OTHER_MIXER = re.compile(r"\w*(?:mamba|ssm|lstm|rnn|recurrent|mixer)\w*|temporal_block|rec", re.IGNORECASE)
EXPERTS = re.compile(r"\w*experts?", re.IGNORECASE)
ROUTER = re.compile(r"(?:\w+_)?(?:gate|router)", re.IGNORECASE)
CLASSIFIER = re.compile(r"(?!pre_)(?:\w+_)?classifiers?", re.IGNORECASE)
HEAD = re.compile(
    r"(?!query_pos)(?:\w+_)?heads?|head_dist|cls|(?!pre_)(?:\w+_)?classifiers?|score|(?:to_)?logits|qa_outputs|embed_out|predictions?|vocab_projector"
    r"|output_projection|class_embed|bbox_embed",
    re.IGNORECASE,
)
SCORES = re.compile(r"cls_score|bbox_pred|cls_logits")  # heads of detectors, side by side in a module of heads


def is_fused(name: str) -> bool:
    """Whether the name says that the layer is a fused projection: query, key or value in one weight."""
    return leaf_is(name, FUSED) or (leaf_is(name, IN_ATTENTION) and bool(ATTENTION.search(parent(name))))


def family_of(name: str) -> str | None:
    """The group of layers in one module that mostly read the same input: ``"attention"``, ``"gated"`` (MLP) or none."""
    if leaf_is(name, QUERY, KEY, VALUE):
        return "attention"
    return "gated" if GATED.fullmatch(name) else None


def is_query_or_value(name: str) -> bool:
    """Whether the name says that the layer computes queries or values."""
    return leaf_is(name, QUERY, VALUE)


def parent(name: str) -> str:
    """The name of the module that ``name`` lies in."""
    return name.rpartition(".")[0]


def around(name: str) -> list[str]:
    """The names of all modules that ``name`` lies in, the model itself first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts))]


def inside(name: str, containers: set[str]) -> bool:
    """Whether ``name`` lies in one of ``containers``."""
    return any(container in containers for container in around(name))


def leaf_is(name: str, *patterns: re.Pattern[str]) -> bool:
    """Whether the word that says what the layer ``name`` is for fits one of ``patterns``."""
    word = stem(name).rpartition(".")[2]
    return any(_fits(word, pattern) for pattern in patterns)


@lru_cache(maxsize=4096)  # a model has many layers, and few words for what they are
def _fits(word: str, pattern: re.Pattern[str]) -> bool:
    return pattern.fullmatch(word) is not None


def stem(name: str) -> str:
    """The name that says what a layer is for: its own, or that of a module that stands for it.

    Such a module holds the layer and its norm (LeViT, ``q.ln.linear``), or one layer for each head (``q_layers.0``).
    """
    head, _, last = name.rpartition(".")
    if not head or _is_role(last) or _fits(last, RESULT):
        return name
    stands_for = next((outer for outer in (head, parent(head)) if _is_role(outer.rpartition(".")[2])), "")
    if stands_for:
        return stands_for
    wrapped = last in ("linear", "ln") and not head.rpartition(".")[2].isdigit()
    return stem(head) if wrapped else name


@lru_cache(maxsize=1024)
def _is_role(leaf: str) -> bool:
    """Whether ``leaf`` names a projection of attention, and not a module that holds attention."""
    return not ATTENTION.search(leaf) and any(pattern.fullmatch(leaf) for pattern in (QUERY, KEY, VALUE, FUSED))


def tokens(name: str, container: str) -> list[str]:
    """The words of ``name`` below ``container``."""
    return name.removeprefix(f"{container}." if container else "").split(".")


def any_token(words: Iterable[str], pattern: re.Pattern[str]) -> bool:
    """Whether one of ``words`` fits ``pattern``."""
    return any(_fits(word, pattern) for word in words)


def numbered(name: str) -> str:
    """The nearest module around ``name`` whose own name is a number: a block that repeats."""
    parts = name.split(".")[:-1]
    return next((".".join(parts[:length]) for length in range(len(parts), 0, -1) if parts[length - 1].isdigit()), "")
