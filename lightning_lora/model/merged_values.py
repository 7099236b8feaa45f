"""The state dict of the merged model without a merge: sums are computed one by one, and the model is not changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import fsdp1_units, full_parameters
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, adapted_layers, parameter_of
from lightning_lora.layers.quantized.formats import is_quantized
from lightning_lora.model.merge_layer import deltas_of, matrices_in
from lightning_lora.model.mergeable import quantized_layers
from lightning_lora.model.quantized.merge import MergeBase, plain_values, plain_weights
from lightning_lora.model.state import full_detached, has_adapters, lora_parameters, own_state
from lightning_lora.names import clean, join, named_modules, named_parameters
from lightning_lora.ops import exact_sum as exact
from lightning_lora.ops.workspace import Workspace


def merged_state_dict(model: nn.Module) -> OrderedDict[str, Any]:
    """What ``model.state_dict()`` of the merged model gives, bit for bit, while ``model`` stays as it is.

    It works with live adapters, as in the middle of a run, and after a merge. The plain model loads it, without this
    package. As in torch's ``state_dict`` the weights without an adapter are the model's own memory: clone them to keep
    them while training continues. Every rank must call it where weights are sharded, and gets all values.

    Args:
        model: a model with adapters, live or merged.

    Returns:
        The keys of the plain model, with merged weights.

    Raises:
        ValueError: if ``model`` has no adapters, an adapted weight is quantized, or the model's own ``state_dict``
            leaves one out.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> _ = nn.Linear(4, 2).load_state_dict(merged_state_dict(model))
    """
    if not has_adapters(model):
        raise ValueError("The model has no adapters, live or merged: `model.state_dict()` is its plain state dict.")
    for name in quantized_layers(model):
        raise ValueError(
            f"`{name}` is quantized, and its few bits cannot hold the sum of the weight and the adapter. Call "
            "merge_lora(model, dequantize=True) first; unmerge_lora(model) gives the quantized model back."
        )
    # A state dict of FSDP1's gathers all parameters of a unit at once.
    state = own_state(model) if fsdp1_units(model) else model.state_dict()
    return with_merged_weights(model, state, dict(merged_values(model)))


def with_merged_weights(
    model: nn.Module, state: Mapping[str, Any], values: Mapping[str, Tensor], names: Mapping[str, str] | None = None
) -> OrderedDict[str, Any]:
    """``state`` without the adapters of ``model``, with ``values`` in the place of its own.

    Args:
        model: a model with live or merged adapters.
        state: a state dict of it.
        values: by clean name, as of :func:`merged_values`.
        names: the clean name of each key in ``state``, where it is not the key's own.

    Raises:
        ValueError: if ``state`` has no entry for an adapted weight.
    """
    names = names or {key: clean(key) for key in state}
    layers = [(name, layer) for name, layer in named_modules(model) if isinstance(layer, LoRALayer)]
    check_entries(model, set(names.values()))
    added = {join(name, f"lora.{key}") for name, layer in layers for key in layer.lora.state_dict()}
    added |= {name for name, _ in lora_parameters(model)}  # a state dict may hold those of a merged layer too
    result: OrderedDict[str, Any] = OrderedDict(
        (key, full_detached(values.get(names[key], value))) for key, value in state.items() if names[key] not in added
    )
    inside = tuple(join(name, "lora.") for name, _ in layers)
    versions = getattr(state, "_metadata", {}).items()
    result._metadata = OrderedDict(  # type: ignore[attr-defined]
        (name, dict(version)) for name, version in versions if not f"{clean(name)}.".startswith(inside)
    )
    return result


def check_entries(model: nn.Module, present: Container[str]) -> None:
    """Raise if one of the adapted weights of ``model`` is not among the clean names that are ``present``.

    Raises:
        ValueError: naming it.
    """
    for name, layer in adapted_layers(model):
        for key in layer.lora.by_weight():
            if join(name, key) not in present:
                raise ValueError(
                    f"`{type(model).__name__}.state_dict()` has no entry `{join(name, key)}`, an adapted weight, so it "
                    "has no place for the merged value. Leave this entry in it under this name."
                )


@torch.no_grad()
def merged_weights(
    model: nn.Module, adapter: Mapping[str, Any], factors: Mapping[str, float] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What a merge would write into each adapted weight of ``model``, one at a time, by clean name and on the CPU.

    Args:
        model: a model whose weights are whole on this rank, with live adapters.
        adapter: the values of A and B by name, which may be others than those in ``model``, such as an average.
        factors: of the updates by adapter, as :func:`merge_lora` takes them.
    """
    given = {id(parameter): adapter[name] for name, parameter in lora_parameters(model) if name in adapter}
    workspace = Workspace()
    for name, layer in named_modules(model):
        if isinstance(layer, LoRALayer):
            for key in layer.lora.to_merge(factors):
                weight = parameter_of(layer, key)
                yield join(name, key), _merged_weight(layer, key, weight, given, workspace, factors).cpu()


@torch.no_grad()
def merged_values(
    model: nn.Module, factors: Mapping[str, float] | None = None, into: MergeBase | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of the merged model by clean name, one at a time; ``model`` is not changed.

    Tied parameters are the same object. Every rank must iterate to the end.

    Args:
        model: a model with live or merged adapters.
        factors: of the updates by adapter, as :func:`merge_lora` takes them.
        into: what adapters on a quantized base are added to; its layers have plain values then.
    """
    if into is not None:
        yield from plain_values(model, plain_weights(model, into), factors)
    users: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in named_modules(model):
        for key, parameter in module._parameters.items():
            users.setdefault(id(parameter), []).append((join(name, key), module, key))
    workspace = Workspace()
    of_name = {name: users[id(parameter)] for name, parameter in named_parameters(model)}
    for first, value in full_parameters(model):
        for name, module, key in of_name[first]:
            if into is not None and is_quantized(module):
                continue
            if isinstance(module, LoRALayer) and key in module.lora.to_merge(factors):
                yield name, _merged_weight(module, key, value, {}, workspace, factors)
            elif not isinstance(module, Adapter):
                yield name, value
    for name, module in named_modules(model):
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield join(name, key), buffer


def _merged_weight(
    layer: LoRALayer,
    key: str,
    value: Tensor,
    given: Mapping[int, Tensor],
    workspace: Workspace,
    factors: Mapping[str, float] | None = None,
) -> Tensor:
    """What a merge would write in the place of the full weight ``value``, in memory of its own."""
    adapters = [_with_values(adapter, given) for adapter in layer.lora.to_merge(factors)[key]]
    weight = workspace.bring(value)
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    with workspace:
        originals, deltas = adapters[0].part.matrices(weight), deltas_of(adapters, value, weight.device)
        for each in zip(originals, deltas, matrices_in(merged, originals), strict=True):
            exact.add_delta(*each, workspace)
    layer.lora_after_merge(merged)
    return merged.to(value.device)


def _with_values(adapter: Adapter, given: Mapping[int, Tensor]) -> Adapter:
    """A copy of ``adapter`` with the ``given`` values, by the id of its own parameters."""
    if not given:
        return adapter
    changed = copy(adapter)
    values = {key: nn.Parameter(given[id(parameter)], False) for key, parameter in adapter._parameters.items()}
    changed.__dict__["_parameters"] = values
    return changed
