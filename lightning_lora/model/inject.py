"""Injection: adapters for the sites that a configuration means, and what makes the model around them work."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning_lora.config import LoRAConfig
from lightning_lora.distributed.sharded import shape_of
from lightning_lora.layers.adapted import Adapted
from lightning_lora.layers.adapter import Adapter, Pairs, seed_of
from lightning_lora.layers.adapters import Adapters
from lightning_lora.layers.base import LoRALayer, add_adapter, has_adapter, parameter_of, set_adapters
from lightning_lora.layers.linear import LinearAdapter, LoRALinear
from lightning_lora.layers.registry import adapted_class, adapted_class_for, host_base, takes_quantized_tensor
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.model.adapter_loading import accept_adapters
from lightning_lora.model.hooks import equip
from lightning_lora.model.record import record_of
from lightning_lora.model.sum_groups import group_sums
from lightning_lora.model.twins import Agree, own_answer, seed_names
from lightning_lora.names import join
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor
from lightning_lora.ops.shared_input import SharedInputGroup
from lightning_lora.targets.resolve import Targets
from lightning_lora.targets.role_names import family_of
from lightning_lora.targets.survey import Site, Survey


def inject(targets: Targets, config: LoRAConfig, agree: Agree = own_answer, compute: str = "auto") -> None:
    """As :func:`inject_each`, of one adapter."""
    inject_each([(targets, config)], agree, compute)


def inject_each(
    wanted: Sequence[tuple[Targets, LoRAConfig]],
    agree: Agree = own_answer,
    compute: str = "auto",
    kept: Collection[str] = (),
) -> None:
    """Adapt the targets that do not have their adapter yet, in place, and freeze the rest of their model.

    Args:
        wanted: for each adapter what :func:`lightning_lora.targets.resolve.find_targets` gives, called on the model as
            it is now with one survey for all, and its configuration, which names no several ones.
        agree: gives the answer of rank 0 on every rank, where several of them inject.
        compute: the side of the equation: ``"auto"``, ``"activations"`` or ``"weights"``.
        kept: the names of adapters that are there and do not train.

    Raises:
        ValueError: if the adapter's name cannot be one; nothing is changed then.
    """
    for _, config in wanted:
        _check_name_is_free(config.name)
    survey = wanted[0][0].survey
    made = [(site, config, child) for targets, config in wanted for site, child in _made(targets, config, agree)]
    for targets, config in wanted:
        _renew_dropout(targets, config)
    for site, config, child in made:
        record_of(site.module).shared |= {part.key for part in site.parts if survey.is_shared(site.module, part.key)}
        record_of(site.module).adapted_by[config.name] = config
        present = site.module.lora.all_pairs() if isinstance(site.module, LoRALayer) else []
        parts = [*(pair.part for pair in present), *site.parts]
        add_adapter(site.module, config.name, child, adapted_class_for(site.module, parts))
    _attach_hosts(survey)
    _attach_quantized(survey)
    _share_inputs(survey)
    group_sums(survey, compute)
    record = record_of(survey.model)
    record.configs |= {config.name: config for _, config in wanted}
    record.kept = set(kept)
    equip(survey, *record.configs.values())
    accept_adapters(survey)


def _check_name_is_free(name: str) -> None:
    if hasattr(Adapters(), name):
        raise ValueError(
            f"`name` must not be an attribute of nn.ModuleDict, which holds the adapters, but got {name!r}."
        )


def _made(targets: Targets, config: LoRAConfig, agree: Agree) -> list[tuple[Site, Adapter | Pairs]]:
    """For each module without the adapter: one pair, or one for each matrix that has a name."""
    fresh = [site for site in targets.sites if not has_adapter(site.module, config.name)]
    twins = seed_names(targets.survey, targets.sites, agree) if fresh else {}
    return [(site, _new_pairs(site, config, twins.get(site.name, site.name))) for site in fresh]


def _new_pairs(site: Site, config: LoRAConfig, seed_name: str) -> Adapter | Pairs:
    cls = adapted_class_for(site.module, site.parts)
    pairs = {part.name: _new_adapter(site, part, cls, config, seed_name) for part in site.parts}
    return Pairs(pairs) if site.parts[0].name else pairs[""]


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


def _renew_dropout(targets: Targets, config: LoRAConfig) -> None:
    """``dropout`` is no part of a configuration's identity: a second run may change it."""
    for site in targets.sites:
        if isinstance(site.module, LoRALayer) and has_adapter(site.module, config.name):
            for adapter in site.module.lora.pairs_of(config.name):
                adapter.dropout = config.dropout


def _attach_hosts(survey: Survey) -> None:
    """Swap the modules that read the weights of adapted layers inside them, so that they use the adapters."""
    around = survey.around_layers()
    for _, module in survey.modules:
        host = host_base(type(module))
        if host is not None and not isinstance(module, LoRALayer) and id(module) in around:
            set_adapters(module, adapted_class(type(module)), Adapters())


def _attach_quantized(survey: Survey) -> None:
    """Swap the linear layers with a quantized tensor that are no targets: gradients of other layers go through them."""
    for _, module in survey.modules:
        weight = module._parameters.get("weight")
        if is_quantized_tensor(weight) and not isinstance(module, Adapted) and takes_quantized_tensor(module):
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
