"""The contents of a PEFT directory from a model: pairs, modules trained in full, biases and changed buffers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.adapters import Adapters
from lightning_lora.layers.base import adapted_layers
from lightning_lora.model.freeze import BIAS
from lightning_lora.model.record import configs_of, merged_layers
from lightning_lora.model.state import buffer_names, clean_state, full_detached, lora_state_dict
from lightning_lora.names import covers
from lightning_lora.peft_format.attention import INSIDE, OUT_PROJ, attention_around, attention_pairs, warn_of_half
from lightning_lora.peft_format.layers import (
    ON_META,
    PeftPair,
    adapters_of,
    is_attention,
    is_empty,
    kind_in_peft,
    refusal,
    refused_pairs,
    to_peft,
)
from lightning_lora.peft_format.stored import PREFIX
from lightning_lora.peft_format.targets import lies_in, saved

WITHOUT = "Leave it out with `exclude` and `also_train`, or merge the adapter and save the whole model."
REPEATED = "is used in several places, of which peft adapts one"
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)  # which peft does not wrap
Adapted = list[tuple[str, nn.Module, Adapters]]


@dataclass(frozen=True)
class Contents:
    """The contents of a directory; names are relative to the model that peft wraps.

    Args:
        pairs: A and B by the adapted module's name, for peft's second pair of an attention by its place there.
        modules_to_save: names of the modules that are trained in full.
        plain: their values, trained biases and changed buffers, by their keys in the file.
    """

    pairs: dict[str, PeftPair]
    modules_to_save: list[str]
    plain: dict[str, Tensor]

    def adapted(self) -> dict[str, PeftPair]:
        """The pairs of the modules that the configuration names for peft: without those inside an attention."""
        return {name: pair for name, pair in self.pairs.items() if attention_around(name) is None}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its key in the file."""
        named = {f"{name}.{key}": value for name, pair in self.pairs.items() for key, value in matrices(pair)}
        return {f"{PREFIX}{key}": value for key, value in {**named, **self.plain}.items()}


def matrices(pair: PeftPair) -> list[tuple[str, Tensor]]:
    """A and B under their names in the file."""
    return list(zip(pair.keys, (pair.A, pair.B), strict=True))


def holders(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, nn.Module, Adapters]]:
    """Every layer of ``model`` that has adapters, live or merged, and these.

    Args:
        model: any module.
        name: only layers with the adapter of that name.
    """
    live = ((place, layer, layer.lora) for place, layer in adapted_layers(model))
    merged = ((place, module, merged.adapters) for place, module, merged in merged_layers(model))
    for place, module, adapters in (*live, *merged):
        if adapters.all_pairs() if name is None else name in adapters:
            yield place, module, adapters


def contents_of(inner: nn.Module, config: LoRAConfig, asked_as: Callable[[str], str]) -> Contents:
    """The contents of a directory for the part ``inner`` of a model.

    Args:
        inner: the part that peft wraps.
        config: the configuration of the adapter.
        asked_as: gives the name in ``config``'s terms of something in ``inner``.

    Raises:
        ValueError: naming what PEFT's format has no place for.
    """
    adapted, plain, modules_to_save = _checked(inner, config, asked_as)
    modules = dict(names.named_modules(inner))
    empty = next((name for name, module, _ in adapted if is_empty(module)), None)
    if empty is not None:
        raise ValueError(f"`{empty}` {ON_META}. Nothing was written.")
    _warn_of_fast_path([name for name, _, _ in adapted], modules)
    pairs = _pairs(adapted, inner, config)
    state = clean_state(inner)
    inside = [key for key in state if _lies_under(key, modules_to_save) and key not in plain]
    _check_finite(pairs)
    values = {**plain, **{key: full_detached(state[key]) for key in inside}}  # in one order: sharded ones are gathered
    places = _places(inner, adapted)
    return Contents(pairs, modules_to_save, {_key(key, places): _as_written(key, v) for key, v in values.items()})


def check_contents(inner: nn.Module, config: LoRAConfig, asked_as: Callable[[str], str]) -> None:
    """Raise what :func:`contents_of` raises whatever the values are, which may not be there yet.

    Raises:
        ValueError: naming what PEFT's format has no place for.
    """
    _checked(inner, config, asked_as)


