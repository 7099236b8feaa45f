"""The dry run for the configuration of any method: what would be added and what would train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig, MethodConfig
from lightning_lora.distributed.sharded import shape_of
from lightning_lora.layers.adapted import Adapted, added_to
from lightning_lora.layers.registry import original_class
from lightning_lora.methods.added import AddedMethod
from lightning_lora.methods.known import method_of
from lightning_lora.model.freeze import adapter_parameters, trains
from lightning_lora.model.report.plan import Plan, plan_lora
from lightning_lora.model.report.table import bytes_text, trained_in_full
from lightning_lora.names import counted, folded
from lightning_lora.targets.survey import Survey


@dataclass(frozen=True)
class MethodPlan:
    """What a method that is no LoRA would do; printed it is a list.

    Args:
        method: its key.
        added: number of parameters that each site would get, by the name of the site.
        kinds: the class of each site.
        in_full: parameters of the base that would train, with their sizes.
        base: number of parameters of the model.
    """

    method: str
    added: dict[str, int]
    kinds: dict[str, str]
    in_full: dict[str, int]
    base: int

    def trained(self) -> int:
        """Number of parameters that would train."""
        return sum(self.added.values()) + sum(self.in_full.values())

    def __str__(self) -> str:
        """The sites, what would train in full, and the totals; what differs by a number shares a line."""
        groups: dict[tuple[str, str], list[int]] = {}
        for name, size in self.added.items():
            groups.setdefault((folded(name), self.kinds[name]), []).append(size)
        lines = [
            f"  {name or '(the model)'}  {counted(len(sizes), 'module')}  {kind}  {counted(sum(sizes), 'parameter')}"
            for (name, kind), sizes in groups.items()
        ]
        head = [f"A {self.method} would be added to", *lines] if lines else []
        words = "and train in full" if lines else "Of the model's own parameters would train"
        trained, share = counted(self.trained(), "trainable parameter"), self.trained() / max(1, self.base)
        total = f"{trained}, {share:.2%} of the base's {self.base:,}; {bytes_text(4 * self.trained())} in fp32"
        return "\n".join([*head, *trained_in_full(self.in_full, words), total])

    __repr__ = __str__


def plan(model: nn.Module, config: Any) -> Plan | MethodPlan:
    """What :func:`~lightning_lora.adapt` would do to ``model``, which is not changed and may be on the meta device.

    Args:
        model: any module, with all that will be adapted.
        config: of any method, or the callback that holds it.

    Returns:
        A list that can be printed; for a LoRAConfig the table of :func:`~lightning_lora.plan_lora`.

    Raises:
        ValueError: where ``adapt`` would raise: what is asked for is not there or cannot be adapted.
        TypeError: if ``config`` is neither.

    Example:
        >>> from lightning_lora import TuneConfig
        >>> print(plan(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), TuneConfig("bias")))
        Of the model's own parameters would train: *.bias (10)
        10 trainable parameters, 26.32% of the base's 38; 40 B in fp32
    """
    asked: MethodConfig = getattr(config, "config", config)
    if isinstance(asked, LoRAConfig):
        return plan_lora(model, config)
    method = method_of(asked)
    assert isinstance(method, AddedMethod)
    method.check_same(model)
    survey = Survey(model)
    added, in_full = would_train(method, survey)
    present = adapter_parameters(survey)
    base = sum(shape_of(parameter).numel() for _, parameter in survey.parameters() if id(parameter) not in present)
    kinds = {name: original_class(survey.by_name[name]).__name__ for name in added}
    return MethodPlan(method.key, added, kinds, in_full, base)


def would_train(method: AddedMethod, survey: Survey) -> tuple[dict[str, int], dict[str, int]]:
    """The number of parameters that each site has or would get, and the sizes of those of the base that train."""
    sites, in_base = method.checked_sites(survey)
    fresh = {name: site for name, site in sites.items() if not isinstance(site, Adapted)}
    present = {name: added_to(site) for name, site in sites.items() if isinstance(site, Adapted)}
    children = {**present, **method.children(survey, fresh)}
    added = {name: sum(parameter.numel() for parameter in children[name].parameters()) for name in sites}
    asked = {id(module._parameters[key]) for module, key in in_base} | {
        id(site.module._parameters[key])
        for name, site in survey.sites.items()
        for key in site.module._parameters
        if trains(site, key, name in sites, method.config)
    }
    in_full = {name: shape_of(parameter).numel() for name, parameter in survey.parameters() if id(parameter) in asked}
    return added, in_full
