"""``nn.MultiheadAttention`` in PEFT's files, where it has two pairs: one for q, k and v together, one for ``out_proj``.

peft 0.21 (``MultiheadAttention`` in ``tuners/lora/layer.py``) has one pair for ``in_proj_weight``, whose rows are those
of q, k and v, and always a second one, of the same rank and scale, for ``out_proj``. A projection without an adapter
here has zeros in the file. peft adds the second update twice, so B of ``out_proj`` is stored as half of its value.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.adapter import Adapter, Pairs
from lightning_lora.peft_format.layers import PeftPair, padded, to_peft

OUT_PROJ = "out_proj"
INSIDE = f".base_layer.{OUT_PROJ}"  # where peft keeps the second pair, below the name of the attention
TIMES = 2  # how often peft adds the update of ``out_proj``: 0.15.0, 0.19.0 and 0.21.2 do so
LAST_SEEN = (0, 21)
THIRDS = ("q", "k", "v")


def attention_pairs(
    name: str, module: nn.Module, projections: Adapter | Pairs | None, output: Adapter | Pairs | None
) -> dict[str, PeftPair]:
    """The two pairs of the attention ``module``, by the names of their places in the file.

    Args:
        name: of the attention.
        module: the attention.
        projections: the adapters of q, k and v.
        output: the adapter of ``out_proj``.
    """
    assert isinstance(module, nn.MultiheadAttention)
    first = None if projections is None else to_peft(module, projections)
    second = None if output is None else to_peft(module.out_proj, output)
    scale = next(pair.scale for pair in (first, second) if pair is not None)
    rank = max(pair.r for pair in (first, second) if pair is not None)
    size = module.embed_dim
    if second is not None:
        second = PeftPair(second.A, second.B / TIMES, second.scale, second.keys)
    return {
        name: padded(_pair_or_zeros(first, 3 * size, size), rank, scale),
        f"{name}{INSIDE}": padded(_pair_or_zeros(second, size, size), rank, scale),
    }


def warn_of_half(names: list[str]) -> None:
    """Warn that the file has half of the updates of the ``out_proj`` in the attentions ``names``."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    warnings.warn(
        f"peft 0.21 adds the update of `{names[0]}.{OUT_PROJ}`{more} twice, so the file has half of it, and peft's "
        "outputs are those of the model. A later peft that adds it once would apply half of it.",
        stacklevel=6,
    )


def _pair_or_zeros(pair: PeftPair | None, out_features: int, in_features: int) -> PeftPair:
    zeros = PeftPair(torch.zeros(0, in_features), torch.zeros(out_features, 0), 1.0, ("lora_A.weight", "lora_B.weight"))
    return zeros if pair is None else pair


def without_padding(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A ``(r, in)`` and B ``(out, r)`` without the last rows and columns that are zero in both; ``r`` may become 0."""
    used = (A.any(1) | B.any(0)).nonzero()
    r = int(used[-1]) + 1 if len(used) else 0
    return A[:r], B[:, :r]


def ranks_of_projections(B: Tensor) -> dict[str, int]:
    """The rank of each adapted projection, from B ``(3 * size, r)`` of the pair of all three.

    Where each column of B is for one projection, and those of q come before those of k and of v, each has as many as it
    has columns. That is how :func:`attention_pairs` writes it. In any other B all three use every row of A.
    """
    uses = B.view(3, -1, B.shape[1]).any(1)
    owners = uses.int().argmax(0)
    if bool((uses.sum(0) == 1).all()) and bool((owners.diff() >= 0).all()):
        return {name: count for i, name in enumerate(THIRDS) if (count := int((owners == i).sum()))}
    return dict.fromkeys(THIRDS, B.shape[1])


def attention_around(key: str) -> str | None:
    """The attention that the pair at the place ``key`` of a file is inside, as its ``out_proj``."""
    return key.removesuffix(INSIDE) if key.endswith(INSIDE) else None


def warn_of_version(values: Mapping[str, Any]) -> None:
    """Warn if a later peft wrote the configuration ``values``, which may add the update of ``out_proj`` once."""
    version = re.match(r"(\d+)\.(\d+)", str(values.get("peft_version") or ""))
    if version is not None and (int(version[1]), int(version[2])) > LAST_SEEN:
        warnings.warn(
            f"peft {version[0]} wrote an adapter of an nn.MultiheadAttention. peft 0.21 adds the update of its "
            "`out_proj` twice, and so it is read here; compare the outputs.",
            stacklevel=3,
        )
