"""The dry run: what a configuration would adapt, as a table, and as YAML to edit and give back as ``targets``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import nn

from lightning_lora.config import LoRAConfig, check_compute
from lightning_lora.distributed.sharded import shape_of
from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.registry import original_class
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.model.freeze import adapter_parameters, trains
from lightning_lora.model.report.sides import side_remark
from lightning_lora.model.report.table import Row, bytes_text, row_of, table, trained_in_full, useless_ranks
from lightning_lora.names import counted, matches
from lightning_lora.targets.left_alone import left_alone
from lightning_lora.targets.resolve import Targets, find_targets
from lightning_lora.targets.survey import Site, Survey


@dataclass(frozen=True)
class Plan:
    """What would be adapted; printed it is a table.

    Args:
        rows: one for each matrix.
        in_full: parameters of the base that would train too, with their sizes.
        base: number of parameters of the model.
        every_name: all names of modules, parameters and matrices: a pattern in :meth:`to_yaml` matches only one.
        remarks: lines for people about what is adapted.
    """

    rows: list[Row]
    in_full: dict[str, int]
    base: int
    every_name: list[str]
    remarks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The table and the totals."""
        trained = sum(row.parameters for row in self.rows) + sum(self.in_full.values())
        lines = ["LoRA would adapt", *table(self.rows), *trained_in_full(self.in_full, "and train in full")]
        share, size = trained / max(1, self.base), bytes_text(4 * trained)
        total = f"{trained:,} trainable parameters, {share:.2%} of the base's {self.base:,}; {size} in fp32"
        return "\n".join([*lines, total, *self.remarks])

    __repr__ = __str__

    def to_yaml(self) -> str:
        """One line for each matrix, to edit and give back: ``targets=yaml.safe_load(text)``, or in a config file.

        Of several adapters it is what ``adapters`` takes, without the other arguments in which they differ.
        """
        size = sum(row.parameters for row in self.rows)
        lines = [f"# {counted(len(self.rows), 'matrix', 'matrices')}, {counted(size, 'parameter')}"]
        for adapter in dict.fromkeys(row.adapter for row in self.rows):
            lines += [f"{adapter}:", "  targets:"] if adapter else []
            lines += [f"{'  ' if adapter else ''}{self._entry(row)}" for row in self.rows if row.adapter == adapter]
        return "\n".join([*lines, ""])

    def _entry(self, row: Row) -> str:
        pattern = self._pattern(row.name).replace("'", "''")
        return f"- '{pattern}'  # {row.kind} {row.shape}, r={row.r}"

    def _pattern(self, name: str) -> str:
        """The name itself, or an exact pattern where the name would match another one too."""
        ambiguous = any(matches(candidate, name) for candidate in self.every_name if candidate != name)
        return f"re:{re.escape(name) or '()'}" if not name or ambiguous else name


class HasConfig(Protocol):
    """A callback of this package: its ``config`` says what is adapted."""

    config: LoRAConfig


def plan_lora(model: nn.Module, config: LoRAConfig | HasConfig, *, compute: str | None = None) -> Plan:
    """What :func:`apply_lora` would adapt in ``model``, which is not changed and may be on the meta device.

    Args:
        model: any module, with all layers that will be adapted.
        config: what to adapt and how, or the LoRACallback that holds it.
        compute: as of :func:`apply_lora`; the plan then says on which side layers compute. ``None`` takes that of the
            callback, and says nothing for a LoRAConfig.

    Returns:
        A table that can be printed; its ``rows`` and :meth:`Plan.to_yaml` are for programs.

    Raises:
        ValueError: where ``apply_lora`` would raise: a target cannot be found or adapted.
        TypeError: if ``config`` is neither.

    Example:
        >>> print(plan_lora(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), LoRAConfig(r=2, targets="all")))
        LoRA would adapt
          module  layers  kind    in -> out  r  scale  trainable  by
          0       1       Linear  4 -> 4     2  1      16         'all'
          2       1       Linear  4 -> 2     2  1      12         'all'
        28 trainable parameters, 93.33% of the base's 30; 112 B in fp32
    """
    compute = compute or getattr(getattr(config, "run_config", None), "compute", None)
    config = getattr(config, "config", config)
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"`config` must be a LoRAConfig or a LoRACallback, but got a {type(config).__name__}.")
    survey = Survey(model)
    every = [(find_targets(survey, each), each) for each in config.each()]
    for targets, _ in every:
        targets.check()
    rows = [_row(site, part, each, config) for targets, each in every for site in targets.sites for part in site.parts]
    base = _base_parameters(survey)
    size = sum(shape_of(parameter).numel() for parameter in base.values())
    remarks = useless_ranks(rows)
    for targets, each in every:
        remarks += [line for line in left_alone(survey, targets.names(), each) if line not in remarks]
    sites = list({id(site.module): site for targets, _ in every for site in targets.sites}.values())
    if compute is not None:
        check_compute(compute, config)
        remarks.append(side_remark(sites, compute, max(each.dropout for _, each in every)))
    in_full = {name: number for targets, each in every for name, number in _in_full(targets, base, each).items()}
    return Plan(rows, in_full, size, _every_name(survey, sites, base), remarks)


def _row(site: Site, part: WeightPart, config: LoRAConfig, asked: LoRAConfig) -> Row:
    row = _row_of_one(site, part, config)
    return row if asked.adapters is None else replace(row, adapter=config.name)


def _row_of_one(site: Site, part: WeightPart, config: LoRAConfig) -> Row:
    names, weight = site.names_of(part), parameter_of(site.module, part.key)
    class_name = original_class(site.module).__name__
    return row_of(names[0], class_name, part, weight, config.rank_for(*names), config.scale_for(*names), site.why)


def _base_parameters(survey: Survey) -> dict[str, nn.Parameter]:
    added = adapter_parameters(survey)
    return {name: parameter for name, parameter in survey.parameters() if id(parameter) not in added}


def _in_full(targets: Targets, base: Mapping[str, nn.Parameter], config: LoRAConfig) -> dict[str, int]:
    """The parameters of the base that train in full, with their sizes."""
    adapted = set(targets.names())
    trained = {
        id(site.module._parameters[key])
        for name, site in targets.survey.sites.items()
        for key in site.module._parameters
        if trains(site, key, name in adapted, config)
    }
    return {name: shape_of(parameter).numel() for name, parameter in base.items() if id(parameter) in trained}


def _every_name(survey: Survey, sites: Iterable[Site], base: Iterable[str]) -> list[str]:
    modules = [name for site in survey.sites.values() for name in site.names]
    return [*modules, *base, *(site.names_of(part)[0] for site in sites for part in site.parts if part.name)]
