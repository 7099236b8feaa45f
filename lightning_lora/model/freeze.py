"""What trains: what a method added, and of the base only what the configuration names, or its record."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from lightning_lora import names
from lightning_lora.config import MethodConfig
from lightning_lora.distributed.sharded import reshard
from lightning_lora.layers.adapted import added_to, has_added
from lightning_lora.layers.base import LoRALayer, has_adapter
from lightning_lora.layers.quantized.formats import stores_codes
from lightning_lora.model.record import Record, holders, kept_names, prune, record_of, records
from lightning_lora.names import covers
from lightning_lora.targets.survey import Site, Survey, survey_of

BIAS = re.compile(r".*bias|bias_[ih]h.*")  # recurrent layers number theirs


def freeze(model: nn.Module | Survey, *configs: MethodConfig) -> None:
    """Let only what the method trains require a gradient, and record the ``requires_grad`` that the base had before.

    Args:
        model: an adapted model.
        configs: of everything that it is adapted by.
    """
    survey = survey_of(model)
    for site in survey.sites.values():
        for key, parameter in site.module._parameters.items():
            if parameter is not None:
                record_of(site.module).requires_grad.setdefault(key, parameter.requires_grad)
                if any(trains(site, key, is_adapted_by(site.module, config), config) for config in configs):
                    record_of(site.module).trained.add(key)
    _hold(survey)
    _set_flags(survey)


def _hold(survey: Survey) -> None:
    """Record what stays as an earlier run trained it, because only adapters that do not train asked for it."""
    of_kept = asked_for_by(survey, kept=True)
    of_kept -= asked_for_by(survey, kept=False) if of_kept else set()
    for _, module, record in records(survey):
        record.held = {key for key in record.trained if of_kept and id(module._parameters.get(key)) in of_kept}


def asked_for_by(model: nn.Module | Survey, *, kept: bool) -> set[int]:
    """The ``id`` of each parameter of the base that adapters which are ``kept``, or which train, ask to train."""
    names_kept = kept_names(model)
    if kept and not names_kept:
        return set()
    every = [(holder, config) for holder, configs in holders(model) for config in configs]
    wanted = [(holder, config) for holder, config in every if (config.name in names_kept) == kept]
    return {parameter for holder, config in wanted for parameter in asked_in(holder, config)}


def asked_in(holder: nn.Module, config: MethodConfig) -> set[int]:
    """The ``id`` of each parameter of the base that ``config`` of the adapted module ``holder`` asks to train."""
    return {
        id(parameter)
        for site in Survey(holder).sites.values()
        for key, parameter in site.module._parameters.items()
        if trains(site, key, is_adapted_by(site.module, config), config)
    }


def is_adapted_by(module: nn.Module, config: MethodConfig) -> bool:
    """Whether ``config`` adapted ``module``."""
    return has_adapter(module, config.name) if isinstance(module, LoRALayer) else has_added(module)


def trains(site: Site, key: str, adapted: bool, config: MethodConfig) -> bool:
    """Whether the parameter ``key`` of a module that is ``adapted``, or is not, trains in addition to the adapters."""
    parameter = site.module._parameters[key]
    named = any(asked_for(names.join(name, key), adapted, config) for name in site.names)
    return named and parameter is not None and parameter.is_floating_point() and not stores_codes(site.module, key)


def _set_flags(survey: Survey) -> None:
    base = {id(parameter): parameter for _, parameter in survey.parameters()}
    adapters = adapter_parameters(survey)
    trained = _trained_in_full(survey)
    trained |= adapters.keys() - _kept_parameters(survey)
    for parameter in (base | adapters).values():
        parameter.requires_grad_(id(parameter) in trained)


def _trained_in_full(survey: Survey) -> set[int]:
    every = [(module, key) for _, module, record in records(survey) for key in record.trained - record.held]
    return {id(module._parameters[key]) for module, key in every}


def _kept_parameters(survey: Survey) -> set[int]:
    """The ``id`` of each parameter of an adapter that does not train."""
    kept = kept_names(survey)
    added = (layer.lora[name] for layer in survey.layers() for name in kept & layer.lora.keys())
    return {id(parameter) for adapter in added for parameter in adapter.parameters()}


def unfreeze(model: nn.Module) -> None:
    """Give every parameter of the base the ``requires_grad`` that it had before :func:`freeze`."""
    reshard(model)  # a parameter that an evaluation gathered in inference mode takes no flag
    for _, module, record in records(model):
        for key, flag in record.requires_grad.items():
            for parameter in _present(module, key, record):
                _make_normal(parameter)
                parameter.requires_grad_(flag and (parameter.is_floating_point() or parameter.is_complex()))
        record.requires_grad.clear()
    prune(model)


def _make_normal(parameter: nn.Parameter) -> None:
    """Give a parameter that was written in inference mode values that take part in autograd.

    So bitsandbytes casts the bias of a quantized layer at the first call.
    """
    if parameter.is_inference() and not torch.is_inference_mode_enabled():
        parameter.data = parameter.data.clone()


def _present(module: nn.Module, key: str, record: Record) -> list[nn.Parameter]:
    """The parameter ``key`` of ``module``, and the shared one that a merge put into the record in its place."""
    merged = record.merged.weights.get(key) if record.merged is not None else None
    parameters = (module._parameters.get(key), merged.shared if merged is not None else None)
    return [parameter for parameter in parameters if parameter is not None]


def is_frozen(model: nn.Module) -> bool:
    """Whether ``model``, or a part of it, is frozen by :func:`freeze` now."""
    return any(record.requires_grad for _, _, record in records(model))


def asked_for(name: str, adapted: bool, config: MethodConfig) -> bool:
    """Whether ``config`` asks to train the base's parameter ``name``, of a layer that is ``adapted`` or not."""
    if covers(name, config.also_train or ()):
        return True
    if not BIAS.fullmatch(name.rpartition(".")[2]):
        return False
    return config.bias == "all" or (config.bias == "lora_only" and adapted)


def adapter_parameters(model: nn.Module | Survey) -> dict[int, nn.Parameter]:
    """The parameters that a method added, by ``id``: no name tells whether a parameter is one of them."""
    added = map(added_to, survey_of(model).adapted())
    return {id(parameter): parameter for child in added for _, parameter in names.named_parameters(child)}


def trained_parameters(model: nn.Module | Survey) -> Iterator[tuple[str, nn.Parameter]]:
    """Everything that the method trains in ``model``, under first clean names, in the model's order."""
    survey = survey_of(model)
    trained = _trained_in_full(survey) | (adapter_parameters(survey).keys() - _kept_parameters(survey))
    for name, parameter in names.named_parameters(survey.model, survey.modules):
        if id(parameter) in trained:
            yield name, parameter


def held_parameters(model: nn.Module | Survey) -> Iterator[tuple[str, nn.Parameter]]:
    """What an earlier run trained of the base and this one does not, under first clean names: files hold it."""
    survey = survey_of(model)
    held = {id(module._parameters[key]) for _, module, record in records(survey) for key in record.held}
    for name, parameter in names.named_parameters(survey.model, survey.modules) if held else ():
        if id(parameter) in held:
            yield name, parameter


def in_files(model: nn.Module | Survey) -> Iterator[tuple[str, nn.Parameter]]:
    """What trains, and of the base what an earlier run trained."""
    yield from trained_parameters(model)
    yield from held_parameters(model)