def _checked(
    inner: nn.Module, config: LoRAConfig, asked_as: Callable[[str], str]
) -> tuple[Adapted, dict[str, Tensor], list[str]]:
    """The adapted layers, everything else that belongs to the adapter, and the modules that train in full."""
    adapted = list(holders(inner, config.name))
    _check_layers(adapted, inner, config)
    plain = other_state(inner, list(holders(inner)))
    modules_to_save = _owners(_in_full(plain, inner, config, asked_as), inner)
    _check_saved(modules_to_save, inner, [name for name, _, _ in adapted])
    return adapted, plain, modules_to_save


def _pairs(adapted: Adapted, inner: nn.Module, config: LoRAConfig) -> dict[str, PeftPair]:
    """A and B of every layer; of an attention both, in the place of the first that has adapters."""
    modules = dict(names.named_modules(inner))
    own = {name: adapters_of(adapters, config.name) for name, _, adapters in adapted}
    pairs: dict[str, PeftPair] = {}
    for name, module, _ in adapted:
        attention = attention_of(name, modules)
        if attention is None:
            pairs[name] = to_peft(module, own[name])
        elif attention not in pairs:
            output = own.get(names.join(attention, OUT_PROJ))
            pairs |= attention_pairs(attention, modules[attention], own.get(attention), output)
    halved = [name.removesuffix(f".{OUT_PROJ}") for name in own if attention_of(name, modules) not in (None, name)]
    if halved:
        warn_of_half(halved)
    return pairs


def attention_of(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The name of the attention that ``name`` is, or that it is the ``out_proj`` of."""
    owner = name.rpartition(".")[0]
    return next((place for place in (name, owner) if is_attention(modules[place])), None)


def _check_finite(pairs: dict[str, PeftPair]) -> None:
    for name, pair in pairs.items():
        if not (bool(pair.A.isfinite().all()) and bool(pair.B.isfinite().all())):
            raise ValueError(
                f"`{name}` has NaN or infinity in its adapter: the training diverged. Nothing was written."
            )


def _check_layers(adapted: Adapted, inner: nn.Module, config: LoRAConfig) -> None:
    modules, places = dict(names.named_modules(inner)), places_in(inner)
    for name, module, adapters in adapted:
        if "" in (name, attention_of(name, modules)):
            raise ValueError(
                "The model is the adapted layer itself, and peft adapts layers inside a model: pass one that holds it."
            )
        owner = modules[name.rpartition(".")[0]]
        reason = refusal(module, owner) or refused_pairs(adapters_of(adapters, config.name))
        reason = REPEATED if reason is None and places[id(module)] > 1 else reason
        if reason is not None:
            raise ValueError(f"`{name}` {reason}. {WITHOUT} Nothing was written.")


def _warn_of_fast_path(adapted: list[str], modules: dict[str, nn.Module]) -> None:
    encoders = [n for n in adapted if isinstance(modules[n.rpartition(".")[0]], nn.TransformerEncoderLayer)]
    if encoders:
        more = f" (and {len(encoders) - 1} more)" if len(encoders) > 1 else ""
        warnings.warn(
            f"`{encoders[0]}`{more} lies in an nn.TransformerEncoderLayer: in evaluation torch bypasses peft's adapter "
            "there. The files are right, but peft's outputs are the base's.",
            stacklevel=5,
        )


def kinds(model: nn.Module) -> dict[str, str]:
    """The kind of each adapted layer, or of each ``layer.lora.name``, in PEFT's format, or why it has none."""
    modules, places, has_several = dict(names.named_modules(model)), places_in(model), len(configs_of(model)) > 1
    by_name: dict[str, str] = {}
    for name, layer, adapters in holders(model):
        owner = modules.get(name.rpartition(".")[0]) if name else None
        for adapter in adapters:
            kind = kind_in_peft(layer, owner, adapters_of(adapters, adapter))
            key = names.join(name, f"lora.{adapter}") if has_several else name
            by_name[key] = kind if places[id(layer)] < 2 else REPEATED
    return by_name


def places_in(model: nn.Module) -> Counter[int]:
    """How many places of ``model`` hold each module, by its id: peft replaces it in one of them only."""
    owners = {id(owner): owner for owner in model.modules()}
    return Counter(id(child) for owner in owners.values() for child in owner._modules.values())


def _all_names(inner: nn.Module, adapted: Adapted) -> set[str]:
    wanted = {id(module) for _, module, _ in adapted}
    return {name for name, module in names.named_modules(inner) if id(module) in wanted}


def other_state(inner: nn.Module, adapted: Adapted) -> dict[str, Tensor]:
    """Everything else that belongs to the adapter, by its name in ``inner``."""
    pairs = tuple(names.join(name, "lora.") for name in _all_names(inner, adapted))
    state = {key: value for key, value in lora_state_dict(inner).items() if not key.startswith(pairs)}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"`{key}` is a {type(value).__name__}, and PEFT's format holds tensors. Nothing was written."
            )
    return state


