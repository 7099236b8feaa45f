"""One quantized layer becomes a plain linear layer, and the quantized one again, with the same bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.foreign import CONV1D, QUANTIZED_ATTRIBUTES, QUANTIZING_LIBRARY, SOURCE_CLASS
from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.quantized.formats import dequantized, is_quantized_class
from lightning_lora.layers.quantized.packing import let_pack
from lightning_lora.model.record import PackedLayer, record_of
from lightning_lora.ops.exact_sum import quick_checksum, same_bits
from lightning_lora.ops.workspace import Workspace

CONV1D_SIZES = ("nf", "nx")  # its attributes for the sizes of its output and its input
# The attributes of a module that hold what a layer of such a class does before and after a state dict is loaded.
HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


@torch.no_grad()
def make_plain(
    layer: nn.Module, weight: Tensor, bias: Tensor | None, source: str | None, workspace: Workspace
) -> PackedLayer:
    """Give the quantized ``layer`` the plain class, ``weight`` and ``bias``.

    Args:
        layer: without adapters.
        weight: ``(out_features, in_features)``; Hugging Face's ``Conv1D``, for which such a layer can stand, stores it
            transposed.
        bias: in the dtype of ``weight``.
        source: path of the file that ``weight`` comes from; ``None`` for the dequantized weight.
        workspace: where the checksum is computed.

    Returns:
        What it was, which its record keeps.
    """
    if record_of(layer).packs:  # the adapters had switched it off
        let_pack(layer)
        record_of(layer).packs = False
    cls, attributes = type(layer), vars(layer)
    of_class = QUANTIZED_ATTRIBUTES if is_quantized_class(cls) else ()
    taken = {key: attributes[key] for key in of_class if key in attributes}
    plain, hooks = _plain_class(layer), _hooks(layer)
    if plain.__name__ == CONV1D:
        weight = weight.T.contiguous()
        attributes.update(zip(CONV1D_SIZES, (layer.out_features, layer.in_features), strict=True))
    parameters = {key: parameter for key, parameter in layer._parameters.items() if parameter is not None}
    packed = PackedLayer(cls, parameters, taken, hooks, quick_checksum(weight, workspace), source)
    record_of(layer).packed = packed
    for key in taken:
        del attributes[key]
    for name, ids in hooks.items():
        for hook in ids:
            del attributes[name][hook]
    layer._parameters["weight"] = nn.Parameter(weight, parameter_of(layer).requires_grad)
    if bias is not None and not same_bits(bias, parameters["bias"]):
        layer._parameters["bias"] = nn.Parameter(bias, parameters["bias"].requires_grad)
    layer.__class__ = plain
    return packed


def _plain_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the class of ``layer`` stands for."""
    source: type[nn.Module] | None = getattr(layer, SOURCE_CLASS, None)
    if source is not None and source.__name__ == CONV1D:
        return source
    return next(cls for cls in type(layer).__mro__ if not is_quantized_class(cls))


def _hooks(layer: nn.Module) -> dict[str, dict[int, Any]]:
    """The hooks on ``layer`` that its class has put there."""
    return {name: {key: hook for key, hook in getattr(layer, name).items() if _is_of_library(hook)} for name in HOOKS}


def _is_of_library(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # torch wraps it
    function = function.func if isinstance(function, partial) else function
    # A part of the path, and not the first: Lightning has a file of that name.
    return QUANTIZING_LIBRARY in str(getattr(function, "__module__", "")).split(".")


def pack_again(layer: nn.Module) -> None:
    """Make ``layer`` the quantized one that it was before :func:`make_plain`; it has no adapters."""
    packed, attributes, device = record_of(layer).packed, vars(layer), parameter_of(layer).device
    assert packed is not None
    for key in CONV1D_SIZES:
        attributes.pop(key, None)
    attributes.update(packed.attributes)
    for name, hooks in packed.hooks.items():
        attributes[name].update(hooks)
    layer._parameters.update(packed.parameters)
    layer.__class__ = packed.cls
    record_of(layer).packed = None
    if parameter_of(layer).device != device:  # the model was moved since
        layer.to(device)


@torch.no_grad()
def weight_before(layer: nn.Module, packed: PackedLayer) -> Tensor:
    """The matrix that the weight of ``layer`` stood for before :func:`make_plain`, ``(out_features, in_features)``."""
    quantized = packed.cls.__new__(packed.cls)  # it shares every tensor with the record
    vars(quantized).update({**vars(layer), **packed.attributes, "_parameters": packed.parameters})
    return dequantized(quantized)


def was_changed(layer: nn.Module, packed: PackedLayer, workspace: Workspace) -> bool:
    """Whether the plain weight is not what the merge left there."""
    return quick_checksum(parameter_of(layer).detach(), workspace) != packed.checksum
