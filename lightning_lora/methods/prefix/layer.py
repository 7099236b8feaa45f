"""A prefix, and an attention block that puts it before its keys and values where it calls the kernel.

The block's own forward runs inside a ``TorchFunctionMode``, which sees each call of
``F.scaled_dot_product_attention`` and extends keys, values and mask. A cache of the block never holds the prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_lora.distributed.sharded import shape_of
from lightning_lora.layers.adapted import Adapted, FullPrecision
from lightning_lora.torch_internals import checkpoint_of_saved_tensors

STD = 0.02
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Prefix(FullPrecision):
    """Keys and values of one attention block, as a cache would hold them, so after any rotary embedding.

    They start as small random numbers. Zeros would get equal gradients and stay equal at every position. Small keys
    give scores near 0, so that no position of the prefix starts with more weight than another one.

    Args:
        site: the name of the block, for errors.
        heads: number of heads of keys and values.
        length: number of positions.
        key_features: of each head.
        value_features: of each head.
        seed: of the first values, by a generator of their own.
        device: of K and V.
    """

    K: nn.Parameter
    V: nn.Parameter

    def __init__(
        self,
        site: str,
        *,
        heads: int,
        length: int,
        key_features: int,
        value_features: int,
        seed: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.site, self.length, self.seed = site, length, seed
        self.K = nn.Parameter(torch.empty(heads, length, key_features, dtype=torch.float32, device=device))
        self.V = nn.Parameter(torch.empty(heads, length, value_features, dtype=torch.float32, device=device))
        if not self.K.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both from a normal distribution with standard deviation 0.02."""
        generator = torch.Generator().manual_seed(self.seed)
        for parameter in (self.K, self.V):
            values = torch.empty(parameter.shape, device="cpu", dtype=torch.float32)
            parameter.copy_(values.normal_(0, STD, generator=generator))

    def forward(self, key: Tensor, value: Tensor, query_heads: int) -> tuple[Tensor, Tensor]:
        """``key`` and ``value`` with the prefix before their first position.

        Args:
            key: ``(batch, heads, length, features)``, or ``(batch, length, features)`` of one head. The heads may be
                repeated for those of the query.
            value: of the same shape up to the features.
            query_heads: number of heads of the query.
        """
        return self._before(key, self.K, "K", query_heads), self._before(value, self.V, "V", query_heads)

    def _before(self, x: Tensor, prefix: Tensor, name: str, query_heads: int) -> Tensor:
        heads = x.shape[1] if x.dim() == 4 else 1
        if heads not in (len(prefix), query_heads) or heads % len(prefix) or x.shape[-1] != prefix.shape[-1]:
            raise RuntimeError(
                f"`{self.site}` has a prefix of shape {tuple(prefix.shape)} (heads, length, features), found by a "
                f"trial run of the block alone, but its forward has a {name} of shape {tuple(x.shape)}. Leave the "
                f"block out: exclude=[{self.site!r}]."
            )
        prefix = prefix.to(x.dtype).repeat_interleave(heads // len(prefix), 0)
        prefix = prefix if x.dim() == 4 else prefix.squeeze(0)
        return torch.cat([prefix.expand(len(x), *prefix.shape), x], -2)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        heads, _, features = shape_of(self.K)
        return f"length={self.length}, heads={heads}, features={features}"


class PrefixAttention(Adapted):
    """An attention block whose calls of ``F.scaled_dot_product_attention`` see the prefix."""

    method_key: ClassVar[str] = "prefix"
    prefix: Prefix

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain block, with the prefix before its keys and values."""
        mode = WithPrefix(self.prefix)
        with mode:
            output = super().forward(*args, **kwargs)
        if not mode.reached:
            raise RuntimeError(
                f"`{self.prefix.site}` computed its output without `F.scaled_dot_product_attention`, so its prefix "
                "did not act. Switch that on (transformers: attn_implementation='sdpa'; "
                f"timm: fused_attn=True), or leave the block out: exclude=[{self.prefix.site!r}]."
            )
        return output


class WithPrefix(TorchFunctionMode):
    """Inside it every call of the kernel sees the prefix.

    Args:
        prefix: of the block that runs inside.

    Attributes:
        reached: whether the kernel was called.
    """

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self.prefix, self.reached = prefix, False
        self.grad = torch.is_grad_enabled()
        self.checkpoint = checkpoint_of_saved_tensors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Torch calls this for every function."""
        if func is Tensor.unflatten:  # its code calls `super()`, which torch.compile cannot trace under a mode
            func = torch.unflatten
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.reached = True
        self._check_not_checkpointed()
        return attention_with_prefix(self.prefix, **dict(zip(ARGUMENTS, args, strict=False)), **(kwargs or {}))

    def _check_not_checkpointed(self) -> None:
        """Raise if the block recomputes the kernel in the backward pass, where the prefix would be missing."""
        if self.grad != torch.is_grad_enabled() or self.checkpoint is not checkpoint_of_saved_tensors():
            site = self.prefix.site
            raise RuntimeError(
                f"`{site}` calls `F.scaled_dot_product_attention` inside a checkpoint or a `torch.no_grad()` of its "
                "own, so gradients would miss the prefix. Checkpoint the block from outside instead, or leave it out: "
                f"exclude=[{site!r}]."
            )


def attention_with_prefix(
    prefix: Prefix,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """``F.scaled_dot_product_attention`` with a prefix that every query sees; for the arguments see there."""
    check_not_nested(prefix.site, key)
    if attn_mask is not None:
        attn_mask = mask_with_prefix(attn_mask, key.shape[-2], prefix.length)
    elif is_causal:  # the kernel's own causal mask would hide a part of the prefix from the first queries
        size = (query.shape[-2], prefix.length + key.shape[-2])
        attn_mask, is_causal = torch.ones(size, dtype=torch.bool, device=query.device).tril(prefix.length), False
    key, value = prefix(key, value, query.shape[-3])
    if attn_mask is not None and kwargs.pop("enable_gqa", False):  # on CUDA only torch's slowest kernel takes both
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    # Not the function of `F`: the mode of an attention block around this one would add that block's prefix.
    kernel = torch.ops.aten.scaled_dot_product_attention
    output: Tensor = kernel(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
    return output


def mask_with_prefix(mask: Tensor, keys: int, length: int) -> Tensor:
    """``mask``, boolean or additive, for ``length`` more keys before the first one that every query sees.

    Args:
        mask: of shape ``(..., queries, keys)``, or any that is expanded to it.
        keys: number of keys before.
        length: of the prefix.
    """
    mask = mask.expand(*mask.shape[:-1], keys)
    return F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)


def check_not_nested(site: str, x: Tensor) -> None:
    """Raise for nested tensors."""
    if x.is_nested:
        raise RuntimeError(
            f"`{site}` got nested tensors, which cannot take a prefix. Pad the sequences and mask the padding."
        )