def _in_full(
    plain: dict[str, Tensor], inner: nn.Module, config: LoRAConfig, asked_as: Callable[[str], str]
) -> set[str]:
    """The trained parameters that are not trained as biases."""
    parameters = plain.keys() - buffer_names(inner)
    biases = {key for key in parameters if BIAS.fullmatch(key.rpartition(".")[2]) and config.bias != "none"}
    return {key for key in parameters if key not in biases or covers(asked_as(key), config.also_train or ())}


def _owners(trained: set[str], inner: nn.Module) -> list[str]:
    """The outermost modules that train in full, then the modules that hold the remaining parameters."""
    owners: list[str] = []
    for name, module in names.named_modules(inner):
        keys = {names.join(name, names.clean(key)) for key, _ in module.named_parameters()}
        if name and keys and keys <= trained and not isinstance(module, CONTAINERS) and not _lies_under(name, owners):
            owners.append(name)
    left = [key for key in trained if not _lies_under(key, owners)]
    return owners + sorted({key.rpartition(".")[0] for key in left})


def _lies_under(key: str, modules: list[str]) -> bool:
    return key.startswith(tuple(f"{name}." for name in modules))


def _check_saved(modules_to_save: list[str], inner: nn.Module, adapted: list[str]) -> None:
    modules = dict(names.named_modules(inner))
    for name in modules_to_save:
        if not name:
            raise ValueError(
                "A parameter of the model itself trains, and peft trains whole modules inside it: take it out of "
                f"`also_train`. {WITHOUT} Nothing was written."
            )
        if isinstance(modules[name], CONTAINERS):
            raise ValueError(f"`{name}` is a container, which peft does not wrap. {WITHOUT} Nothing was written.")
        if (owner := name.rpartition(".")[0]) and is_attention(modules[owner]) and _adapted_in(owner, adapted):
            raise ValueError(
                f"`{name}` trains in full inside an nn.MultiheadAttention with adapters, which peft cannot do. Train "
                f"all of `{owner}` in full, or adapt it alone. {WITHOUT} Nothing was written."
            )
        more = [module for module in saved([name], inner) if module not in modules_to_save]
        more += [module for module in adapted if lies_in(module, [name])]
        if more:
            raise ValueError(
                f"`{name}` trains in full, and peft would match `{more[0]}` by that name too. Rename it, or name "
                "a smaller module in `also_train`. Nothing was written."
            )


def _places(inner: nn.Module, adapted: Adapted) -> dict[str, str]:
    """Where peft keeps the parameters of the base in an adapted layer, by its name: one level deeper."""
    modules, places = dict(names.named_modules(inner)), {}
    for name in _all_names(inner, adapted):
        attention = attention_of(name, modules)
        places[name] = f"{name}.base_layer"
        if attention is not None:
            places |= {
                attention: f"{attention}.base_layer",
                f"{attention}.{OUT_PROJ}": f"{attention}{INSIDE}.base_layer",
            }
    return places


def _adapted_in(attention: str, adapted: list[str]) -> bool:
    return any(name in (attention, f"{attention}.{OUT_PROJ}") for name in adapted)


def _key(key: str, places: dict[str, str]) -> str:
    """The key in the file of a parameter or buffer of the base."""
    owner, _, leaf = key.rpartition(".")
    return names.join(places.get(owner, owner), leaf)


def _as_written(key: str, value: Tensor) -> Tensor:
    """A copy in fp32; fp64 and integers stay as they are."""
    kept = value.dtype == torch.float64 or not value.is_floating_point()
    return value.detach().to("cpu", value.dtype if kept else torch.float32, copy=True).contiguous()
