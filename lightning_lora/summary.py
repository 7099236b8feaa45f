"""The table that is shown at the start of a run: what was adapted, what trains, and what stays frozen."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_lora import names
from lightning_lora.freeze import trained_parameters
from lightning_lora.layer import LoRALayer, adapted_layers, parameter_of
from lightning_lora.patterns import folded
from lightning_lora.roles import roles_in
from lightning_lora.state import lora_parameters

Row = tuple[str, ...]


def describe(model: nn.Module) -> str:
    """What LoRA does to ``model``, as a few lines of text; layers that differ only by a number share a row."""
    return "\n".join([*_table(model), *_also_trained(model), _totals(model), *_frozen_heads(model)])


def _table(model: nn.Module) -> list[str]:
    counts: dict[Row, list[tuple[str, int]]] = {}
    for name, layer in adapted_layers(model):
        for adapter in layer.lora.every():
            part = adapter.part
            in_features, out_features = part.features(parameter_of(layer, part.key))
            shape = f"{in_features} -> {out_features}"
            own = names.join(name, part.name) if part.name else name
            row = (folded(own), layer.original_class.__name__, shape, str(adapter.r), f"{adapter.scale:g}")
            counts.setdefault(row, []).append((own, sum(p.numel() for p in adapter.parameters())))
    head = ("module", "layers", "kind", "in -> out", "r", "scale", "trainable")
    return ["LoRA adapts", *_aligned([head, *(_row(row, layers) for row, layers in counts.items())])]


def _row(row: Row, layers: list[tuple[str, int]]) -> Row:
    name = row[0] if len(layers) > 1 else layers[0][0] or "(the model itself)"
    return (name, str(len(layers)), *row[1:], f"{sum(size for _, size in layers):,}")


def _aligned(rows: list[Row]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _also_trained(model: nn.Module) -> list[str]:
    own = {id(parameter) for _, parameter in lora_parameters(model)}
    beside = {name: p.numel() for name, p in trained_parameters(model) if id(p) not in own}
    modules: dict[str, int] = {}
    for name, size in beside.items():
        modules[folded(name)] = modules.get(folded(name), 0) + size
    listed = ", ".join(f"{name} ({size:,})" for name, size in list(modules.items())[:6])
    more = f" and {len(modules) - 6} more" if len(modules) > 6 else ""
    return [f"and trains in full: {listed}{more}"] if modules else []


def _totals(model: nn.Module) -> str:
    trained = dict(trained_parameters(model))
    adapters = {id(parameter) for _, parameter in lora_parameters(model)}
    base = sum(p.numel() for _, p in names.named_parameters(model) if id(p) not in adapters)
    size = sum(parameter.numel() for parameter in trained.values())
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in trained.values())
    return (
        f"{size:,} trainable parameters, {size / base:.2%} of the base's {base:,}; {bytes_text(nbytes)} in a checkpoint"
    )


def _frozen_heads(model: nn.Module) -> list[str]:
    trained = {id(parameter) for _, parameter in trained_parameters(model)}
    modules = dict(names.named_modules(model))
    frozen = [name for name in output_heads(model) if not _trains(modules[name], trained)]
    if not frozen:
        return []
    which = ", ".join(f"`{name}`" for name in frozen)
    return [f"The output head {which} stays frozen; to train it in full, as a new head needs: also_train={frozen!r}"]


def output_heads(model: nn.Module) -> list[str]:
    """The linear maps that give the output: known by their name, or the last one that is in no block."""
    roles = roles_in(model)
    blocks = {*roles.attention, *roles.mlp}
    last = [name for name in roles.linear if name not in blocks][-1:]
    return roles.heads or [name for name in last if name == roles.linear[-1]]


def _trains(module: nn.Module, trained: Iterable[int]) -> bool:
    return isinstance(module, LoRALayer) or any(id(parameter) in trained for parameter in module.parameters())


def bytes_text(size: float) -> str:
    """A number of bytes for people, in powers of 1000.

    Example:
        >>> bytes_text(25_000), bytes_text(13.4e9)
        ('25.0 kB', '13.4 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
