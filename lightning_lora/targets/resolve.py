"""Which matrices a configuration means in a model, and what is wrong with it where it means none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lightning_lora.config import PRESETS, LoRAConfig, MethodConfig
from lightning_lora.foreign import adapter_library
from lightning_lora.layers.merged_forward import WeightAdapter
from lightning_lora.layers.parameter import ParameterAdapter, part_of_parameter
from lightning_lora.layers.quantized.formats import stores_codes
from lightning_lora.layers.registry import adapted_class_for, parts_of, refusal, refused_parameter
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.names import covers, join, matches
from lightning_lora.targets.fused_qkv import fused_parts
from lightning_lora.targets.problems import (
    adapted_by,
    empty_preset,
    nothing_left,
    of_codes,
    refused,
    unadapted,
    unmatched,
)
from lightning_lora.targets.role_names import around, stem
from lightning_lora.targets.select import Choice, by_name, by_preset, matrix_names
from lightning_lora.targets.survey import Site, Survey, survey_of


@dataclass
class Targets:
    """What to adapt in a model.

    Args:
        survey: of the model.
        sites: the modules to adapt, in the model's order.
        problems: what is wrong, a sentence for each.
    """

    survey: Survey
    sites: list[Site] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """The first clean names of the modules to adapt."""
        return [site.name for site in self.sites]

    def check(self) -> None:
        """Raise what is wrong.

        Raises:
            ValueError: if a module that was named cannot be adapted, or a pattern matched nothing.
        """
        if self.problems:
            more = f"\n({len(self.problems) - 5} more like these)" if len(self.problems) > 5 else ""
            raise ValueError("\n".join(self.problems[:5]) + more)


def find_targets(model: nn.Module | Survey, config: LoRAConfig) -> Targets:
    """What ``config`` means in ``model``, which is not changed.

    Args:
        model: any module, or its survey.
        config: what to adapt.
    """
    survey = survey_of(model)
    chosen, problems = _chosen(survey, config)
    sites = [
        _resolved(site, chosen[name], survey, config)
        for name, site in survey.sites.items()
        if name in chosen and not _left_out(site.names, config)
    ]
    adapted = [site for site in sites if site.parts and site.refusal is None]
    problems += _refusals(sites, bool(adapted))
    if not adapted and not problems:
        problems.append(nothing_left(config))
    problems += useless_patterns(survey, config) + _useless_ranks(adapted, config)
    return Targets(survey, adapted, problems)


def _chosen(survey: Survey, config: LoRAConfig) -> tuple[dict[str, Choice], list[str]]:
    """What ``targets`` chooses by name, and what is wrong with it."""
    if isinstance(config.targets, str):
        chosen = by_preset(survey, config.targets)
        return chosen, [] if chosen else [empty_preset(survey, config.targets)]
    chosen, useless = by_name(survey, config.targets)
    return chosen, [
        unmatched("targets", pattern, hits, survey) if hits or pattern not in PRESETS else empty_preset(survey, pattern)
        for pattern, hits in useless.items()
    ]


def _left_out(names: Iterable[str], config: LoRAConfig) -> bool:
    patterns = [*(config.exclude or ()), *(config.also_train or ())]
    return any(covers(name, patterns) for name in names)


def _resolved(site: Site, choice: Choice, survey: Survey, config: LoRAConfig) -> Site:
    """``site`` with the matrices that were chosen in it, or with the reason why they cannot be adapted."""
    adapter = _adapter_around(site, survey)
    if adapter is not None:
        return adapter
    parts = _parts(site, choice, survey, config)
    if isinstance(parts, str):
        return replace(site, why=choice.why, refusal=parts)
    reason = _no_dropout(parts, site.module, config) if parts else None
    return replace(site, parts=parts, why=choice.why, refusal=reason)


def _adapter_around(site: Site, survey: Survey) -> Site | None:
    """The adapter of another library that ``site`` is or lies in, refused."""
    for outer in [*around(site.name), site.name]:
        module = survey.by_name.get(outer)
        cls: Any = type(module)
        library = adapter_library(cls)
        if library is not None:
            return replace(survey.sites[outer], refusal=adapted_by(library, type(module).__name__))
    return None


def _parts(site: Site, choice: Choice, survey: Survey, config: LoRAConfig) -> list[WeightPart] | str:
    if choice.parameters and choice.only is not None:
        return f"is named by its parameter `{choice.parameters[0]}` and by matrices in it: keep one of the two"
    if choice.parameters:
        parts = _named_parameters(site.module, choice.parameters)
    else:
        reason = refusal(site.module)
        parts = reason if reason is not None else _parts_of_layer(site, choice, survey, config)
    if isinstance(parts, str):
        return parts
    kept = [part for part in parts if choice.only is None or part.name in choice.only]
    return [part for part in kept if not part.name or not _left_out(_matrix(site, part), config)]


def _matrix(site: Site, part: WeightPart) -> list[str]:
    return [join(name, part.name) for name in site.names]


def _named_parameters(module: nn.Module, keys: list[str]) -> list[WeightPart] | str:
    for key in keys:
        reason = refused_parameter(module, key)
        if reason is not None:
            return f"holds `{key}`, which {reason}"
    return [part_of_parameter(module, key) for key in keys]


def _parts_of_layer(site: Site, choice: Choice, survey: Survey, config: LoRAConfig) -> list[WeightPart] | str:
    """All matrices of a layer. A fused projection is cut where only some of its rows are wanted."""
    parts = parts_of(site.module)
    several = any(part.name for part in parts)
    excluded = [name for name in matrix_names(site) if covers(name, config.exclude or ())]
    if not several and (choice.only is not None or excluded):
        owner, _, leaf = stem(site.name).rpartition(".")
        rows = fused_parts(survey.by_name.get(owner), leaf, site.module)
        if rows is None:
            ending = site.name.removeprefix(f"{owner}.")  # the layer may be one of those in `leaf`
            return (
                "fuses query, key and value, and which rows are which was not found by running the code around it; to "
                f"adapt all of it write targets={[ending]!r}"
            )
        parts = rows
    keys = dict.fromkeys(part.key for part in parts)
    raw = [key for key in keys if survey.reads.is_read_raw(site.name, key)]
    if raw and several:
        return (
            f"is called as a layer, and code around it reads its `{raw[0]}` too: to adapt it wherever it is read name "
            f"the parameter, targets={[join(site.name, raw[0])]!r}"
        )
    return [replace(part, read=True) for part in parts] if raw else parts


def _no_dropout(parts: list[WeightPart], module: nn.Module, config: LoRAConfig) -> str | None:
    adapter_class = adapted_class_for(module, parts).lora_adapter_class
    if config.dropout and issubclass(adapter_class, (ParameterAdapter, WeightAdapter)):
        return f"has code that reads its weight, where `dropout={config.dropout}` cannot act: set dropout=0"
    return None


def _refusals(sites: list[Site], others: bool) -> list[str]:
    """One sentence for all modules that are refused for the same reason."""
    names_by_reason: dict[str, list[str]] = {}
    for site in sites:
        if site.refusal is not None:
            names_by_reason.setdefault(site.refusal, []).append(site.name)
    return [refused(reason, list(dict.fromkeys(names)), others) for reason, names in names_by_reason.items()]


def useless_patterns(survey: Survey, config: MethodConfig) -> list[str]:
    """The patterns of ``exclude`` and ``also_train`` that match nothing in the model, or nothing that can train."""
    if not config.exclude and not config.also_train:
        return []
    sites = survey.sites.values()
    named = [name for site in sites for name in site.names if name] + [name for name, _ in survey.parameters()]
    matrices = [name for site in sites for name in matrix_names(site)]
    useless = [
        unmatched(argument, pattern, [], survey)
        for argument, patterns, names in (
            ("exclude", config.exclude, named + matrices),
            ("also_train", config.also_train, named),
        )
        for pattern in patterns or ()
        if not any(matches(name, pattern) for name in names)
    ]
    return useless + [of_codes(p, site) for p in config.also_train or () if (site := _codes_in(p, survey))]


def _codes_in(pattern: str, survey: Survey) -> Site | None:
    """The first layer whose quantized weight ``pattern`` of ``also_train`` names, which cannot train."""
    layers = (site for site in survey.sites.values() if stores_codes(site.module))
    return next((site for site in layers if any(covers(join(n, "weight"), [pattern]) for n in site.names)), None)


def _useless_ranks(sites: list[Site], config: LoRAConfig) -> list[str]:
    """The keys of ``rank_pattern`` and ``alpha_pattern`` that match nothing which is adapted."""
    adapted = [name for site in sites for name in site.names]
    adapted += [name for site in sites for part in site.parts if part.name for name in _matrix(site, part)]
    return [
        unadapted(argument, pattern, adapted)
        for argument, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
        for pattern in patterns or ()
        if not any(matches(name, pattern) for name in adapted)
    ]
