"""The sublayers that get a bottleneck, by placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_lora.methods.bottleneck.config import BottleneckConfig
from lightning_lora.methods.bottleneck.places import AtSite, Entry, MLPEntry, PassedInput
from lightning_lora.methods.fast_paths import Host
from lightning_lora.names import covers
from lightning_lora.targets.blocks import Sublayer, Sublayers, sublayers_in
from lightning_lora.targets.problems import raise_refusals
from lightning_lora.targets.survey import Survey

NEEDS = {
    "houlsby": ("attention", "MLP"),
    "pfeiffer": ("MLP",),
    "parallel": ("MLP",),
    "block": ("module that holds the attention and the MLP of a block",),
}


def find_sites(survey: Survey, config: BottleneckConfig) -> list[Sublayer]:
    """The sublayers of the model that get a bottleneck, in an order that depends on nothing but the model.

    Raises:
        ValueError: if the model has no such sublayer, or one that cannot be used.
    """
    kinds = _kinds(sublayers_in(survey), config.placement)
    for name, kind in kinds.items():
        if not kind:
            raise ValueError(_nothing(survey, config, name))
    sublayers = [sublayer for kind in kinds.values() for sublayer in kind if not _left_out(sublayer, survey, config)]
    if not sublayers:
        by = [f"`{key}={value!r}`" for key in ("exclude", "also_train") if (value := getattr(config, key))]
        raise ValueError(f"`placement={config.placement!r}` finds only modules that {' or '.join(by)} leave out.")
    raise_refusals({sublayer.output: sublayer.refusal for sublayer in sublayers})
    return sublayers


def _kinds(sublayers: Sublayers, placement: str) -> dict[str, Sequence[Sublayer]]:
    found = {"attention": sublayers.attention, "MLP": sublayers.mlp, NEEDS["block"][0]: sublayers.blocks}
    return {name: found[name] for name in NEEDS[placement]}


def _left_out(sublayer: Sublayer, survey: Survey, config: BottleneckConfig) -> bool:
    patterns = [*(config.exclude or ()), *(config.also_train or ())]
    return any(covers(name, patterns) for name in survey.sites[sublayer.output].names)


def _nothing(survey: Survey, config: BottleneckConfig, missing: str) -> str:
    model = type(survey.model).__name__
    sublayers = sublayers_in(survey)
    others = [placement for placement in NEEDS if all(_kinds(sublayers, placement).values())]
    advice = (
        f"Take placement={others[0]!r}, for which it has all."
        if others
        else "LoRACallback(targets='all') adapts any linear layer, whatever it is for."
    )
    return f"`placement={config.placement!r}` found no {missing} in {model}. {advice}"


def entries(
    survey: Survey, sublayers: Mapping[str, Sublayer], key: str, entry_class: type[MLPEntry]
) -> dict[str, Host]:
    """The first layers of MLPs whose last layers are adapted in parallel placement, as hosts.

    Args:
        survey: of the model.
        sublayers: the MLPs by the name of their last layer, which is adapted already.
        key: of the method.
        entry_class: the class for the first layer, with the key of the method.
    """
    hosts: dict[str, Host] = {}
    for name, sublayer in sublayers.items():
        child = survey.by_name[name]._modules.get(key)  # a copy that came in later stays plain
        if isinstance(child, AtSite) and sublayer.input != name and child.passed is None:
            child.passed = PassedInput()
            hosts[sublayer.input] = entry_class, Entry(child.passed)
    return hosts
