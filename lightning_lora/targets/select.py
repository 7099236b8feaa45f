"""What the user's words choose: modules, matrices in them, or parameters by name.

The words are a preset (``"attn"``, ``"qv"``, ``"mlp"``, ``"all"``) or a list of patterns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_lora import names
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.registry import is_known, is_linear, parts_of
from lightning_lora.names import matches
from lightning_lora.targets.fused_qkv import FUSED_PARTS
from lightning_lora.targets.roles import is_fused, is_query_or_value, roles_in, unique


@dataclass
class Alias:
    """A module and every name that it goes by."""

    module: nn.Module
    names: list[str]


@dataclass
class Choice:
    """What was chosen of a module: ``only`` some of its matrices by name, or ``parameters``, or all that it has."""

    why: str
    only: set[str] | None = None
    parameters: list[str] = field(default_factory=list)


def aliases_in(model: nn.Module) -> dict[str, Alias]:
    """Every module of ``model`` once, under its first clean name; adapters are no part of the user's model."""
    found: dict[int, Alias] = {}
    adapted = [module for module in model.modules() if isinstance(module, LoRALayer)]
    hidden = {id(inner) for layer in adapted for inner in layer.lora.modules()}
    for name, module in names.named_modules(model):
        if id(module) not in hidden:
            found.setdefault(id(module), Alias(module, [])).names.append(name)
    return {alias.names[0]: alias for alias in found.values()}


def by_preset(model: nn.Module, which: str) -> dict[str, Choice]:
    """What the preset ``which`` chooses, by name."""
    return {
        name: Choice(repr(which), None if only is None else set(only)) for name, only in preset(model, which).items()
    }


def by_name(aliases: dict[str, Alias], patterns: Sequence[str]) -> tuple[dict[str, Choice], dict[str, list[str]]]:
    """What ``patterns`` choose, by name; and those that choose nothing, each with the modules that it does name."""
    chosen: dict[str, Choice] = {}
    unmatched: dict[str, list[str]] = {}
    for pattern in patterns:
        hits = [name for name, alias in aliases.items() if _matches(alias.names, pattern)]
        known = [name for name in hits if is_known(aliases[name].module)]
        for name in [*known, *_attention_outputs(known, aliases)]:
            chosen[name] = Choice(repr(pattern))
        inside = _matrices_named(aliases, pattern) or ({} if hits else _parameters_named(aliases, pattern))
        for name, choice in inside.items():
            _add(chosen, name, choice)
        if not known and not inside:
            unmatched[pattern] = hits
    return chosen, unmatched


def _attention_outputs(chosen: Iterable[str], aliases: dict[str, Alias]) -> list[str]:
    """Naming an ``nn.MultiheadAttention`` means every weight matrix in it; its output map is a layer of its own."""
    return [
        name
        for owner in chosen
        if isinstance(aliases[owner].module, nn.MultiheadAttention)
        if (name := names.join(owner, "out_proj")) in aliases
    ]


def matrix_names(alias: Alias) -> dict[str, str]:
    """Every name of a matrix in a layer that has several, ``self_attn.q`` or ``qkv.v``, and what it is there."""
    inside = [part.name for part in parts_of(alias.module) if part.name] if is_known(alias.module) else []
    if is_linear(alias.module) and is_fused(alias.names[0]):
        inside = list(FUSED_PARTS)
    return {names.join(name, part): part for name in alias.names for part in inside}


def _matrices_named(aliases: dict[str, Alias], pattern: str) -> dict[str, Choice]:
    found = {}
    for name, alias in aliases.items():
        only = {part for full, part in matrix_names(alias).items() if matches(full, pattern)}
        if only:
            found[name] = Choice(repr(pattern), only)
    return found


def _parameters_named(aliases: dict[str, Alias], pattern: str) -> dict[str, Choice]:
    """The modules that hold a parameter which ``pattern`` names."""
    found = {}
    for name, alias in aliases.items():
        keys = [key for key, parameter in alias.module._parameters.items() if parameter is not None]
        hits = [key for key in keys if _matches([names.join(own, key) for own in alias.names], pattern)]
        if hits:
            found[name] = Choice(repr(pattern), parameters=hits)
    return found


def _add(chosen: dict[str, Choice], name: str, choice: Choice) -> None:
    """What is chosen whole stays whole."""
    known = chosen.setdefault(name, choice)
    if known is choice or (known.only is None and not known.parameters):
        return
    known.only = (known.only or set()) | choice.only if choice.only is not None else known.only
    known.parameters += [key for key in choice.parameters if key not in known.parameters]


def _matches(all_names: Iterable[str], pattern: str) -> bool:
    return any(matches(name, pattern) for name in all_names)


def preset(model: nn.Module, which: str) -> dict[str, tuple[str, ...] | None]:
    """The names that the preset ``which`` chooses in ``model``, each with the matrices to take if that is not all."""
    roles = roles_in(model)
    if which == "qv":
        cut = {name for name in roles.attention if is_fused(name) or name in roles.whole}
        chosen = [name for name in roles.attention if name in cut or is_query_or_value(name)]
        return {name: ("q", "v") if name in cut else None for name in chosen}
    if which == "all":
        out = set(roles.heads) | set(roles.routers)
        found = {*roles.linear, *roles.attention, *roles.experts} - out
        return dict.fromkeys([name for name in unique(model) if name in found] or roles.convolutions)
    return dict.fromkeys(roles.attention if which == "attn" else roles.mlp + roles.experts)
