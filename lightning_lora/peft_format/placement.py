"""Check that the values of a PEFT directory fit a model, and give them the names that they have in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig
from lightning_lora.files.json_files import shown
from lightning_lora.model.freeze import BIAS
from lightning_lora.model.state import clean_state, frozen_names, full_detached, needed_names
from lightning_lora.peft_format.config import PeftConfig
from lightning_lora.peft_format.contents import REPEATED, holders, places_in
from lightning_lora.peft_format.layers import PeftPair, adapters_of, expected_shapes, from_peft, keys_of, refusal
from lightning_lora.peft_format.stored import StoredAdapter
from lightning_lora.peft_format.targets import exact_pattern, module_names, saved, targeted


@dataclass(frozen=True)
class FileValues:
    """The values of a file; names are relative to the model that peft wraps.

    Args:
        pairs: A and B of each adapted layer, by their names in the file.
        in_full: everything else, by its name in the base.
    """

    pairs: dict[str, dict[str, Tensor]]
    in_full: dict[str, Tensor]


def read_values(adapter: StoredAdapter) -> FileValues:
    """Read every tensor of ``adapter``.

    Raises:
        ValueError: if one holds NaN or infinity.
    """
    pairs = {}
    for name, pair in adapter.pairs.items():
        keys = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
        pairs[name] = dict(zip(keys, (pair.A.read_finite(), pair.B.read_finite()), strict=True))
    return FileValues(pairs, {name: tensor.read_finite() for name, tensor in adapter.in_full.items()})


def check_targets(asked: PeftConfig, file: FileValues, inner: nn.Module) -> None:
    """Raise unless the configuration adapts exactly the modules that the file has pairs for, and we support them.

    Raises:
        ValueError: naming the first module that does not fit.
    """
    wanted, modules, places = targeted(asked, inner), dict(names.named_modules(inner)), places_in(inner)
    for name in (*file.pairs, *wanted):
        if name not in wanted or name not in file.pairs:
            where = "`adapter_model.safetensors` only" if name in file.pairs else "`adapter_config.json` only"
            raise ValueError(
                f"{shown(name)} is adapted by {where}: the two do not belong together, or not to this "
                f"{type(inner).__name__}. With the adapted model inside another name it in `inner`."
            )
    for name in wanted:
        module, owner = modules[name], modules[name.rpartition(".")[0]]
        reason = refusal(module, owner) or (REPEATED if places[id(module)] > 1 else None)
        if reason is not None:
            raise ValueError(f"`{name}` {reason}. Load this adapter with peft.")
        _check_pair(name, module, file.pairs[name], asked.rank_for(name))


def _check_pair(name: str, module: nn.Module, halves: Mapping[str, Tensor], r: int) -> None:
    if set(halves) != set(keys_of(module)):
        raise ValueError(f"`{name}` needs {' and '.join(keys_of(module))}, but the file has {', '.join(halves)}.")
    for key, shape in zip(keys_of(module), expected_shapes(module, r), strict=True):
        value = halves[key]
        if tuple(value.shape) != shape:
            raise ValueError(
                f"`{name}.{key}` must have shape {shape} with the rank that `adapter_config.json` gives it, but has "
                f"{tuple(value.shape)}."
            )
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"`{name}.{key}` must be float32, bfloat16 or float16, but is {value.dtype}.")
        if not torch.isfinite(value.float()).all():
            raise ValueError(f"`{name}.{key}` has values that float32 has no room for.")
    padding, A = getattr(module, "padding_idx", None), halves[keys_of(module)[0]]
    if padding is not None and bool(A[:, padding].any()):
        raise ValueError(
            f"`{name}` has an adapter for its padding index, which has none here: set that column to zero."
        )


def config_for(asked: PeftConfig, file: FileValues, inner: nn.Module, prefix: str, model: nn.Module) -> LoRAConfig:
    """The LoRAConfig that gives a ``model`` without adapters those of the file."""
    every = module_names(model, aliases=True)
    full = {name: exact_pattern(names.join(prefix, name), every) for name in file.pairs}
    ranks = {full[name]: asked.rank_for(name) for name in file.pairs}
    alphas = {full[name]: asked.alpha_for(name) for name in file.pairs}
    in_full = [exact_pattern(names.join(prefix, name), every) for name in saved(asked.modules_to_save, inner)]
    return LoRAConfig(
        r=asked.r,
        alpha=asked.alpha,
        targets=list(full.values()),
        dropout=asked.dropout,
        init="gaussian" if asked.gaussian else "kaiming",
        rslora=asked.rslora,
        bias=asked.bias,
        also_train=in_full if asked.modules_to_save else None,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != asked.r} or None,
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != asked.alpha} or None,
    )


def check_adapted(file: FileValues, inner: nn.Module) -> None:
    """Raise unless ``inner`` has adapters on exactly the modules that the file has pairs for.

    Raises:
        ValueError: naming the first module that does not fit.
    """
    present = [name for name, _, _ in holders(inner)]
    for name in (*file.pairs, *present):
        if name not in present or name not in file.pairs:
            where = "in the file and not in the model" if name in file.pairs else "in the model and not in the file"
            raise ValueError(f"`{name}` has adapters {where}: were `targets` and `exclude` the same when it was made?")


def values_for(asked: PeftConfig, file: FileValues, inner: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The values of the file as a state dict of the adapted ``inner``.

    Raises:
        ValueError: naming the first value that does not fit.
    """
    state: dict[str, Tensor] = {}
    for name, layer, adapters in holders(inner):
        A, B = (file.pairs[name][key].float() for key in keys_of(layer))
        pair = PeftPair(A, B, asked.scale_for(name), keys_of(layer))
        values = from_peft(adapters_of(adapters, adapter), pair)
        if isinstance(values, str):
            raise ValueError(f"`{name}` {values}: apply the configuration that the adapter was made with.")
        state |= {names.join(name, f"lora.{adapter}.{key}"): value for key, value in values.items()}
    return state | _other_state(file.in_full, inner)


