"""Check that the values of a PEFT directory fit a model, and give them the names that they have in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig, alpha_of
from lightning_lora.files.json_files import shown
from lightning_lora.model.file_values import check_finite, check_value
from lightning_lora.model.freeze import BIAS
from lightning_lora.model.state import clean_state, frozen_names, full_detached, needed_names
from lightning_lora.peft_format.attention import OUT_PROJ, ranks_of_projections, without_padding
from lightning_lora.peft_format.config import PeftConfig
from lightning_lora.peft_format.contents import REPEATED, holders, places_in
from lightning_lora.peft_format.layers import (
    BYPASSED,
    ON_META,
    PeftPair,
    adapters_of,
    expected_shapes,
    from_peft,
    is_attention,
    is_empty,
    keys_of,
    pairs_in,
    refusal,
)
from lightning_lora.peft_format.stored import StoredAdapter
from lightning_lora.peft_format.targets import exact_pattern, module_names, saved, targeted


@dataclass(frozen=True)
class FileValues:
    """The values of a file; names are relative to the model that peft wraps.

    Args:
        pairs: A and B of each adapted layer, by their names in the file.
        scales: the factor in front of ``B A`` of each layer.
        in_full: everything else, by its name in the base.
        inside: the names of the layers whose pair lies inside that of an attention.
        ranks: the ranks of q, k and v in an attention; those that are not in it have no adapter.
    """

    pairs: dict[str, dict[str, Tensor]]
    scales: dict[str, float]
    in_full: dict[str, Tensor]
    inside: frozenset[str] = frozenset()
    ranks: Mapping[str, dict[str, int]] = field(default_factory=dict)


def read_values(adapter: StoredAdapter) -> FileValues:
    """Read every tensor of ``adapter``.

    Raises:
        ValueError: if one holds NaN or infinity.
    """
    pairs = {}
    for name, pair in adapter.pairs.items():
        keys = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
        pairs[name] = dict(zip(keys, (pair.A.read_finite(), pair.times * pair.B.read_finite()), strict=True))
    return FileValues(
        pairs,
        {name: pair.scale for name, pair in adapter.pairs.items() if pair.scale is not None},
        {name: tensor.read_finite() for name, tensor in adapter.in_full.items()},
        frozenset(name for name, pair in adapter.pairs.items() if pair.times > 1),
    )


def check_targets(asked: PeftConfig, file: FileValues, inner: nn.Module) -> None:
    """Raise unless the configuration adapts exactly the modules that the file has pairs for, and we support them.

    Raises:
        ValueError: naming the first module that does not fit.
    """
    modules, places = dict(names.named_modules(inner)), places_in(inner)
    wanted = [place for name in targeted(asked, inner) for place in _pairs_of(name, modules[name])]
    for name in (*file.pairs, *wanted):
        if name not in wanted or name not in file.pairs:
            where = "`adapter_model.safetensors` only" if name in file.pairs else "`adapter_config.json` only"
            raise ValueError(
                f"{shown(name)} is adapted by {where}: the two do not belong together, or not to this "
                f"{type(inner).__name__}. If the adapted model is inside another, name it: load_adapter(..., "
                "inner=...)."
            )
    for name in wanted:
        module, owner = modules[name], modules[name.rpartition(".")[0]]
        reason = refusal(module, owner) or (REPEATED if places[id(module)] > 1 else None)
        if is_attention(owner) and name not in file.inside:
            reason = BYPASSED
        if reason is None and is_empty(module):
            reason = ON_META
        if reason is not None:
            raise ValueError(f"`{name}` {reason}. Load this adapter with peft.")
        _check_pair(name, module, file.pairs[name])


def _pairs_of(name: str, module: nn.Module) -> list[str]:
    """The layers that peft gives a pair when it adapts ``module``."""
    return [name, f"{name}.{OUT_PROJ}"] if is_attention(module) else [name]


def _check_pair(name: str, module: nn.Module, halves: Mapping[str, Tensor]) -> None:
    if set(halves) != set(keys_of(module)):
        raise ValueError(f"`{name}` needs {' and '.join(keys_of(module))}, but the file has {', '.join(halves)}.")
    r = len(halves[keys_of(module)[0]])
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


def with_attentions(file: FileValues, inner: nn.Module) -> FileValues:
    """``file`` without what stands in it for projections of an attention that have no adapter."""
    modules, pairs, ranks = dict(names.named_modules(inner)), dict(file.pairs), {}
    for name in file.pairs:
        if not is_attention(modules[name]) and name not in file.inside:
            continue
        A, B = without_padding(*(pairs[name][key] for key in keys_of(modules[name])))
        pairs[name] = dict(zip(keys_of(modules[name]), (A, B), strict=True))
        if not len(A):
            del pairs[name]
        elif is_attention(modules[name]):
            ranks[name] = ranks_of_projections(B)
    return replace(file, pairs=pairs, ranks=ranks)


def config_for(asked: PeftConfig, file: FileValues, inner: nn.Module, prefix: str, model: nn.Module) -> LoRAConfig:
    """The LoRAConfig that gives a ``model`` without adapters those of the file."""
    every = module_names(model, aliases=True)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, pair in file.pairs.items():
        full = names.join(prefix, name)
        if name in file.ranks or name in file.inside:
            by_part = {f"re:{re.escape(f'{full}.{part}')}": r for part, r in file.ranks.get(name, {}).items()}
            by_part = by_part or {exact_pattern(full, every): len(next(iter(pair.values())))}
            ranks |= by_part
            alphas |= {part: alpha_of(file.scales[name], r, asked.rslora) for part, r in by_part.items()}
        else:
            ranks[exact_pattern(full, every)] = asked.rank_for(name)
            alphas[exact_pattern(full, every)] = asked.alpha_for(name)
    in_full = [exact_pattern(names.join(prefix, name), every) for name in saved(asked.modules_to_save, inner)]
    return LoRAConfig(
        r=asked.r,
        alpha=asked.alpha,
        targets=list(ranks),
        dropout=asked.dropout,
        init="gaussian" if asked.gaussian else "kaiming",
        rslora=asked.rslora,
        bias=asked.bias,
        also_train=in_full if asked.modules_to_save else None,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != asked.r} or None,
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != asked.alpha} or None,
    )


def check_adapted(file: FileValues, inner: nn.Module, adapter: str) -> None:
    """Raise unless ``inner`` has the adapter of that name on exactly the modules that the file has pairs for.

    Raises:
        ValueError: naming the first module that does not fit.
    """
    present = [name for name, _, _ in holders(inner, adapter)]
    for name in (*file.pairs, *present):
        if name not in present or name not in file.pairs:
            where = "in the file and not in the model" if name in file.pairs else "in the model and not in the file"
            raise ValueError(f"`{name}` has adapters {where}: were `targets` and `exclude` the same when it was made?")


def values_for(file: FileValues, inner: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The values of the file as a state dict of the adapted ``inner``.

    Raises:
        ValueError: naming the first value that does not fit.
    """
    state: dict[str, Tensor] = {}
    for name, layer, adapters in holders(inner, adapter):
        A, B = (file.pairs[name][key].float() for key in keys_of(layer))
        own, scale = adapters_of(adapters, adapter), file.scales[name]
        if name in file.inside:  # the file has one scale for the attention and its `out_proj`, a model may have two
            own_scale = pairs_in(own)[0].scale
            B, scale = B * (scale / own_scale), own_scale
        values = from_peft(own, PeftPair(A, B, scale, keys_of(layer)))
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
        check_value(key, value, present[key])
        check_finite(key, value, present[key])
        if key in frozen and not is_same(value, full_detached(present[key]).cpu()):
            raise ValueError(
                f"The adapter's file holds `{key}` of its base, and the model has other values there. Load the base "
                "that it was trained on first."
            )
    trained = {key: value for key, value in plain.items() if key not in frozen}
    _check_tied(trained, inner)
    return trained


def is_same(value: Tensor, own: Tensor) -> bool:
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


def under_every_name(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` with the entries of modules that ``model`` has under several names under each of these."""
    first: dict[int, str] = {}
    every = dict(state)
    for name, module in names.named_modules(model):
        other = first.setdefault(id(module), name)
        if other != name:
            every |= {
                names.join(name, key): state[names.join(other, key)]
                for key in (*module._parameters, *module._buffers)
                if names.join(other, key) in state
            }
    return every


def filled(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` with the trained biases of a new ``model`` that peft does not save, as their names are not ``bias``."""
    present = clean_state(model)
    missing = [key for key in needed_names(model) if key not in state and BIAS.fullmatch(key.rpartition(".")[2])]
    return {**state, **{key: full_detached(present[key]).clone() for key in missing}}
