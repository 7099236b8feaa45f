"""A and B of one layer in the form of PEFT's files, and back; and which layers have no such form.

Shapes (peft 0.21, ``tuners/lora/layer.py``): A ``(r, in)`` and B ``(out, r)`` for a linear layer of either kind and for
an embedding, where the two have other names; A ``(r, in, *kernel)`` and B ``(out, r, 1, ...)`` for a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from lightning_lora.config import alpha_of
from lightning_lora.distributed.sharded import full_tensor, shape_of
from lightning_lora.layers.adapter import Adapter, Pairs
from lightning_lora.layers.adapters import Adapters
from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.linear import conv1d_base
from lightning_lora.layers.quantized.formats import is_quantized_class
from lightning_lora.layers.registry import adaptable_base, original_class, parts_of

KINDS = ("linear", "transposed", "embedding", "convolution")
SLICES, ON_META = "is adapted in slices", "is on the meta device, without values: load the base first"
IN_ATTENTION = "is a projection of an nn.MultiheadAttention"
BYPASSED = "lies in an nn.MultiheadAttention, which bypasses peft's adapter as it reads the weight itself"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class PeftPair:
    """A and B of one module.

    Args:
        A: ``(r, in, *kernel)``.
        B: ``(out, r, ...)``.
        scale: factor in front of ``B A``.
        keys: the ends of their names in the file.
    """

    A: Tensor
    B: Tensor
    scale: float
    keys: tuple[str, str]

    @property
    def r(self) -> int:
        """Rank."""
        return self.A.shape[0]

    def alpha(self, rslora: bool) -> float:
        """The numerator from which peft computes the scale."""
        return alpha_of(self.scale, self.r, rslora)


def keys_of(module: nn.Module) -> tuple[str, str]:
    """The ends of peft's names for A and B of ``module``."""
    if adaptable_base(original_class(module)) is nn.Embedding:
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def refusal(module: nn.Module, owner: nn.Module | None) -> str | None:
    """Why no PEFT file can hold adapters of ``module`` in ``owner``, as the end of a sentence; ``None`` where one can.

    peft adds ``B A x`` to the output of the module. So outputs differ where the module computes more than ``W x``.
    """
    cls, root = original_class(module), adaptable_base(original_class(module))
    if root is nn.MultiheadAttention:
        return _refused_attention(module)
    if root is None or not (root in (nn.Linear, nn.Embedding, *CONVOLUTIONS) or root is conv1d_base(root)):
        return f"is a {cls.__name__}, which PEFT's format has no place for"
    if owner is not None and is_attention(owner):
        return _refused_attention(owner)
    if root in CONVOLUTIONS:
        return _refused_convolution(module)
    if getattr(module, "max_norm", None) is not None:
        return "has `max_norm`, which peft applies to A instead of the sum"
    scaled = root is nn.Embedding and hasattr(module, "embed_scale")  # peft knows of that attribute
    if cls.forward is not root.forward and not scaled and not is_quantized_class(cls):
        return f"is a {cls.__name__} with its own forward, whose result peft's term would be added to"
    return None


