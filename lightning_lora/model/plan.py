"""The dry run: what a configuration would adapt, as a table, and as YAML to edit and give back as ``targets``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.registry import plain_class
from lightning_lora.layers.weight_view import Part
from lightning_lora.model.freeze import adapter_parameters, asked_for
from lightning_lora.model.table import Row, beside, bytes_text, row_of, table
from lightning_lora.names import matches
from lightning_lora.targets.resolve import Targets, find_targets


@dataclass(frozen=True)
class Plan:
    """What would be adapted; printed it is a table.

    Args:
        rows: one for each matrix.
        beside: parameters of the base that would train too, with their sizes.
        base: number of parameters that the model has.
        every_name: the names of all modules and parameters, so that :meth:`to_yaml` names nothing else.
    """

    rows: list[Row]
    beside: dict[str, int]
    base: int
    every_name: list[str]

    def __str__(self) -> str:
        """The table and the totals."""
        trained = sum(row.parameters for row in self.rows) + sum(self.beside.values())
        lines = ["LoRA would adapt", *table(self.rows), *beside(self.beside, "and train in full")]
        share, size = trained / max(1, self.base), bytes_text(4 * trained)
        total = f"{trained:,} trainable parameters, {share:.2%} of the base's {self.base:,}; {size} in fp32"
        return "\n".join([*lines, total])

    __repr__ = __str__

    def to_yaml(self) -> str:
        """One line for each matrix, to edit and give back: ``targets=yaml.safe_load(text)``, or in a config file."""
        patterns = [self._pattern(row.name).replace("'", "''") for row in self.rows]
        described = zip(patterns, self.rows, strict=True)
        lines = [f"- '{pattern}'  # {row.kind} {row.shape}, r={row.r}" for pattern, row in described]
        size = sum(row.parameters for row in self.rows)
        return "\n".join([f"# {len(self.rows)} matrices, {size:,} parameters", *lines, ""])

    def _pattern(self, name: str) -> str:
        """The name, where that names nothing else."""
        others = (other for other in self.every_name if other != name and matches(other, name))
        return f"re:{re.escape(name) or '()'}" if not name or any(True for _ in others) else name


def plan_lora(model: nn.Module, config: LoRAConfig) -> Plan:
    """What :func:`apply_lora` would adapt in ``model``, which is not changed and may be on the meta device.

    Args:
        model: any module, built as it will be adapted.
        config: what to adapt and how.

    Returns:
        A table that can be printed; its ``rows`` and :meth:`Plan.to_yaml` are for programs.

    Raises:
        ValueError: where ``apply_lora`` would raise: a target cannot be found or adapted.

    Example:
        >>> print(plan_lora(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), LoRAConfig(r=2, targets="all")))
        LoRA would adapt
          module  layers  kind    in -> out  r  scale  trainable  by
          0       1       Linear  4 -> 4     2  1      16         'all'
          2       1       Linear  4 -> 2     2  1      12         'all'
        28 trainable parameters, 93.33% of the base's 30; 112 B in fp32
    """
    targets = find_targets(model, config)
    targets.check()
    rows = [_row(name, part, targets, config) for name, parts in targets.parts.items() for part in parts]
    every_name = [name for name, _ in names.named_modules(model)] + [name for name, _ in names.named_parameters(model)]
    parts = [names.join(name, part.name) for name, parts in targets.parts.items() for part in parts if part.name]
    base = sum(parameter.numel() for _, parameter in _of_the_base(model))
    return Plan(rows, _beside(model, targets, config), base, every_name + parts)


def _row(name: str, part: Part, targets: Targets, config: LoRAConfig) -> Row:
    module = targets.modules[name]
    known_as = [names.join(own, part.name) for own in targets.names[name] if part.name] + targets.names[name]
    r, scale, weight = config.rank_for(*known_as), config.scale_for(*known_as), parameter_of(module, part.key)
    return row_of(known_as[0], plain_class(module).__name__, part, weight, r, scale, targets.why[name])


def _beside(model: nn.Module, targets: Targets, config: LoRAConfig) -> dict[str, int]:
    adapted = {id(module) for module in targets.modules.values()}
    owner = {id(p): module for _, module in names.named_modules(model) for p in module._parameters.values()}
    return {
        name: parameter.numel()
        for name, parameter in _of_the_base(model)
        if asked_for(name, id(owner[id(parameter)]) in adapted, config) and parameter.is_floating_point()
    }


def _of_the_base(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    adapters = adapter_parameters(model)
    return ((name, p) for name, p in names.named_parameters(model) if id(p) not in adapters)
