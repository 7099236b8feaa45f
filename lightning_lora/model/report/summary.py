"""The table at the start of a run: what is adapted and what trains. And which layers are output heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig
from lightning_lora.distributed.sharded import shape_of
from lightning_lora.layers.adapted import adapted_modules, added_to, has_added
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, adapted_layers, parameter_of
from lightning_lora.model.freeze import held_parameters, trained_parameters
from lightning_lora.model.record import configs_of, kept_names
from lightning_lora.model.report.table import Row, bytes_text, row_of, table, trained_in_full, useless_ranks
from lightning_lora.model.state import added_parameters, lora_parameters
from lightning_lora.targets.left_alone import left_alone
from lightning_lora.targets.role_names import numbered
from lightning_lora.targets.roles import roles_in
from lightning_lora.targets.survey import Survey, survey_of


def describe(model: nn.Module, save: str = "adapter") -> str:
    """What LoRA adapts and trains in ``model``, as text; layers that differ only by a number share a row.

    Args:
        model: an adapted model.
        save: what the checkpoints of the run hold, ``"adapter"`` or ``"merged"``.
    """
    rows = rows_of(model)
    lines = ["LoRA adapts", *table(rows), *_also_trained(model), *_totals(model, save), *useless_ranks(rows)]
    return "\n".join([*lines, *_left_alone(model)])


def describe_added(model: nn.Module, key: str) -> str:
    """What a method that is no LoRA adds to ``model`` and trains in it; modules that differ by a number share a line.

    Args:
        model: an adapted model.
        key: of the method.
    """
    sizes: dict[tuple[str, str], list[int]] = {}
    for name, module in ((name, module) for name, module in adapted_modules(model) if has_added(module)):
        size = sum(shape_of(parameter).numel() for parameter in added_to(module).parameters())
        sizes.setdefault((names.folded(name), type(module).original_class.__name__), []).append(size)
    lines = [
        f"  {name or '(the model)'}  {names.counted(len(of), 'module')}  {kind}  {sum(of):,} parameters"
        for (name, kind), of in sizes.items()
    ]
    return "\n".join([*([f"A {key} is added to", *lines] if lines else []), rest_trained(model)])


def rest_trained(model: nn.Module) -> str:
    """What of the base trains in full, and the totals, as the last lines about a method that is no LoRA."""
    return "\n".join([*_also_trained(model), *_totals(model, "")])


def describe_trained(model: nn.Module) -> str:
    """What trains in ``model``, to which a method added nothing."""
    sizes = {name: shape_of(parameter).numel() for name, parameter in trained_parameters(model)}
    return "\n".join([*trained_in_full(sizes, "Of the module's own parameters train"), *_totals(model, "")])


def rows_of(model: nn.Module) -> list[Row]:
    """A row for each adapted matrix of ``model`` and each of its adapters."""
    every, kept = list(configs_of(model)), kept_names(model)
    layers = list(adapted_layers(model))
    return [
        replace(_row(name, layer, pair), adapter=adapter if len(every) > 1 else "", trains=adapter not in kept)
        for adapter in every
        for name, layer in layers
        for pair in (layer.lora.pairs_of(adapter) if adapter in layer.lora else ())
    ]


def _row(name: str, layer: LoRALayer, adapter: Adapter) -> Row:
    part, class_name = adapter.part, layer.original_class.__name__
    matrix = names.join(name, part.name) if part.name else name
    return row_of(matrix, class_name, part, parameter_of(layer, part.key), adapter.r, adapter.scale)


def _left_alone(model: nn.Module) -> list[str]:
    survey, kept = Survey(model), kept_names(model)
    layers = list(adapted_layers(model))
    lines = [
        line
        for adapter, config in configs_of(model).items()
        if isinstance(config, LoRAConfig) and adapter not in kept
        for line in left_alone(survey, [name for name, layer in layers if adapter in layer.lora], config)
    ]
    return list(dict.fromkeys(lines))


def _also_trained(model: nn.Module) -> list[str]:
    adapters = {id(parameter) for _, parameter in added_parameters(model)}
    in_full = {name: shape_of(p).numel() for name, p in trained_parameters(model) if id(p) not in adapters}
    return trained_in_full(in_full, "and trains in full")


def _totals(model: nn.Module, save: str) -> list[str]:
    trained = dict(trained_parameters(model)).values()
    adapters = {id(parameter) for _, parameter in added_parameters(model)}
    base = [parameter for _, parameter in names.named_parameters(model) if id(parameter) not in adapters]
    size, base_size = _numel(trained), _numel(base)
    kept = {parameter for name in kept_names(model) for _, parameter in lora_parameters(model, name=name)}
    kept |= {parameter for _, parameter in held_parameters(model)}
    held = _bytes([*trained, *kept])
    total = f"{size:,} trainable parameters, {size / base_size:.2%} of the base's {base_size:,}"
    if save != "merged":
        return [f"{total}; {held} in a checkpoint"]
    merged = _bytes([*base, *_saved_buffers(model)])
    return [total, f"a checkpoint holds the merged model ({merged}) and what trains ({held})"]


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(shape_of(parameter).numel() for parameter in parameters)


def _bytes(tensors: Iterable[Tensor]) -> str:
    return bytes_text(sum(shape_of(tensor).numel() * tensor.element_size() for tensor in tensors))


def _saved_buffers(model: nn.Module) -> list[Tensor]:
    return [
        buffer
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    ]


def output_heads(model: nn.Module | Survey) -> list[str]:
    """The linear layers that compute the output, known by name; else the last layer of all, if it is in no block."""
    survey = survey_of(model)
    roles = roles_in(survey)
    if roles.heads or not roles.linear:
        return roles.heads
    last, blocks = roles.linear[-1], {*roles.attention, *roles.mlp}
    places = {name: place for place, name in enumerate(survey.by_name)}
    comes_last = all(places[name] < places[last] for name in roles.convolutions)
    return [last] if comes_last and last not in blocks and not numbered(last) else []
