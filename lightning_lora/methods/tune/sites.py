"""From the words of ``train`` to parameters of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.layers.quantized.formats import stores_codes
from lightning_lora.methods.tune.config import PARTS, TuneConfig
from lightning_lora.model.freeze import BIAS
from lightning_lora.model.report.summary import output_heads
from lightning_lora.names import covers, join, matches, nearest
from lightning_lora.targets.role_names import CLASSIFIER, leaf_is
from lightning_lora.targets.roles import head_container, roles_in
from lightning_lora.targets.survey import Site, Survey

NORM_CLASSES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    getattr(nn, "RMSNorm", nn.LayerNorm),
)
NORM = re.compile(r"norm", re.IGNORECASE)
WHAT = {"bias": "bias", "norm": "parameter of a normalization layer", "all": "parameter"}
Place = tuple[Site, str]


def tuned(survey: Survey, config: TuneConfig) -> list[Place]:
    """The parameters that ``config.train`` means, each as its module and its key there.

    Raises:
        ValueError: if one of its words or patterns means nothing in the model, or what it means cannot train.
    """
    places = {(site.name, key): site for part in config.parts() for site, key in _part(survey, part, config)}
    kept = [(site, key) for (_, key), site in places.items() if not _excluded(site, key, config.exclude or ())]
    if not kept:
        raise ValueError(
            f"`train={config.train!r}` means only parameters that `exclude={config.exclude!r}` takes out again: "
            "nothing is left."
        )
    for site, key in kept:
        parameter = site.module._parameters[key]
        if parameter is not None and is_lazy(parameter):
            raise ValueError(
                f"`{join(site.name, key)}` has no shape yet (a lazy module): run one batch through the model first."
            )
    return kept


def _part(survey: Survey, part: str, config: TuneConfig) -> list[Place]:
    """What one word or pattern means; in a list a name of the model takes precedence over the word."""
    places = [] if isinstance(config.train, str) else _named(survey, part)
    if places:
        return _trainable(places, survey, part)
    if part not in PARTS:
        raise ValueError(_unmatched(survey, part))
    if part == "head":
        return _head(survey)
    places = [place for place in _every(survey) if part == "all" or is_part(part, *place)]
    if not places:
        raise ValueError(
            f"`train={part!r}` found no {WHAT[part]} in {type(survey.model).__name__}. {_instead(survey, part)}"
        )
    return _trainable(places, survey, part)


def is_part(part: str, site: Site, key: str) -> bool:
    """Whether the parameter ``key`` of ``site`` is a ``"bias"``, or belongs to a ``"norm"``."""
    return bool(BIAS.fullmatch(key)) if part == "bias" else is_norm(site.module)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalization layer: of torch, or of a class that is called so and scales each feature.

    Example:
        >>> is_norm(nn.LayerNorm(4)), is_norm(nn.Linear(4, 4))
        (True, False)
    """
    if isinstance(module, NORM_CLASSES):
        return True
    named = any(NORM.search(cls.__name__) for cls in type(module).__mro__ if issubclass(cls, nn.Module))
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return named and all(sum(size > 1 for size in parameter.shape) <= 1 for parameter in own if not is_lazy(parameter))


def _every(survey: Survey) -> Iterator[Place]:
    for site in survey.sites.values():
        for key, parameter in site.module._parameters.items():
            if parameter is not None:
                yield site, key


def _named(survey: Survey, pattern: str) -> list[Place]:
    return [(site, key) for site, key in _every(survey) if any(covers(join(n, key), [pattern]) for n in site.names)]


def _excluded(site: Site, key: str, exclude: Collection[str]) -> bool:
    return any(covers(join(name, key), exclude) for name in site.names)


def _trainable(places: list[Place], survey: Survey, part: str) -> list[Place]:
    """Those of ``places`` that take a gradient: the codes of quantized weights stay as they are."""
    kept = [(site, key) for site, key in places if _takes_gradient(site.module, key)]
    if not kept:
        site, key = places[0]
        dtype = getattr(site.module._parameters[key], "dtype", None)
        codes = "it is quantized, and its codes take"
        reason = codes if stores_codes(site.module, key) else f"its dtype is {dtype}, which takes"
        raise ValueError(
            f"`train` has {part!r}, which means {join(site.name, key)!r} and nothing that can train: {reason} no "
            f"gradient. {_instead(survey, part)}"
        )
    return kept


def _takes_gradient(module: nn.Module, key: str) -> bool:
    parameter = module._parameters[key]
    is_number = parameter is not None and (parameter.is_floating_point() or parameter.is_complex())
    return is_number and not stores_codes(module, key)


def _head(survey: Survey) -> list[Place]:
    """The parameters of the one output head.

    Raises:
        ValueError: if there is none or several.
    """
    modules = survey.by_name
    heads = list(dict.fromkeys(_whole_head(name, modules) for name in _ends(survey)))
    if not heads:
        raise ValueError(
            f"`train='head'` found no output head in {type(survey.model).__name__}. {_instead(survey, 'head')}"
        )
    if len(heads) > 1:
        listed = ", ".join(f"`{name}`" for name in heads)
        raise ValueError(
            f"`train='head'` found {len(heads)} output heads in {type(survey.model).__name__}: {listed}. Name those to "
            f"train in a list, as in train={heads[:1]!r}."
        )
    return [(site, key) for site, key in _every(survey) if any(f"{n}.".startswith(f"{heads[0]}.") for n in site.names)]


def _ends(survey: Survey) -> list[str]:
    """The output heads; where no name says what they are, all linear layers after the last block of a transformer."""
    roles, heads = roles_in(survey), output_heads(survey)
    if roles.heads or not heads:
        return heads
    places = {name: place for place, name in enumerate(survey.by_name)}
    blocks = [places[name] for name in (*roles.attention, *roles.mlp)]
    after = [name for name in roles.linear if places[name] > max(blocks, default=len(places))]
    return after or heads


def _whole_head(layer: str, modules: dict[str, nn.Module]) -> str:
    """The module that is the head: of a classifier of several layers that is all of it, else the layer."""
    container = head_container(layer, modules)
    return container if container is not None and leaf_is(container, CLASSIFIER) else layer


def _instead(survey: Survey, part: str) -> str:
    """What to write where ``part`` means nothing."""
    others = [word for word in ("bias", "norm") if any(word != part and is_part(word, *p) for p in _every(survey))]
    last = next((site.name for site in reversed(survey.sites.values()) if site.name and site.module._parameters), "")
    if not last:
        return "It has no parameter of its own in a module with a name."
    if not others:
        return f"Name what to train in a list, as in train=[{last!r}]."
    return f"Take train={others[0]!r}, or name what to train in a list, as in train=[{last!r}]."


def _unmatched(survey: Survey, pattern: str) -> str:
    names = [name for name in survey.sites if name] + [join(site.name, key) for site, key in _every(survey)]
    close = ", ".join(f"`{name}`" for name in nearest(pattern, names)) or "none"
    hint = " A `re:` pattern must match the whole name." if pattern.startswith("re:") else ""
    alone = [name for name in survey.sites if name and matches(name, pattern)]
    if alone:
        return f"`train` has {pattern!r}, which names `{alone[0]}`, and that has no parameter."
    return f"`train` has {pattern!r}, which matches no module and no parameter. The nearest names are {close}.{hint}"
