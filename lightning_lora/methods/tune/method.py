"""Training a part of a model as the method of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

from torch import nn
from typing_extensions import override

from lightning_lora.methods.added import AddedMethod
from lightning_lora.methods.base import Watched
from lightning_lora.methods.tune.config import TuneConfig
from lightning_lora.methods.tune.sites import tuned
from lightning_lora.model.report.random_heads import random_heads, warning_of
from lightning_lora.model.report.summary import describe_trained
from lightning_lora.targets.survey import Survey


class TuneMethod(AddedMethod):
    """The base with some parameters that train, all others frozen; nothing is added.

    Args:
        config: which train.

    Example:
        >>> method, model = TuneMethod(TuneConfig("bias")), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> method.complete(model)
        ['0', '1']
        >>> [name for name, _ in method.trained_parameters(model)]
        ['0.bias', '1.bias']
    """

    key: ClassVar[str] = "tune"
    config_class = TuneConfig
    config: TuneConfig

    @override
    def in_base(self, survey: Survey) -> Iterable[tuple[nn.Module, str]]:
        return [(site.module, key) for site, key in tuned(survey, self.config)]

    @override
    def main_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return self.trained_parameters(model)

    @override
    def watched(self, model: nn.Module) -> dict[str, Watched]:
        """Each trained parameter by its gradient alone: code may read it without a call of its module."""
        owners = {id(p): module for module in model.modules() for p in module._parameters.values() if p is not None}
        trained = self.trained_parameters(model)
        return {name: Watched(owners[id(parameter)], parameter, calls=()) for name, parameter in trained}

    @override
    def describe(self, model: nn.Module, save: str = "adapter") -> str:
        return describe_trained(model)

    @override
    def warnings(self, model: nn.Module) -> list[str]:
        heads = random_heads(model)
        return [warning_of(heads)] if heads else []

    @override
    def is_plain(self, model: nn.Module) -> bool:
        return True

    @override
    def never_merges(self, model: nn.Module) -> str | None:
        return "There is nothing to merge: the module holds the trained values."
