"""What trains: adapters, the biases and modules that were asked for, and nothing else of the base."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig
from lightning_lora.distributed.sharded import reshard
from lightning_lora.layers.base import LoRALayer, adapted_layers
from lightning_lora.model.record import prune, record_of, records
from lightning_lora.names import covers

BIAS = re.compile(r".*bias|bias_[ih]h.*")  # recurrent layers number theirs


def freeze(model: nn.Module, config: LoRAConfig) -> None:
    """Set ``requires_grad`` to what LoRA trains, and remember what it was."""
    adapters = adapter_parameters(model)
    for name, module in names.named_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in adapters:
                continue
            record = record_of(module)
            record.found.setdefault(key, parameter.requires_grad)
            adapted = isinstance(module, LoRALayer) and bool(module.lora.every())
            if asked_for(names.join(name, key), adapted, config) and parameter.is_floating_point():
                record.trained.add(key)
    enforce(model)


def enforce(model: nn.Module) -> None:
    """Set ``requires_grad`` of every parameter by what was decided."""
    wanted = {id(parameter) for _, parameter in trained_parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)


def unfreeze(model: nn.Module) -> None:
    """Give every parameter of the base the ``requires_grad`` that it was found with."""
    reshard(model)  # what an evaluation gathered in inference mode takes no flag
    for _, module, record in records(model):
        for key, flag in record.found.items():
            parameter = module._parameters.get(key)
            if parameter is not None:
                parameter.requires_grad_(flag and (parameter.is_floating_point() or parameter.is_complex()))
        record.found.clear()
    prune(model)


def is_frozen(model: nn.Module) -> bool:
    """Whether ``model``, or a part of it, is frozen by :func:`freeze` now."""
    return any(record.found for _, _, record in records(model))


def asked_for(name: str, adapted: bool, config: LoRAConfig) -> bool:
    """Whether the base's parameter ``name``, of a layer that is adapted or not, trains beside the adapters."""
    if covers(name, config.also_train or ()):
        return True
    if not BIAS.fullmatch(name.rpartition(".")[2]):
        return False
    return config.bias == "all" or (config.bias == "lora_only" and adapted)


def adapter_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters of every adapter by identity, so that no name can be mistaken for one."""
    layers = [layer for _, layer in adapted_layers(model)]
    return {id(parameter): parameter for layer in layers for parameter in layer.lora.parameters()}


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Everything that LoRA trains in ``model``, under first clean names in the model's order."""
    beside = {id(module._parameters[key]) for _, module, record in records(model) for key in record.trained}
    wanted = beside | adapter_parameters(model).keys()
    for name, parameter in names.named_parameters(model):
        if id(parameter) in wanted:
            yield name, parameter
