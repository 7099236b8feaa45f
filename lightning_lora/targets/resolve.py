"""Which modules a configuration means, which matrices in them, and what is wrong with it if it means none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.merged_forward import WeightAdapter
from lightning_lora.layers.parameter import ReadAdapter, readable_part
from lightning_lora.layers.registry import class_for, is_known, parts_of, refusal, refused_parameter
from lightning_lora.layers.weight_reads import is_read_raw
from lightning_lora.layers.weight_view import Part
from lightning_lora.names import covers, folded, matches, nearest
from lightning_lora.targets.fused_qkv import fused_parts
from lightning_lora.targets.roles import roles_in, stem
from lightning_lora.targets.select import Alias, Choice, aliases_in, by_name, by_preset, matrix_names


@dataclass
class Targets:
    """What to adapt, by the module's first clean name, and why others that were named cannot be.

    Args:
        modules: the modules.
        names: all names of each.
        parts: the matrices to adapt in each.
        why: what chose each, for people.
        problems: what is wrong.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise what is wrong.

        Raises:
            ValueError: if a module that was named cannot be adapted, or a pattern matched nothing.
        """
        if self.problems:
            more = f"\n({len(self.problems) - 5} more like these)" if len(self.problems) > 5 else ""
            raise ValueError("\n".join(self.problems[:5]) + more)


def find_targets(model: nn.Module, config: LoRAConfig) -> Targets:
    """What ``config`` means on ``model``, which is not changed."""
    aliases = aliases_in(model)
    targets = Targets()
    if isinstance(config.targets, str):
        chosen = by_preset(model, config.targets)
        targets.problems += [] if chosen else [_empty_preset(model, config.targets)]
    else:
        chosen, unmatched = by_name(aliases, config.targets)
        targets.problems += [_unmatched("targets", pattern, hits, aliases) for pattern, hits in unmatched.items()]
    refused: dict[str, list[str]] = {}
    for name in aliases:
        if name not in chosen or _left_out(aliases[name].names, config):
            continue
        parts = _parts(name, chosen[name], aliases, config)
        reason = parts if isinstance(parts, str) else _reason(parts, aliases[name].module, config) if parts else None
        if reason is not None:
            refused.setdefault(reason, []).append(name)
        elif parts and not isinstance(parts, str):
            targets.modules[name], targets.names[name] = aliases[name].module, aliases[name].names
            targets.parts[name], targets.why[name] = parts, chosen[name].why
    targets.problems += [_refused(reason, same, bool(targets.modules)) for reason, same in refused.items()]
    if not targets.modules and not targets.problems:
        targets.problems.append(_nothing_left(config))
    _check_other_patterns(targets, config, aliases, model)
    return targets


def _left_out(all_names: Iterable[str], config: LoRAConfig) -> bool:
    patterns = [*(config.exclude or ()), *(config.also_train or ())]
    return any(covers(name, patterns) for name in all_names)


def _parts(name: str, choice: Choice, aliases: dict[str, Alias], config: LoRAConfig) -> list[Part] | str:
    """The matrices that were chosen in the module ``name``, or why they cannot be had."""
    alias = aliases[name]
    if choice.parameters and choice.only is not None:
        return f"is named by its parameter `{choice.parameters[0]}` and by matrices in it: keep one of the two"
    if choice.parameters:
        parts = _named_parameters(alias.module, choice.parameters)
    else:
        reason = refusal(alias.module)
        parts = reason if reason is not None else _parts_of_layer(name, choice, aliases, config)
    if isinstance(parts, str):
        return parts
    kept = [part for part in parts if choice.only is None or part.name in choice.only]
    return [part for part in kept if not part.name or not _left_out(_full_names(alias, part), config)]


def _full_names(alias: Alias, part: Part) -> list[str]:
    return [names.join(name, part.name) for name in alias.names]


def _named_parameters(module: nn.Module, keys: list[str]) -> list[Part] | str:
    for key in keys:
        reason = refused_parameter(module, key)
        if reason is not None:
            return f"holds `{key}`, which {reason}"
    return [readable_part(module, key) for key in keys]


def _parts_of_layer(name: str, choice: Choice, aliases: dict[str, Alias], config: LoRAConfig) -> list[Part] | str:
    """All matrices of a layer: a fused map is cut where only some of its rows are wanted."""
    module, parts = aliases[name].module, parts_of(aliases[name].module)
    fused = not any(part.name for part in parts)
    left_out = [full for full in matrix_names(aliases[name]) if covers(full, config.exclude or ())]
    if fused and (choice.only is not None or left_out):
        around, _, leaf = stem(name).rpartition(".")
        cut = fused_parts(aliases[around].module if around in aliases else None, leaf, module)
        if isinstance(cut, str):
            return cut
        parts = cut
    raw = [key for key in dict.fromkeys(part.key for part in parts) if is_read_raw(name, key, _module_at(aliases))]
    if raw and any(part.name for part in parts) and not fused:
        return (
            f"is called as a layer, and code around it reads its `{raw[0]}` too: to adapt it wherever it is read name "
            f"the parameter, targets={[names.join(name, raw[0])]!r}"
        )
    return [replace(part, read=True) for part in parts] if raw else parts


def _module_at(aliases: dict[str, Alias]) -> Callable[[str], nn.Module | None]:
    return lambda name: aliases[name].module if name in aliases else None


def _reason(parts: list[Part], module: nn.Module, config: LoRAConfig) -> str | None:
    kind = class_for(module, parts)
    if config.dropout and issubclass(kind.lora_adapter_class, (ReadAdapter, WeightAdapter)):
        return f"has code that reads its weight, where `dropout={config.dropout}` cannot act: set dropout=0"
    return None


def _check_other_patterns(targets: Targets, config: LoRAConfig, aliases: dict[str, Alias], model: nn.Module) -> None:
    modules = [name for alias in aliases.values() for name in alias.names if name]
    matrices = [name for alias in aliases.values() for name in matrix_names(alias)]
    parameters = [name for name, _ in names.named_parameters(model)]
    for argument, patterns, among in (
        ("exclude", config.exclude, modules + matrices + parameters),
        ("also_train", config.also_train, modules + parameters),
    ):
        missing = [pattern for pattern in patterns or () if not any(matches(name, pattern) for name in among)]
        targets.problems += [_unmatched(argument, pattern, [], aliases) for pattern in missing]
    adapted = [name for all_names in targets.names.values() for name in all_names]
    adapted += [
        names.join(name, part.name)
        for first, parts in targets.parts.items()
        for part in parts
        for name in targets.names[first]
        if part.name
    ]
    for argument, ranks in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        missing = [pattern for pattern in ranks or () if not any(matches(name, pattern) for name in adapted)]
        targets.problems += [_unadapted(argument, pattern, adapted) for pattern in missing]


def _unadapted(argument: str, pattern: str, adapted: list[str]) -> str:
    close = ", ".join(f"`{name}`" for name in nearest(pattern, adapted))
    return f"`{argument}` has {pattern!r}, which matches no adapted module. The nearest of those are {close or 'none'}."


def _unmatched(argument: str, pattern: str, hits: Sequence[str], aliases: dict[str, Alias]) -> str:
    if hits:
        inside = f" Name the layers in it, or all of them with {pattern + '.*'!r}."
        advice = inside if _holds_known(hits[0], aliases) else ""
        why = refusal(aliases[hits[0]].module)
        return f"`{argument}` has {pattern!r}, which names `{hits[0]}`, but that {why}.{advice}"
    candidates = [name for name, alias in aliases.items() if name and is_known(alias.module)]
    close = ", ".join(f"`{name}`" for name in nearest(pattern, candidates or [name for name in aliases if name]))
    hint = " A `re:` pattern must match the whole name." if pattern.startswith("re:") else ""
    return f"`{argument}` has {pattern!r}, which matches no module. The nearest names are {close or 'none'}.{hint}"


def _holds_known(container: str, aliases: dict[str, Alias]) -> bool:
    inside = [
        alias.module for name, alias in aliases.items() if name.startswith(f"{container}.") and is_known(alias.module)
    ]
    return any(refusal(module) is None for module in inside)


def _empty_preset(model: nn.Module, which: str) -> str:
    names_of = roles_in(model).linear
    linear = list(dict.fromkeys(folded(name) for name in names_of))
    what = {"all": "linear layer besides output heads", "mlp": "MLP"}.get(which, "attention block")
    there = ", ".join(f"`{name}`" for name in linear[:6]) + (", ..." if len(linear) > 6 else "")
    example = (names_of or ["conv1"])[-1].rpartition(".")[2]
    everything = "Take targets='all', or name" if linear and which != "all" else "Name"
    return (
        f"`targets={which!r}` found no {what} in {type(model).__name__}. Its linear layers are {there or 'none'}. "
        f"{everything} those to adapt in a list, as in targets={[example]!r}."
    )


def _refused(reason: str, same: list[str], others: bool) -> str:
    """One sentence for all modules that are refused for one reason, and how to go on if there are others."""
    more = f" (and {len(same) - 1} more)" if len(same) > 1 else ""
    leave = list(dict.fromkeys(same if len(same) < 4 else map(folded, same)))
    return f"`{same[0]}`{more} {reason}." + (f" To leave it out write exclude={leave!r}." if others else "")


def _nothing_left(config: LoRAConfig) -> str:
    by = [f"`{key}={value!r}`" for key in ("exclude", "also_train") if (value := getattr(config, key))]
    return f"`targets={config.targets!r}` matched only modules that {' or '.join(by)} take out again: nothing is left."
