"""What a preset or a list of patterns chooses in a model: modules, matrices in them, or parameters by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_lora.config import PRESETS
from lightning_lora.layers.registry import is_known, is_linear, is_pointwise, parts_of
from lightning_lora.names import join, matches
from lightning_lora.targets.fused_qkv import FUSED_PARTS
from lightning_lora.targets.role_names import is_fused, is_query_or_value
from lightning_lora.targets.roles import Roles, roles_in
from lightning_lora.targets.survey import Site, Survey, survey_of


@dataclass
class Choice:
    """What was chosen of a module: all that it has, or less.

    Args:
        why: the preset or pattern, for people.
        only: the names of the matrices, where not all were chosen.
        parameters: the parameters that were named themselves.
    """

    why: str
    only: set[str] | None = None
    parameters: list[str] = field(default_factory=list)


def by_preset(survey: Survey, which: str) -> dict[str, Choice]:
    """What the preset ``which`` chooses, by name of the module."""
    return {
        name: Choice(repr(which), None if only is None else set(only)) for name, only in preset(survey, which).items()
    }


def by_name(survey: Survey, patterns: Sequence[str]) -> tuple[dict[str, Choice], dict[str, list[str]]]:
    """What ``patterns`` choose, by name of the module.

    Returns:
        The choices, and the patterns that choose nothing, each with the modules that it matches all the same.
    """
    chosen: dict[str, Choice] = {}
    unmatched: dict[str, list[str]] = {}
    for pattern in patterns:
        hits = [name for name, site in survey.sites.items() if _matches(site.names, pattern)]
        layers = [name for name in hits if is_known(survey.sites[name].module)]
        choices = {name: Choice(repr(pattern)) for name in [*layers, *_attention_outputs(layers, survey)]}
        inside = _matrices_named(survey, pattern) or ({} if hits else _parameters_named(survey, pattern))
        choices = {**inside, **choices} or (by_preset(survey, pattern) if pattern in PRESETS else {})
        for name, choice in choices.items():
            _add(chosen, name, choice)
        if not choices:
            unmatched[pattern] = hits
    return chosen, unmatched


def _attention_outputs(chosen: Iterable[str], survey: Survey) -> list[str]:
    """The ``out_proj`` of each chosen ``nn.MultiheadAttention``: a layer of its own, and one of its weight matrices."""
    owners = [name for name in chosen if isinstance(survey.sites[name].module, nn.MultiheadAttention)]
    return [output for owner in owners if (output := join(owner, "out_proj")) in survey.sites]


def matrix_names(site: Site) -> dict[str, str]:
    """For a layer with several matrices: every name of one, as ``self_attn.q`` or ``qkv.v``, and its name there."""
    inside = [part.name for part in parts_of(site.module) if part.name] if is_known(site.module) else []
    if (is_linear(site.module) or is_pointwise(site.module)) and is_fused(site.name):
        inside = list(FUSED_PARTS)
    return {join(name, part): part for name in site.names for part in inside}


def _matrices_named(survey: Survey, pattern: str) -> dict[str, Choice]:
    choices = {}
    for name, site in survey.sites.items():
        only = {part for full_name, part in matrix_names(site).items() if matches(full_name, pattern)}
        if only:
            choices[name] = Choice(repr(pattern), only)
    return choices


def _parameters_named(survey: Survey, pattern: str) -> dict[str, Choice]:
    """The modules that hold a parameter which ``pattern`` names."""
    choices = {}
    for name, site in survey.sites.items():
        keys = [key for key, parameter in site.module._parameters.items() if parameter is not None]
        hits = [key for key in keys if _matches([join(alias, key) for alias in site.names], pattern)]
        if hits:
            choices[name] = Choice(repr(pattern), parameters=hits)
    return choices


def _add(chosen: dict[str, Choice], name: str, choice: Choice) -> None:
    """Add ``choice``. A module that is chosen whole stays whole, unless a parameter of it is named itself."""
    before = chosen.setdefault(name, choice)
    whole = [one for one in (before, choice) if one.only is None and not one.parameters]
    if before is choice or (whole and choice.only is not None):
        return
    if whole:
        chosen[name] = before if before.parameters else choice
        return
    before.only = (before.only or set()) | choice.only if choice.only is not None else before.only
    before.parameters += [key for key in choice.parameters if key not in before.parameters]


def _matches(names: Iterable[str], pattern: str) -> bool:
    return any(matches(name, pattern) for name in names)


def preset(model: nn.Module | Survey, which: str) -> dict[str, tuple[str, ...] | None]:
    """The modules that the preset ``which`` chooses, each with the matrices to take, or ``None`` for all."""
    survey = survey_of(model)
    roles = roles_in(survey)
    if which == "qv":
        cut = {name for name in roles.attention if is_fused(name) or name in roles.whole}
        chosen = [name for name in roles.attention if name in cut or is_query_or_value(name)]
        return {name: ("q", "v") if name in cut else None for name in chosen}
    if which == "all":
        return dict.fromkeys(_everything(survey, roles))
    return dict.fromkeys(roles.attention if which == "attn" else roles.mlp + roles.experts)


def _everything(survey: Survey, roles: Roles) -> list[str]:
    """Every linear layer but heads and routers; all convolutions of a network that has no linear layer but heads."""
    left_out = {*roles.heads, *roles.routers}
    wanted = {*roles.linear, *roles.attention, *roles.mlp, *roles.experts} - left_out
    if not wanted - set(roles.convolutions):
        return roles.convolutions
    return [name for name in survey.sites if name in wanted]
