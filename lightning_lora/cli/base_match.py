"""Which tensors of a base in files an adapter in files changes.

A model with a head calls its inner model ``model`` or ``transformer``, and files of the inner model alone leave that
out. So one leading part of the name may be on one side only, if then every map is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lightning_lora.cli.tied import HEAD, why_tied
from lightning_lora.files.safetensors import FLOATS, StoredTensor
from lightning_lora.files.weights import Weights, keeps_transposed, no_such
from lightning_lora.peft_format.provenance import INNER
from lightning_lora.peft_format.stored import StoredAdapter, StoredPair

Renaming = Callable[[str], str]


@dataclass(frozen=True)
class StoredTarget:
    """A weight that a pair changes.

    Args:
        pair: A and B.
        start: what delta is added to: the base's weight, or what the adapter has in its place.
        transposed: whether it is kept as ``(in_features, out_features)``.
    """

    pair: StoredPair
    start: StoredTensor
    transposed: bool


@dataclass(frozen=True)
class Changes:
    """What an adapter changes in a base, by the names of the base's tensors.

    Args:
        pairs: delta is added to these.
        whole: these are replaced, or are new.
    """

    pairs: dict[str, StoredTarget]
    whole: dict[str, StoredTensor]


def changes(adapter: StoredAdapter, base: Weights) -> Changes:
    """Find the tensors of ``base`` that ``adapter`` changes.

    Raises:
        ValueError: naming a map that is not there or is tied to another, or a weight that cannot take its delta.
    """
    turned = bool(adapter.config.get("fan_in_fan_out"))
    called = _renaming(adapter.pairs, base, adapter.file.metadata.get(INNER))
    # A new head is not in the base, and keeps its name.
    whole = {called(key) if called(key) in base.tensors else key: tensor for key, tensor in adapter.whole.items()}
    for name, tensor in whole.items():
        _check_whole(name, tensor, base)
    pairs = {}
    for name, pair in adapter.pairs.items():
        weight = _own_weight(called(name), base)
        # PEFT writes the embedding that it adapts beside the pair.
        pairs[weight.name] = StoredTarget(pair, whole.pop(weight.name, weight), _is_across(pair, weight, base, turned))
    return Changes(pairs, whole)


def _renaming(names: Iterable[str], base: Weights, inner: str | None) -> Renaming:
    """How the modules ``names`` of an adapter are called in ``base``, perhaps by the ``inner`` that its file tells."""
    names = list(names)

    def fits(way: Renaming) -> bool:
        return all(_weight_of(way(name), base) or HEAD.fullmatch(way(name)) for name in names)

    if inner and fits(lambda name: f"{inner}.{name}"):
        return lambda name: f"{inner}.{name}"
    starts = sorted({key.split(".")[0] for key in base.tensors if "." in key})
    plain: list[Renaming] = [lambda name: name, lambda name: name.partition(".")[2]]
    below: list[tuple[str, Renaming]] = [(start, lambda name, start=start: f"{start}.{name}") for start in starts]  # type: ignore[misc]
    for way in plain:
        if fits(way):
            return way
    found = [(start, way) for start, way in below if fits(way)]
    if len(found) > 1:
        raise ValueError(
            f"`{names[0]}` of the adapter may be `{found[0][0]}.{names[0]}` or `{found[1][0]}.{names[0]}` of the base: "
            "give a base with that part alone, or merge in the module."
        )
    if found:
        return found[0][1]
    missing = next(name for name in names if not _weight_of(name, base))
    raise ValueError(
        f"{no_such(f'{missing}.weight', base)} The adapter belongs to another model, or its names begin otherwise."
    )


def _weight_of(name: str, base: Weights) -> StoredTensor | None:
    """The tensor that the map ``name`` multiplies by, if it is there."""
    return base.tensors.get(f"{name}.weight") or base.tensors.get(f"{name}.in_proj_weight")


def _own_weight(name: str, base: Weights) -> StoredTensor:
    tied, weight = why_tied(name, base), _weight_of(name, base)
    if tied is not None:
        raise ValueError(tied)
    if weight is None:
        raise ValueError(no_such(f"{name}.weight", base))
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"`{weight.name}` is of {weight.dtype}, whose few bits cannot hold the sum: merge into the base in full "
            "precision, and quantize that."
        )
    return weight


def _is_across(pair: StoredPair, weight: StoredTensor, base: Weights, turned: bool) -> bool:
    """Whether ``weight`` is kept as (in, out); a square one is as the nearest others are."""
    in_features, out_features = pair.features()
    square = in_features == out_features and len(weight.shape) == 2 and not pair.embedding
    told = keeps_transposed(weight.name.removesuffix(".weight"), base, turned) if square else False
    if told is None:
        raise ValueError(
            f"`{weight.name}` is square, and nothing near it tells whether it is kept as (in, out) or (out, in): merge "
            "in the module, by load_adapter and merge_lora."
        )
    across = pair.embedding or told
    if not across and weight.matrix_shape() == (out_features, in_features):
        return False
    if weight.shape == (in_features, out_features):
        return True
    raise ValueError(
        f"`{weight.name}` has shape {weight.shape}, but the adapter's pair is for {in_features} -> {out_features}: it "
        "was trained on another model."
    )


def _check_whole(name: str, tensor: StoredTensor, base: Weights) -> None:
    tied, own = why_tied(name.rpartition(".")[0], base), base.tensors.get(name)
    same = own is not None and own.shape == tensor.shape and (own.dtype in FLOATS or own.dtype == tensor.dtype)
    if own is not None and not same:
        raise ValueError(
            f"`{name}` is in the adapter in full, of shape {tensor.shape} and {tensor.dtype}, but the base has it with "
            f"shape {own.shape} and {own.dtype}. Resize the base's first (new tokens?), and merge into that."
        )
    if tied is not None:
        raise ValueError(tied)
