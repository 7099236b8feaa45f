"""Injection: adapters for the sites that a configuration means, and what makes the model around them work."""

from __future__ import annotations

from lightning_lora.config import LoRAConfig
from lightning_lora.distributed.sharded import shape_of
from lightning_lora.layers.adapted import has_added
from lightning_lora.layers.adapter import Adapter, Adapters, Pairs, seed_of
from lightning_lora.layers.base import LoRALayer, parameter_of, set_adapters
from lightning_lora.layers.linear import LinearAdapter, LoRALinear
from lightning_lora.layers.registry import adapted_class, adapted_class_for, host_base
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.model.adapter_loading import accept_adapters
from lightning_lora.model.hooks import equip
from lightning_lora.model.record import record_of
from lightning_lora.model.sum_groups import group_sums
from lightning_lora.model.twins import Agree, own_answer, seed_names
from lightning_lora.names import join
from lightning_lora.ops.shared_input import SharedInputGroup
from lightning_lora.targets.resolve import Targets
from lightning_lora.targets.role_names import family_of
from lightning_lora.targets.survey import Site, Survey


def inject(targets: Targets, config: LoRAConfig, agree: Agree = own_answer, compute: str = "auto") -> None:
    """Adapt those of ``targets`` that are not adapted yet, in place, and freeze the rest of their model.

    Args:
        targets: from :func:`lightning_lora.targets.resolve.find_targets`, called on the model as it is now.
        config: the same configuration.
        agree: gives the answer of rank 0 on every rank, where several of them inject.
        compute: the side of the equation: ``"auto"``, ``"activations"`` or ``"weights"``.

    Raises:
        ValueError: if the adapter's name cannot be one; nothing is changed then.
    """
    _check_name_is_free(config.name)
    survey = targets.survey
    fresh = [site for site in targets.sites if not has_added(site.module)]
    twins = seed_names(survey, targets.sites, agree) if fresh else {}
    made = [(site, *_made(site, config, twins.get(site.name, site.name))) for site in fresh]
    for site in targets.sites:
        _renew_dropout(site, config)
    for site, cls, adapters in made:
        record_of(site.module).shared |= {part.key for part in site.parts if survey.is_shared(site.module, part.key)}
        record_of(site.module).adapted_by = config
        set_adapters(site.module, cls, adapters)
    _attach_hosts(survey)
    _share_inputs(survey)
    group_sums(survey, compute)
    record_of(survey.model).config = config
    equip(survey, config)
    accept_adapters(survey)


def _check_name_is_free(name: str) -> None:
    if hasattr(Adapters(), name):
        raise ValueError(
            f"`name` must not be an attribute of nn.ModuleDict, which holds the adapters, but got {name!r}."
        )


def _made(site: Site, config: LoRAConfig, seed_name: str) -> tuple[type[LoRALayer], Adapters]:
    """The class that the module gets, and its adapters: one pair, or one for each matrix that has a name."""
    cls = adapted_class_for(site.module, site.parts)
    pairs = {part.name: _new_adapter(site, part, cls, config, seed_name) for part in site.parts}
    return cls, Adapters({config.name: Pairs(pairs) if site.parts[0].name else pairs[""]})


def _new_adapter(site: Site, part: WeightPart, cls: type[LoRALayer], config: LoRAConfig, seed_name: str) -> Adapter:
    """A fresh pair for one matrix, on the device of its weight."""
    names, weight = site.names_of(part), parameter_of(site.module, part.key)
    in_features, out_features = part.features(weight)
    return cls.lora_adapter_class(
        in_features,
        out_features,
        r=config.rank_for(*names),
        alpha=config.alpha_for(*names),
        scale=config.scale_for(*names),
        dropout=config.dropout,
        init=config.init,
        seed=seed_of(config.seed, join(seed_name, part.name) if part.name else seed_name, config.name),
        part=part,
        stack=part.stack(weight),
        device=weight.device,
        **cls.lora_arguments(site.module),
    )


def _renew_dropout(site: Site, config: LoRAConfig) -> None:
    """``dropout`` is no part of a configuration's identity: a second run may change it."""
    for adapter in site.module.lora.all_pairs() if isinstance(site.module, LoRALayer) else []:
        adapter.dropout = config.dropout


def _attach_hosts(survey: Survey) -> None:
    """Swap the modules that read the weights of adapted layers inside them, so that they use the adapters."""
    around = survey.around_layers()
    for _, module in survey.modules:
        host = host_base(type(module))
        if host is not None and not isinstance(module, LoRALayer) and id(module) in around:
            set_adapters(module, adapted_class(type(module)), Adapters())


def _share_inputs(survey: Survey) -> None:
    """Let the adapters of one module's layers that mostly read the same input (q, k, v) share its products."""
    for _, parent in survey.modules:
        readers: dict[tuple[str, str, int], list[LinearAdapter]] = {}
        for key, child in parent.named_children():
            family = family_of(key)
            if family is None or not isinstance(child, LoRALinear):
                continue
            for name, adapter in child.lora.items():
                if isinstance(adapter, LinearAdapter):  # not a pair for some of the rows
                    readers.setdefault((family, name, shape_of(adapter.A)[-1]), []).append(adapter)
        for adapters in readers.values():
            siblings = SharedInputGroup(adapters) if len(adapters) > 1 else None
            for adapter in adapters:
                adapter.shared_input = siblings
