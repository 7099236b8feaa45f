"""The tensors of a base in files that an adapter in files changes.

The first part of the names may be missing on one side, if every layer is found without it.

Tied weights are recognised by names: files do not say which modules share a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_lora.cli.meta_model import is_embedding
from lightning_lora.cli.quantized_weights import is_quantized_in
from lightning_lora.files.renaming import OWN_NAMES, Renaming, renamings
from lightning_lora.files.safetensors import FLOATS, StoredTensor
from lightning_lora.files.weights import Weights, keeps_transposed, no_such
from lightning_lora.foreign import MODELS_WITH_HEAD
from lightning_lora.peft_format.config import ALL_LINEAR
from lightning_lora.peft_format.provenance import INNER
from lightning_lora.peft_format.stored import StoredAdapter, StoredPair, config_of
from lightning_lora.peft_format.targets import is_targeted

HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|output_projection|(?:predictions|lm_head)\.decoder)")
WEIGHTS = ("weight", "in_proj_weight")
APART = (
    "Make them two tensors in the base first: load it, give the head a copy of its weight, set "
    "`tie_word_embeddings=False` in its configuration, and save it."
)


def why_tied(name: str, base: Weights) -> str | None:
    """Why the layer ``name`` of ``base`` cannot change alone, and what to do; ``None`` if it can.

    Args:
        name: of the module, as in the base.
        base: the model. Its ``config.json`` says whether head and embedding are tied. If it does not, a language model
            without a tensor for its head counts as tied.
    """
    head = HEAD.fullmatch(name)
    if not (head or (is_embedding(name) and _is_token_embedding(name, base))) or not _is_tied(base):
        return None
    partner = "the input embedding" if head else "the output head"
    return f"`{name}` is tied to {partner}: they are one tensor, and merging into it would change both. {APART}"


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


@dataclass(frozen=True)
class StoredTarget:
    """A weight that a pair changes.

    Args:
        pair: A and B.
        start: the tensor that delta is added to: the base's weight, or the adapter's in its place.
        transposed: whether its shape is ``(in_features, out_features)``.
        factor: of the update.
    """

    pair: StoredPair
    start: StoredTensor
    transposed: bool
    factor: float = 1.0


@dataclass(frozen=True)
class Changes:
    """The changes of an adapter to a base, by the names of the base's tensors.

    Args:
        pairs: the tensors that delta is added to.
        in_full: the tensors that are replaced, or are new.
    """

    pairs: dict[str, StoredTarget]
    in_full: dict[str, StoredTensor]


def changes(adapter: StoredAdapter, base: Weights) -> Changes:
    """Find the tensors of ``base`` that ``adapter`` changes.

    Raises:
        ValueError: naming a layer that is missing or tied to another, or a weight that cannot take its delta.
    """
    transposed = config_of(adapter).transposed
    called = _renaming(adapter.pairs, base, adapter.file.metadata.get(INNER))
    # A new head is not in the base, and keeps its name.
    in_full = {called(key) if called(key) in base.tensors else key: tensor for key, tensor in adapter.in_full.items()}
    for name, tensor in in_full.items():
        _check_in_full(name, tensor, base)
    pairs = {}
    for name, pair in adapter.pairs.items():
        weight = _own_weight(called(name), base)
        # PEFT writes an adapted embedding in full as well.
        pairs[weight.name] = StoredTarget(
            pair, in_full.pop(weight.name, weight), _is_transposed(pair, weight, base, transposed)
        )
    _check_all_pairs(adapter, base, called)
    return Changes(pairs, in_full)


def _check_all_pairs(adapter: StoredAdapter, base: Weights, called: Renaming) -> None:
    """Raise if ``target_modules`` names a layer of ``base`` for which the file has no pair: a part of it is missing.

    ``"all-linear"`` cannot be checked, as a file of tensors does not say which are those of linear layers.
    """
    config = config_of(adapter)
    if config.targets == ALL_LINEAR:
        return
    starts = {name.partition(".")[0] for name in adapter.pairs}
    for key in (key for key, tensor in base.tensors.items() if len(tensor.shape) > 1):
        module, _, leaf = key.rpartition(".")
        candidates = (module, module.partition(".")[2], *(f"{start}.{module}" for start in starts))
        names = [name for name in candidates if name and called(name) == module]
        if leaf in WEIGHTS and any(is_targeted(name, config) and name not in adapter.pairs for name in names):
            raise ValueError(
                f"`{module}` is named by `target_modules` of `{adapter.path}`, which has no pair for it: the two files "
                "do not belong together, or one was cut. Save the adapter again."
            )


def _renaming(names: Iterable[str], base: Weights, inner: str | None) -> Renaming:
    """How the modules ``names`` of an adapter are called in ``base``; its file may name the ``inner`` model."""
    names = list(names)

    def fits(way: Renaming) -> bool:
        return all(_weight_of(way(name), base) or HEAD.fullmatch(way(name)) for name in names)

    if inner and fits(lambda name: f"{inner}.{name}"):
        return lambda name: f"{inner}.{name}"
    fitting = renamings(names, base.tensors, fits)
    if len(fitting) > 1:
        raise ValueError(
            f"`{names[0]}` of the adapter may be `{fitting[0][0]}.{names[0]}` or `{fitting[1][0]}.{names[0]}` of the "
            "base: give a base with that part alone, or merge in the module."
        )
    if fitting:
        return fitting[0][1]
    missing = next(name for name in names if not _weight_of(name, base))
    raise ValueError(
        f"{no_such(f'{missing}.weight', base)} The adapter belongs to another model, or its names begin otherwise. "
        f"{OWN_NAMES}"
    )


def _weight_of(name: str, base: Weights) -> StoredTensor | None:
    """The weight of the layer ``name``, if there is one."""
    weights = (base.tensors.get(f"{name}.{key}") for key in WEIGHTS)
    return next((weight for weight in weights if weight is not None), None)


def _own_weight(name: str, base: Weights) -> StoredTensor:
    tied, weight = why_tied(name, base), _weight_of(name, base)
    if tied is not None:
        raise ValueError(tied)
    if weight is None:
        raise ValueError(no_such(f"{name}.weight", base))
    if is_quantized_in(weight.name, base):
        raise ValueError(
            f"`{weight.name}` is quantized, and its few bits cannot hold the sum. Give the base in full precision that "
            "was quantized; or give --dequantize, which adds to the dequantized weights and writes a model in full "
            "precision."
        )
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"`{weight.name}` is of {weight.dtype}, whose few bits cannot hold the sum. Give the base in full "
            "precision that was quantized."
        )
    return weight


def _is_transposed(pair: StoredPair, weight: StoredTensor, base: Weights, default: bool) -> bool:
    """Whether ``weight`` has the shape (in, out); a square one has that of the nearest layers."""
    in_features, out_features = pair.features()
    square = in_features == out_features and len(weight.shape) == 2 and not pair.embedding
    as_near = keeps_transposed(weight.name.removesuffix(".weight"), base, default) if square else False
    if as_near is None:
        raise ValueError(
            f"`{weight.name}` is square, and no layer near it shows whether its shape is (in, out) or (out, in): merge "
            "in the module, by load_adapter and merge_lora."
        )
    is_transposed = pair.embedding or as_near
    if not is_transposed and weight.matrix_shape() == (out_features, in_features):
        return False
    if weight.shape == (in_features, out_features):
        return True
    raise ValueError(
        f"`{weight.name}` has shape {weight.shape}, but the adapter's pair is for {in_features} -> {out_features}: it "
        "was trained on another model."
    )


def _check_in_full(name: str, tensor: StoredTensor, base: Weights) -> None:
    tied, present = why_tied(name.rpartition(".")[0], base), base.tensors.get(name)
    same = (
        present is not None
        and present.shape == tensor.shape
        and (present.dtype in FLOATS or present.dtype == tensor.dtype)
    )
    if present is not None and not same:
        raise ValueError(
            f"`{name}` is in the adapter in full, of shape {tensor.shape} and {tensor.dtype}, but the base has it with "
            f"shape {present.shape} and {present.dtype}. Resize the base's first (new tokens?), and merge into that."
        )
    if tied is not None:
        raise ValueError(tied)
