"""What is wrong with a configuration on a model, in words that say what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.registry import is_known, refusal
from lightning_lora.names import folded, nearest
from lightning_lora.targets.roles import roles_in
from lightning_lora.targets.survey import Survey


def unmatched(argument: str, pattern: str, hits: Sequence[str], survey: Survey) -> str:
    """A pattern that chooses nothing, though it may match the modules ``hits``, which cannot be adapted."""
    if hits:
        inside = f" Name the layers in it, or all of them with {pattern + '.*'!r}."
        advice = inside if _holds_layers(hits[0], survey) else ""
        why = refusal(survey.sites[hits[0]].module)
        return f"`{argument}` has {pattern!r}, which names `{hits[0]}`, but that {why}.{advice}"
    layers = [name for name, site in survey.sites.items() if name and is_known(site.module)]
    hint = " A `re:` pattern must match the whole name." if pattern.startswith("re:") else ""
    close = _listed(nearest(pattern, layers or [name for name in survey.sites if name]))
    return f"`{argument}` has {pattern!r}, which matches no module. The nearest names are {close}.{hint}"


def _holds_layers(container: str, survey: Survey) -> bool:
    inside = [site.module for name, site in survey.sites.items() if name.startswith(f"{container}.")]
    return any(is_known(module) and refusal(module) is None for module in inside)


def unadapted(argument: str, pattern: str, adapted: Iterable[str]) -> str:
    """A pattern for ranks or alphas that matches nothing which is adapted."""
    close = _listed(nearest(pattern, adapted))
    return f"`{argument}` has {pattern!r}, which matches no adapted module. The nearest of those are {close}."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def empty_preset(survey: Survey, which: str) -> str:
    """A preset that chooses nothing in this model."""
    names = roles_in(survey).linear
    linear = list(dict.fromkeys(folded(name) for name in names))
    what = {"all": "linear layer besides output heads", "mlp": "MLP"}.get(which, "attention block")
    shown = ", ".join(f"`{name}`" for name in linear[:6]) + (", ..." if len(linear) > 6 else "")
    example = (names or ["conv1"])[-1].rpartition(".")[2]
    everything = "Take targets='all', or name" if linear and which != "all" else "Name"
    return (
        f"`targets={which!r}` found no {what} in {type(survey.model).__name__}. Its linear layers are "
        f"{shown or 'none'}. {everything} those to adapt in a list, as in targets={[example]!r}."
    )


def refused(reason: str, names: list[str], others: bool) -> str:
    """Modules that are refused for one reason, and how to go on where there are ``others``."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    leave = list(dict.fromkeys(names if len(names) < 4 else map(folded, names)))
    return f"`{names[0]}`{more} {reason}." + (f" To leave it out write exclude={leave!r}." if others else "")


def nothing_left(config: LoRAConfig) -> str:
    """All that ``targets`` chooses is taken out again."""
    by = [f"`{key}={value!r}`" for key in ("exclude", "also_train") if (value := getattr(config, key))]
    return f"`targets={config.targets!r}` matched only modules that {' or '.join(by)} take out again: nothing is left."
