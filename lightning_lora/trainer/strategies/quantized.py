"""How quantized weights must be stored for a precision and a strategy.

bitsandbytes may store codes in a floating dtype, so that FSDP1 shards them. A cast to another dtype would destroy them.
The tensors of torchao and quanto hold their codes inside, where few strategies can shard them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.foreign import QUANTIZING_LIBRARY, QUANTO, is_from
from lightning_lora.layers.quantized.formats import is_8bit, is_quantized_class, quantization_of
from lightning_lora.model.freeze import in_files
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor
from lightning_lora.trainer.imports import MisconfigurationException

TRUE_PRECISION = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def check_cast_codes(strategy: Any, module: nn.Module) -> None:
    """Raise for 4-bit weights that the precision or FSDP1 would cast.

    Raises:
        MisconfigurationException: naming the first layer, and the dtype to load it with.
    """
    for name, layer in _quantized(module):
        stored, wanted = layer.weight.dtype, _cast_to(strategy)
        if stored.is_floating_point and wanted not in (None, stored) and quantization_of(layer) is not None:
            precision = strategy.precision_plugin.precision
            raise MisconfigurationException(
                f"`{name}` stores its 4-bit weight as {stored}, and precision={precision!r} would cast that to "
                f"{wanted}, which destroys the codes. Load the model with BitsAndBytesConfig("
                f"bnb_4bit_quant_storage={wanted})."
            )


def _cast_to(strategy: Any) -> torch.dtype | None:
    """The dtype to which weights are cast; ``None`` if they stay as they are."""
    mixed = getattr(strategy, "mixed_precision_config", None)
    return TRUE_PRECISION.get(strategy.precision_plugin.precision) or getattr(mixed, "param_dtype", None)


def check_sharded_codes(strategy: Any, module: nn.Module) -> None:
    """Raise for 8-bit layers, which read their weight from a place that no strategy shards.

    Raises:
        MisconfigurationException: naming the first layer.
    """
    for name, layer in _quantized(module):
        if is_8bit(layer):
            raise MisconfigurationException(
                f"`{name}` is an 8-bit layer of bitsandbytes, which keeps its weight in a second place, where "
                f"{type(strategy).__name__} does not shard it. Load the model in 4 bits, or use strategy='ddp'."
            )


def check_sharded_tensors(strategy: Any, module: nn.Module) -> None:
    """Raise for a weight of torchao or quanto that loses its codes, or raises, where it is split.

    Raises:
        MisconfigurationException: naming the first of a class.
    """
    tried: set[type[Tensor]] = set()
    for name, weight in _quantized_tensors(module):
        if type(weight) not in tried and not _can_be_split(weight):
            raise _cannot_shard(strategy, name, weight)
        tried.add(type(weight))


def _can_be_split(weight: Tensor) -> bool:
    try:
        part = weight.detach().chunk(2)[0]
    except (NotImplementedError, RuntimeError):
        return False
    return type(part) is type(weight)  # quanto dequantizes what it cannot compute with codes


def _cannot_shard(strategy: Any, name: str, weight: Tensor) -> Exception:
    library = "quanto" if is_from(type(weight), QUANTO) else "torchao"
    return MisconfigurationException(
        f"`{name}` is quantized by {library}, and {type(strategy).__name__} would not shard its codes. Use "
        "strategy='ddp', which supports it, or load the model in 4 bits by bitsandbytes."
    )


def check_flat_codes(strategy: Any, module: nn.Module) -> None:
    """Raise for quantized weights that cannot be a part of FSDP1's flat parameters, which are of one floating dtype.

    Raises:
        MisconfigurationException: naming the first layer, and the dtype to load it with.
    """
    for name, weight in _quantized_tensors(module):
        raise _cannot_shard(strategy, name, weight)
    check_sharded_codes(strategy, module)
    layers = dict(_quantized(module))
    others = _dtypes(module, layers.values())
    for name, layer in layers.items():
        stored = layer.weight.dtype
        if not stored.is_floating_point or others.keys() - {stored}:
            wanted = others.most_common(1)[0][0] if others else torch.bfloat16
            also = f" and dtype={wanted} for the rest" if len(others) > 1 else ", the dtype of the rest"
            raise MisconfigurationException(
                f"`{name}` stores its 4-bit weight as {stored}, and {type(strategy).__name__} shards parameters of one "
                f"floating dtype. Load the model with BitsAndBytesConfig(bnb_4bit_quant_storage={wanted}){also}, or "
                "use ModelParallelStrategy, which shards each parameter by itself."
            )


def _quantized(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of bitsandbytes."""
    for name, layer in names.named_modules(module):
        if is_quantized_class(type(layer)) and is_from(type(layer), QUANTIZING_LIBRARY):
            yield name, layer


def _quantized_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of torchao and quanto."""
    return ((name, p) for name, p in names.named_parameters(module) if is_quantized_tensor(p))


def _dtypes(module: nn.Module, layers: Any) -> Counter[torch.dtype]:
    """The dtypes of what is sharded in addition to the weights of ``layers``, with the numbers of parameters."""
    left_out = {id(parameter) for _, parameter in in_files(module)} | {id(layer.weight) for layer in layers}
    return Counter(parameter.dtype for parameter in module.parameters() if id(parameter) not in left_out)
