"""The weights of a base, a module's or a file's, copied into the module whose adapters were trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.files.safetensors import StoredTensor, dtype_of, value_of
from lightning_lora.files.weights import INDEX, open_weights
from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.quantized.formats import quantization_of, quantized_modules
from lightning_lora.model.record import is_merged
from lightning_lora.model.state import clean_state, lora_parameters
from lightning_lora.names import clean, join, nearest
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor
from lightning_lora.trainer.checkpointing import contents, reading

Source = Mapping[str, Tensor | StoredTensor]
Copied = list[tuple[Tensor, Tensor]]


def tensors_of(base: nn.Module | str | Path, weights_only: bool) -> Source:
    """The tensors of ``base`` by name; those in safetensors files are not read yet.

    Args:
        base: a module, or the path of a ``.ckpt``, ``.pt`` or ``.bin`` file, a safetensors file or its index, or a
            directory that ``save_pretrained`` wrote.
        weights_only: as for ``torch.load``.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the file is damaged or holds no weights of a base, or the module is merged.
    """
    if isinstance(base, nn.Module):
        if is_merged(base):
            raise ValueError("`base` has merged adapters, so its weights are no base: call `unmerge_lora(base)` first.")
        return {name: value for name, value in clean_state(base).items() if isinstance(value, Tensor)}
    path = Path(base)
    if path.name.endswith(INDEX):
        path = path.parent
    if path.is_dir() or path.suffix == ".safetensors":
        return open_weights(path).tensors
    return _in_checkpoint(path, reading.open_file(reading.on_cpu, path, weights_only, "base"))


def _in_checkpoint(path: Path, content: Any) -> Source:
    if isinstance(content, dict) and contents.KEY in content:
        recorded = content[contents.KEY]
        merged = isinstance(recorded, dict) and "state_dict" in recorded  # written with save="merged"
        what = "the merged model, in which adapters are already" if merged else "adapters alone"
        raise ValueError(f"`base={str(path)!r}` holds {what}. Give the file or the module that they train on.")
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {clean(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"`base={str(path)!r}` must hold a state dict, alone or as the entry 'state_dict', but holds a "
            f"{type(content).__name__} without one. Save it by torch.save(model.state_dict(), path)."
        )
    return tensors


@torch.no_grad()
def copy_base(
    source: Source, module: nn.Module, frozen: Collection[str], overwritten: Copied | None = None
) -> set[str]:
    """Copy what ``source`` and ``module`` share by name into ``module``, cast to its dtypes.

    The names in ``source`` may lack a prefix, as those of the network that a LightningModule holds do. Parameters that
    the adapter file holds in full need not fit: a new head replaced the one in the base.

    Args:
        source: from :func:`tensors_of`.
        module: what gets the values.
        frozen: the names of the parameters that must fit.
        overwritten: gets each tensor with the values that it had, before it is written.

    Returns:
        The names that were copied.

    Raises:
        ValueError: if nothing is shared, or a frozen parameter does not fit; nothing is copied then.
    """
    present = _own_tensors(module)
    prefix = _prefix(source, present)
    source = {f"{prefix}{name}": value for name, value in source.items()}
    layers = {join(name, "weight"): layer for name, layer in quantized_modules(module) if _has_codes(layer)}
    shared: dict[str, Tensor | StoredTensor] = {}
    for name, own in present.items():
        if name not in source:
            continue
        codes = layers.get(name)
        misfit = _misfit(name, source, own) if codes is None else _misfit_of_codes(name, source, codes)
        if misfit is not None and name in frozen:
            raise ValueError(f"`base` does not fit the module: `{name}` {misfit}.")
        if misfit is None:
            shared[name] = source[name]
    for name, value in shared.items():
        tensor = present[name]
        if overwritten is not None:
            overwritten.append((tensor, tensor.detach().clone()))
        tensor.copy_(value_of(value))
    return set(shared)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``module`` without adapters."""
    adapters = {name for name, _ in lora_parameters(module)}
    state = clean_state(module)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in adapters}


def _prefix(source: Source, present: Mapping[str, Tensor]) -> str:
    """What to put in front of the names in ``source``, so that most of them are those of a module."""
    counts: Counter[str] = Counter()
    for name in present:
        parts = name.split(".")
        for start in range(len(parts)):
            tail = ".".join(parts[start:])
            if tail in source:
                counts[name[: len(name) - len(tail)]] += 1
    best = counts.most_common(2)
    if not best:
        name = next(iter(present), "")
        raise ValueError(
            f"`base` has no tensor under any name of the module, such as `{name}`; the nearest that it has is "
            f"`{nearest(name, source, 1)[0] if source else ''}`. Rename its entries, or load it into the module before."
        )
    if len(best) == 2 and best[0][1] == best[1][1]:
        places = " and ".join(f"`{prefix.rstrip('.') or 'the module itself'}`" for prefix, _ in best)
        raise ValueError(f"`base` fits {places}. Load it into the module yourself, and give that module.")
    return best[0][0]


def _misfit(name: str, source: Source, present: Tensor) -> str | None:
    """Why the tensor ``name`` of ``source`` cannot be copied into ``present``; ``None`` if it can."""
    value = source[name]
    dtype = dtype_of(value)
    if isinstance(present, nn.Parameter) and present.is_floating_point() and _holds_codes(name, source):
        return (
            "is quantized in it and plain here: make the module with the quantized layers that it was trained with, "
            "and leave `base` out; or give the weights in full precision that were quantized"
        )
    if tuple(value.shape) != tuple(present.shape):
        return f"has shape {tuple(value.shape)} in it and {tuple(present.shape)} here"
    if present.is_meta:
        return "has no memory here, on the meta device: make the module on another one"
    if is_quantized_tensor(present) and type(value) is not type(present):
        return f"is of {dtype} in it and a {type(present).__name__} here: load the base before it is quantized"
    if dtype.is_floating_point and not present.is_floating_point():
        return f"is of {dtype} in it and of {present.dtype} here: load the base before it is quantized"
    return None


def _has_codes(layer: nn.Module) -> bool:
    """Whether bitsandbytes has quantized the weight of ``layer``: it does so when the layer moves to a device."""
    weight = parameter_of(layer)
    return not weight.is_floating_point() or quantization_of(layer) is not None


def _holds_codes(name: str, source: Source) -> bool:
    """Whether the weight ``name`` of ``source`` was quantized by bitsandbytes, to codes of any dtype."""
    value = source[name]
    has_scales = f"{name}.absmax" in source or getattr(value, "quant_state", None) is not None
    return has_scales or not dtype_of(value).is_floating_point


def _misfit_of_codes(name: str, source: Source, layer: nn.Module) -> str | None:
    """Why ``source`` has not the values of the quantized ``layer``, which cannot be copied; ``None`` if it has them."""
    start = name.removesuffix("weight")
    for key, own in layer.state_dict().items():
        value = source.get(f"{start}{key}")
        if value is not None and key != "bias" and not same_bits(value_of(value), own):
            return (
                f"is of {dtype_of(source[name])} in it and quantized here, with other values: load the base before it "
                "is quantized, and leave `base` out"
            )
    return None
