"""Which modules a configuration means, and what is wrong with it if it means none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora import names
from lightning_lora.config import LoRAConfig
from lightning_lora.kinds import refusal, root_of, swapped_class
from lightning_lora.layer import LoRALayer, OnWeight
from lightning_lora.patterns import covers, folded, matches, nearest
from lightning_lora.presets import is_fused, preset, roles_in


@dataclass
class Targets:
    """The modules to adapt by first clean name, all their names, and why others that were named cannot be."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
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
    chosen = _chosen(model, config, aliases, targets)
    holders = _holders(model)
    refused: dict[str, list[str]] = {}
    for name in aliases:
        if name in chosen and not _left_out(aliases[name].names, config):
            reason = _reason(name, aliases, holders, config)
            if reason is None:
                targets.modules[name], targets.names[name] = aliases[name].module, aliases[name].names
            else:
                refused.setdefault(reason, []).append(name)
    targets.problems += [_refused(reason, same, bool(targets.modules)) for reason, same in refused.items()]
    if not targets.modules and not targets.problems:
        targets.problems.append(_nothing_left(config))
    _check_other_patterns(targets, config, aliases, model)
    return targets


@dataclass
class Alias:
    """A module and every name that it goes by."""

    module: nn.Module
    names: list[str]


def aliases_in(model: nn.Module) -> dict[str, Alias]:
    """Every module of ``model`` once, under its first clean name; adapters are no part of the user's model."""
    found: dict[int, Alias] = {}
    adapted = [module for module in model.modules() if isinstance(module, LoRALayer)]
    hidden = {id(inner) for layer in adapted for inner in layer.lora.modules()}
    for name, module in names.named_modules(model):
        if id(module) not in hidden:
            found.setdefault(id(module), Alias(module, [])).names.append(name)
    return {alias.names[0]: alias for alias in found.values()}


def _chosen(model: nn.Module, config: LoRAConfig, aliases: dict[str, Alias], targets: Targets) -> set[str]:
    if isinstance(config.targets, str):
        chosen = set(preset(model, config.targets))
        if not chosen:
            targets.problems.append(_empty_preset(model, config.targets))
        return chosen
    found: set[str] = set()
    for pattern in config.targets:
        hits = [name for name, alias in aliases.items() if _named(alias, pattern)]
        known = [name for name in hits if _known(aliases[name])]
        found |= set(known)
        if not known:
            targets.problems.append(_unmatched("targets", pattern, hits, aliases))
    return found


def _named(alias: Alias, pattern: str) -> bool:
    return any(matches(name, pattern) for name in alias.names)


def _left_out(all_names: Iterable[str], config: LoRAConfig) -> bool:
    patterns = [*(config.exclude or ()), *(config.also_train or ())]
    return any(covers(name, patterns) for name in all_names)


def _reason(name: str, aliases: dict[str, Alias], holders: Holders, config: LoRAConfig) -> str | None:
    module = aliases[name].module
    parent = aliases.get(name.rpartition(".")[0])
    reason = refusal(module, parent.module if parent else None)
    if reason is not None:
        return reason
    if config.targets == "qv" and is_fused(name):
        leaf = name.rpartition(".")[2]
        return f"fuses several of query, key and value in one map; to adapt all of it write targets={[leaf]!r}"
    if config.dropout and issubclass(swapped_class(plain_class(module)), OnWeight):
        return f"has a forward that reads its weight, where `dropout={config.dropout}` cannot act: set dropout=0"
    others = [held for other, held in holders[_memory(module._parameters["weight"])] if other is not module]
    if others:
        return f"shares its weight with `{others[0]}`: merging an adapter into one would change the other"
    return None


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` has without adapters."""
    return module.original_class if isinstance(module, LoRALayer) else type(module)


Holders = dict[tuple[int, bool], list[tuple[nn.Module, str]]]


def _holders(model: nn.Module) -> Holders:
    found: Holders = {}
    for name, module in names.named_modules(model):
        for key, parameter in module._parameters.items():
            found.setdefault(_memory(parameter), []).append((module, names.join(name, key)))
    return found


def _memory(parameter: Tensor | None) -> tuple[int, bool]:
    """What two parameters have in common only if one is the other, as an object or as memory."""
    if parameter is None or parameter.is_meta or is_lazy(parameter) or not parameter.data_ptr():
        return (id(parameter), False)
    return (parameter.data_ptr(), True)


def _check_other_patterns(targets: Targets, config: LoRAConfig, aliases: dict[str, Alias], model: nn.Module) -> None:
    modules = [name for alias in aliases.values() for name in alias.names if name]
    parameters = [name for name, _ in names.named_parameters(model)]
    for argument, patterns, among in (
        ("exclude", config.exclude, modules),
        ("also_train", config.also_train, modules + parameters),
    ):
        missing = [pattern for pattern in patterns or () if not any(matches(name, pattern) for name in among)]
        targets.problems += [_unmatched(argument, pattern, [], aliases) for pattern in missing]
    adapted = [name for all_names in targets.names.values() for name in all_names]
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
    candidates = [name for name, alias in aliases.items() if name and _known(alias)]
    close = ", ".join(f"`{name}`" for name in nearest(pattern, candidates or [name for name in aliases if name]))
    hint = " A `re:` pattern must match the whole name." if pattern.startswith("re:") else ""
    return f"`{argument}` has {pattern!r}, which matches no module. The nearest names are {close or 'none'}.{hint}"


def _known(alias: Alias) -> bool:
    return root_of(type(alias.module)) is not None


def _holds_known(container: str, aliases: dict[str, Alias]) -> bool:
    inside = [alias.module for name, alias in aliases.items() if name.startswith(f"{container}.") and _known(alias)]
    return any(refusal(module, aliases[container].module) is None for module in inside)


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