def kind_in_peft(module: nn.Module, owner: nn.Module | None, adapters: Adapter | Pairs) -> str:
    """The kind of an adapted layer in PEFT's format, or why it has none; checkpoints record it."""
    reason = refusal(module, owner) or refused_pairs(adapters)
    if reason is None and is_empty(module):
        reason = ON_META
    if reason is None and (is_attention(module) or (owner is not None and is_attention(owner))):
        reason = IN_ATTENTION
    if reason is None and isinstance(adapters, Pairs):
        reason = SLICES
    if reason is not None:
        return reason
    root = adaptable_base(original_class(module))
    if root in CONVOLUTIONS:
        return "convolution"
    return "embedding" if root is nn.Embedding else "linear" if root is nn.Linear else "transposed"


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` is an ``nn.MultiheadAttention``, with or without adapters."""
    return issubclass(original_class(module), nn.MultiheadAttention)


def _refused_attention(module: nn.Module) -> str | None:
    assert isinstance(module, nn.MultiheadAttention)
    cls = original_class(module)
    if not module._qkv_same_embed_dim:
        return "belongs to an nn.MultiheadAttention with another `kdim` or `vdim`, which peft does not adapt"
    if cls.forward is not nn.MultiheadAttention.forward:
        return f"belongs to a {cls.__name__} with its own forward, which peft calls as an nn.MultiheadAttention's"
    if is_quantized_class(original_class(module.out_proj)):
        return "belongs to an nn.MultiheadAttention with a quantized `out_proj`, which peft does not adapt"
    return None


def is_empty(module: nn.Module) -> bool:
    """Whether the weight of the adapted or adaptable ``module`` is on the meta device."""
    return parameter_of(module, parts_of(module)[0].key).is_meta


def _refused_convolution(module: nn.Module) -> str | None:
    cls = original_class(module)
    root = next(kind for kind in CONVOLUTIONS if issubclass(cls, kind))
    for attribute, plain in (("groups", 1), ("padding_mode", "zeros"), ("dilation", (1,) * len(module.kernel_size))):  # type: ignore[arg-type]
        if getattr(module, attribute) != plain:
            return f"has {attribute}={getattr(module, attribute)!r}, which peft's adapter does not follow"
    if cls.forward is not root.forward or getattr(cls, "_conv_forward", None) is not root._conv_forward:
        return f"is a {cls.__name__} with its own forward, whose result peft's term would be added to"
    return None


def refused_pairs(adapters: Adapter | Pairs) -> str | None:
    """Why PEFT's format has no place for these pairs, as the end of a sentence about their layer."""
    for adapter in pairs_in(adapters):
        if adapter.part.read or adapter.part.stacked or adapter.part.key not in ("weight", "in_proj_weight"):
            return f"is adapted by its parameter `{adapter.part.key}`, which PEFT's format has no place for"
    return None


def pairs_in(adapters: Adapter | Pairs) -> list[Adapter]:
    """The pair of a layer, or the pairs of the slices of a fused one."""
    return [pair for _, pair in adapters.items()] if isinstance(adapters, Pairs) else [adapters]


def to_peft(module: nn.Module, adapters: Adapter | Pairs) -> PeftPair:
    """The pair in peft's form; the slices of a fused layer become one pair, whose rank is the sum of theirs.

    For each slice B is zero in the rows of the others, so that ``B A`` is the same. Slices with one A for all, as
    :func:`from_peft` gives them, become the pair that they were read from.
    """
    pairs = pairs_in(adapters)
    weight = parameter_of(module, pairs[0].part.key)
    out_features = pairs[0].part.full_features(weight)[1]
    scale = pairs[0].scale
    every_A = [_values(pair.A) for pair in pairs]
    every_B = [_placed(pair, out_features) * (pair.scale / scale) for pair in pairs]
    if all(torch.equal(A, every_A[0]) for A in every_A):
        A, B = every_A[0], sum(every_B[1:], every_B[0])
    else:
        A, B = torch.cat(every_A), torch.cat(every_B, dim=1)
    if isinstance(module, CONVOLUTIONS):
        kernel = weight.shape[1:]
        A, B = A.view(-1, *kernel), B.view(*B.shape, *[1] * (len(kernel) - 1))
    return PeftPair(A.contiguous(), B.contiguous(), scale, keys_of(module))


def _values(parameter: Tensor) -> Tensor:
    return full_tensor(parameter).detach().to("cpu", torch.float32, copy=True)


def _placed(pair: Adapter, out_features: int) -> Tensor:
    return pair.part.place_rows(_values(pair.B), out_features)


def expected_shapes(module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B of ``module`` in a file."""
    part = parts_of(module)[0]
    weight = parameter_of(module, part.key)
    in_features, out_features = part.full_features(weight)
    if isinstance(module, CONVOLUTIONS):
        kernel = tuple(shape_of(weight)[1:])
        return (r, *kernel), (out_features, r, *[1] * (len(kernel) - 1))
    return (r, in_features), (out_features, r)


def from_peft(adapters: Adapter | Pairs, pair: PeftPair) -> Mapping[str, Tensor] | str:
    """The values of A and B of each of ``adapters`` from the file's ``pair``; or why they do not fit.

    Slices get the columns of B that are theirs; or, where each has the rank of the file's pair, all of its A.
    """
    named = list(adapters.items()) if isinstance(adapters, Pairs) else [("", adapters)]
    ranks = [adapter.r for _, adapter in named]
    shared = len(named) > 1 and set(ranks) == {pair.r}
    if not shared and sum(ranks) != pair.r:
        return f"has rank {pair.r} in the file and {sum(ranks)} in the model"
    if not math.isclose(named[0][1].scale, pair.scale, rel_tol=1e-6):
        return f"has the scale {pair.scale:g} in the file and {named[0][1].scale:g} in the model"
    starts = [0] * len(named) if shared else list(accumulate(ranks, initial=0))[:-1]
    A, B = pair.A.flatten(1), pair.B.flatten(1)
    values: dict[str, Tensor] = {}
    placed = torch.zeros_like(B)
    for (name, adapter), start in zip(named, starts, strict=True):
        columns = slice(start, start + adapter.r)
        rows = own_rows(adapter, B[:, columns])
        placed[:, columns] += adapter.part.place_rows(rows, len(B))
        values[f"{name}.A" if name else "A"] = A[columns]
        values[f"{name}.B" if name else "B"] = rows * (pair.scale / adapter.scale)
    return values if torch.equal(placed, B) else "is adapted in rows that the adapters in the model do not change"


def own_rows(pair: Adapter, B: Tensor) -> Tensor:
    """The rows of B that ``pair`` adapts."""
    rows = pair.part.rows
    if rows is None:
        return B
    blocks = B.reshape(rows.blocks, -1, B.shape[-1])
    return blocks[:, rows.start : rows.stop].reshape(-1, B.shape[-1])


def padded(pair: PeftPair, rank: int, scale: float) -> PeftPair:
    """The same update with ``rank`` and ``scale``: rows of A and columns of B that are zero are added."""
    more = rank - pair.r
    A = nn.functional.pad(pair.A, (0, 0, 0, more))
    B = nn.functional.pad(pair.B * (pair.scale / scale), (0, more))
    return PeftPair(A, B, scale, pair.keys)


def adapters_of(holder: Adapters, name: str) -> Adapter | Pairs:
    """The pairs of the adapter ``name`` of a layer."""
    adapter = holder[name]
    assert isinstance(adapter, (Adapter, Pairs))
    return adapter