def _other_state(plain: Mapping[str, Tensor], inner: nn.Module) -> dict[str, Tensor]:
    """The other values to load; those of the frozen base must equal the base's."""
    present, frozen = clean_state(inner), frozen_names(inner)
    for key, value in plain.items():
        if not isinstance(present.get(key), Tensor):
            raise ValueError(f"The adapter's file has {shown(key)}, which the model does not have.")
        _check_value(key, value, full_detached(present[key]))
        if key in frozen and not _same(value, full_detached(present[key]).cpu()):
            raise ValueError(
                f"The adapter's file holds `{key}` of its base, and the model has other values there. Load the base "
                "that it was trained on first."
            )
    trained = {key: value for key, value in plain.items() if key not in frozen}
    _check_tied(trained, inner)
    return trained


def _check_value(key: str, value: Tensor, own: Tensor) -> None:
    if value.shape != own.shape:
        raise ValueError(f"`{key}` has shape {tuple(value.shape)} in the file and {tuple(own.shape)} in the model.")
    both_real = value.is_floating_point() and own.is_floating_point()
    if not both_real and value.dtype != own.dtype:
        raise ValueError(f"`{key}` is of {value.dtype} in the file and of {own.dtype} in the model.")
    if own.is_floating_point() and not torch.isfinite(value.to(own.dtype)).all():
        raise ValueError(f"`{key}` has values that the model's {own.dtype} has no room for.")


def _same(value: Tensor, own: Tensor) -> bool:
    """Equal, a cast of either aside."""
    return torch.equal(value.to(own.dtype), own) or torch.equal(value, own.to(value.dtype))


def _check_tied(plain: Mapping[str, Tensor], inner: nn.Module) -> None:
    """Raise where modules share a parameter and the file has different values for them."""
    every = inner.named_parameters(remove_duplicate=False)
    known = {names.clean(name): id(parameter) for name, parameter in every}
    for key in plain.keys() & known.keys():
        for alias in (name for name, identity in known.items() if identity == known[key]):
            if alias not in plain or not torch.equal(plain[alias], plain[key]):
                raise ValueError(
                    f"`{key}` and `{alias}` are one parameter in the model, and the file trains them apart: untie them "
                    "first (`tie_word_embeddings=False` in transformers)."
                )


def filled(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` with the trained biases of a new ``model`` that peft does not save, as their names are not ``bias``."""
    present = clean_state(model)
    missing = [key for key in needed_names(model) if key not in state and BIAS.fullmatch(key.rpartition(".")[2])]
    return {**state, **{key: full_detached(present[key]).clone() for key in missing}}
