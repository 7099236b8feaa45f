"""One layer's A and B as PEFT's files hold them, and back; what its files cannot hold.

Shapes (peft 0.21, ``tuners/lora/layer.py``): A ``(r, in)`` and B ``(out, r)`` for a linear map of either kind and for
an embedding, where the two have other names; A ``(r, in, *kernel)`` and B ``(out, r, 1, ...)`` for a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.config import alpha_of
from lightning_lora.distributed.sharded import full_tensor, shape_of
from lightning_lora.layers.adapter import Adapter, Adapters, Pairs
from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.linear import conv1d_base, is_quantized_class
from lightning_lora.layers.registry import adaptable_base, original_class, parts_of

KINDS = ("linear", "transposed", "embedding", "convolution")
SLICES, ON_META = "is adapted in slices", "is on the meta device, without values: load the base first"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class PeftPair:
    """A and B of one module.

    Args:
        A: ``(r, in, *kernel)``.
        B: ``(out, r, ...)``.
        scale: factor in front of ``B A``.
        keys: what the two are called.
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
    """What peft calls A and B of ``module``."""
    if adaptable_base(original_class(module)) is nn.Embedding:
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def refusal(module: nn.Module, owner: nn.Module | None) -> str | None:
    """Why no PEFT file can hold adapters of ``module`` in ``owner``, as the end of a sentence; ``None`` where one can.

    peft adds its term to what the module gives. So where that is not the plain map, the two would differ.
    """
    cls, root = original_class(module), adaptable_base(original_class(module))
    if root is None or not (root in (nn.Linear, nn.Embedding, *CONVOLUTIONS) or root is conv1d_base(root)):
        return f"is a {cls.__name__}, which PEFT's format has no place for"
    if isinstance(owner, nn.MultiheadAttention):
        return "lies in an nn.MultiheadAttention, which reads its weight past peft's adapter"
    if parameter_of(module).is_meta:
        return ON_META
    if root in CONVOLUTIONS:
        return _refused_convolution(module)
    if getattr(module, "max_norm", None) is not None:
        return "has `max_norm`, which peft applies to A instead of the sum"
    scaled = root is nn.Embedding and hasattr(module, "embed_scale")  # peft knows of that attribute
    if cls.forward is not root.forward and not scaled and not is_quantized_class(cls):
        return f"is a {cls.__name__} with a forward of its own, past which peft would add its term"
    return None


def kind_in_peft(module: nn.Module, owner: nn.Module | None, adapters: Adapter | Pairs) -> str:
    """What of PEFT's format an adapted layer is, or why it is nothing of that: told in checkpoints for later."""
    reason = refusal(module, owner) or refused_pairs(adapters)
    if reason is None and isinstance(adapters, Pairs):
        reason = SLICES
    if reason is not None:
        return reason
    root = adaptable_base(original_class(module))
    if root in CONVOLUTIONS:
        return "convolution"
    return "embedding" if root is nn.Embedding else "linear" if root is nn.Linear else "transposed"


def _refused_convolution(module: nn.Module) -> str | None:
    own = original_class(module)
    root = next(kind for kind in CONVOLUTIONS if issubclass(own, kind))
    for attribute, plain in (("groups", 1), ("padding_mode", "zeros"), ("dilation", (1,) * len(module.kernel_size))):  # type: ignore[arg-type]
        if getattr(module, attribute) != plain:
            return f"has {attribute}={getattr(module, attribute)!r}, which peft's adapter does not follow"
    if own.forward is not root.forward or getattr(own, "_conv_forward", None) is not root._conv_forward:
        return f"is a {own.__name__} with a forward of its own, past which peft would add its term"
    return None


def refused_pairs(adapters: Adapter | Pairs) -> str | None:
    """Why no PEFT file can hold these pairs, as the end of a sentence about their layer."""
    for adapter in pairs_in(adapters):
        if adapter.part.read or adapter.part.stacked or adapter.part.key != "weight":
            return f"is adapted by its parameter `{adapter.part.key}`, which PEFT's format has no place for"
    return None


def pairs_in(adapters: Adapter | Pairs) -> list[Adapter]:
    """One pair, or those of the slices of a fused map."""
    return [pair for _, pair in adapters.items()] if isinstance(adapters, Pairs) else [adapters]


def to_peft(module: nn.Module, adapters: Adapter | Pairs) -> PeftPair:
    """The pair as peft has it: of a fused map's slices one pair on all of it, whose rank is the sum of theirs.

    B is zero in the rows of the other slices, so that its product is the same.
    """
    pairs = pairs_in(adapters)
    weight = parameter_of(module)
    out_features = parts_of(module)[0].full_features(weight)[1]
    scale = pairs[0].scale
    A = torch.cat([_values(pair.A) for pair in pairs])
    B = torch.cat([_placed(pair, out_features) * (pair.scale / scale) for pair in pairs], dim=1)
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
    weight = parameter_of(module)
    in_features, out_features = parts_of(module)[0].full_features(weight)
    if isinstance(module, CONVOLUTIONS):
        kernel = tuple(shape_of(weight)[1:])
        return (r, *kernel), (out_features, r, *[1] * (len(kernel) - 1))
    return (r, in_features), (out_features, r)


def from_peft(adapters: Adapter | Pairs, pair: PeftPair) -> Mapping[str, Tensor] | str:
    """The values of A and B of each of ``adapters`` from the file's ``pair``; or why they do not fit."""
    A, B = pair.A.flatten(1), pair.B.flatten(1)
    pairs = pairs_in(adapters)
    if sum(one.r for one in pairs) != pair.r:
        return f"has rank {pair.r} in the file and {sum(one.r for one in pairs)} in the model"
    if not math.isclose(pairs[0].scale, pair.scale, rel_tol=1e-6):
        return f"has the scale {pair.scale:g} in the file and {pairs[0].scale:g} in the model"
    found: dict[str, Tensor] = {}
    start = 0
    for name, one in adapters.items() if isinstance(adapters, Pairs) else [("", adapters)]:
        columns = B[:, start : start + one.r]
        own = _own_rows(one, columns)
        if not torch.equal(one.part.place_rows(own, len(B)), columns):
            return "is adapted in rows that the adapters in the model leave alone"
        found[f"{name}.A" if name else "A"] = A[start : start + one.r]
        found[f"{name}.B" if name else "B"] = own * (pair.scale / one.scale)
        start += one.r
    return found


def _own_rows(pair: Adapter, B: Tensor) -> Tensor:
    rows = pair.part.rows
    if rows is None:
        return B
    blocks = B.reshape(rows.blocks, -1, B.shape[-1])
    return blocks[:, rows.start : rows.stop].reshape(-1, B.shape[-1])


def adapters_of(holder: Adapters, name: str) -> Adapter | Pairs:
    """The pairs of the adapter ``name`` of a layer."""
    found = holder[name]
    assert isinstance(found, (Adapter, Pairs))
    return found
