"""What is wrong with a configuration on a model, in words that say what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_lora.config import LoRAConfig
from lightning_lora.foreign import adapter_library
from lightning_lora.layers.registry import is_known, refusal, refused_parameter
from lightning_lora.names import folded, join, matches, nearest
from lightning_lora.targets.roles import roles_in
from lightning_lora.targets.survey import Site, Survey

EXPRESSION = re.compile(r"\.\*|[|()^$\\+]")


def unmatched(argument: str, pattern: str, hits: Sequence[str], survey: Survey) -> str:
    """A pattern that chooses nothing, though it may match the modules ``hits``, which cannot be adapted."""
    if hits:
        return f"`{argument}` has {pattern!r}, which names `{hits[0]}`, but that {_why_not(hits[0], pattern, survey)}"
    layers = [name for name, site in survey.sites.items() if name and is_known(site.module)]
    names = layers or [name for name in survey.sites if name]
    close, hint = _listed(nearest(pattern, names)), _expression_hint(pattern, names)
    return f"`{argument}` has {pattern!r}, which matches no module. The nearest names are {close}.{hint}"


def _why_not(name: str, pattern: str, survey: Survey) -> str:
    """Why the module that ``pattern`` names cannot be adapted, and what to name instead."""
    module = survey.sites[name].module
    cls: Any = type(module)
    library = adapter_library(cls)
    if library is not None:
        return f"{adapted_by(library, cls.__name__)}."
    inside = f" Name the layers in it, or all of them with {pattern + '.*'!r}."
    return f"{refusal(module)}.{inside if _holds_layers(name, survey) else ''}"


def _expression_hint(pattern: str, names: Iterable[str]) -> str:
    """What to write where ``pattern`` looks like a regular expression, as peft takes it."""
    if pattern.startswith("re:"):
        return " A `re:` pattern must match the whole name."
    if not EXPRESSION.search(pattern):
        return ""
    for candidate in (f"re:{pattern}", f"re:.*{pattern}"):
        try:
            if any(matches(name, candidate) for name in names):
                return f" A regular expression starts with `re:` and matches the whole name: {candidate!r}."
        except (ValueError, re.error):
            continue
    return ""


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
    roles = roles_in(survey)
    linear = list(dict.fromkeys(folded(name) for name in roles.linear))
    what = {"all": "linear layer besides output heads", "mlp": "MLP"}.get(which, "attention block")
    shown = ", ".join(f"`{name}`" for name in linear[:6]) + (", ..." if len(linear) > 6 else "")
    model = type(survey.model).__name__
    found = f"`targets={which!r}` found no {what} in {model}. "
    found += f"Its linear layers are {shown}." if shown else "It has no linear layer."
    if which == "qv" and roles.attention:
        found = f"`targets='qv'` found attention in {model}, but no name of its projections says query or value."
        return f"{found} Take targets='attn', or name projections in a list, as in targets={[roles.attention[0]]!r}."
    inner = [name for name in roles.linear if name not in roles.heads]
    if inner and which != "all":
        return f"{found} Take targets='all', or name those to adapt in a list, as in targets={[_short(inner[0])]!r}."
    layers = [name for name, site in survey.sites.items() if name and is_known(site.module)]
    others = [name for name in layers if name not in roles.linear] or roles.linear or _matrices(survey)
    return f"{found} Name what to adapt in a list, as in targets={[_short(others[0])]!r}." if others else found


def _short(name: str) -> str:
    """The last part of ``name``, or all of it where that is a number, which other layers have too."""
    last = name.rpartition(".")[2]
    return name if last.isdigit() else last


def _matrices(survey: Survey) -> list[str]:
    """Parameters that are matrices: they can be adapted wherever code reads them."""
    return [
        join(name, key)
        for name, site in survey.sites.items()
        for key, parameter in site.module._parameters.items()
        if parameter is not None and refused_parameter(site.module, key) is None
    ]


def refused(reason: str, names: list[str], others: bool) -> str:
    """Modules that are refused for one reason, and how to go on where there are ``others``."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    leave = list(dict.fromkeys(names if len(names) < 4 else map(folded, names)))
    return f"`{names[0]}`{more} {reason}." + (f" To leave it out write exclude={leave!r}." if others else "")


def raise_refusals(reasons: Mapping[str, str | None]) -> None:
    """Raise for the modules that have a reason, one sentence for each reason.

    Args:
        reasons: by the name of each chosen module why it is refused, or ``None`` for those that are not.

    Raises:
        ValueError: if there is a reason.
    """
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            names_by_reason.setdefault(reason, []).append(name)
    if names_by_reason:
        others = None in reasons.values()
        raise ValueError("\n".join(refused(reason, names, others) for reason, names in names_by_reason.items()))


def of_codes(pattern: str, site: Site) -> str:
    """A pattern of ``also_train`` that names a quantized weight."""
    return (
        f"`also_train` has {pattern!r}, and the weight of `{site.name}` is quantized: its codes take no gradient. "
        "Adapt the layer instead, by `targets`, or leave it out of the quantization: by `filter_fn` of torchao's "
        "`quantize_`, by `ignore_modules` of BitsandbytesPrecision, or by `llm_int8_skip_modules` of "
        "BitsAndBytesConfig, which takes the ends of names "
        f"and acts on 4 bits, too, as in llm_int8_skip_modules={[site.name.rpartition('.')[2], 'lm_head']!r}."
    )


def adapted_by(library: str, class_name: str) -> str:
    """Why an adapter of ``library`` is refused, as the end of a sentence about it."""
    how = "`model = model.merge_and_unload()`" if library == "peft" else "as that library does it"
    return f"is a {class_name} of {library}, an adapter already: merge it into the weights first, {how}"


def nothing_left(config: LoRAConfig) -> str:
    """All that ``targets`` chooses is taken out again."""
    by = [f"`{key}={value!r}`" for key in ("exclude", "also_train") if (value := getattr(config, key))]
    return f"`targets={config.targets!r}` matched only modules that {' or '.join(by)} take out again: nothing is left."
