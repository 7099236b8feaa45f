"""The answers that are the same for all methods: they are read from the records and from the adapted modules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator

from torch import nn
from typing_extensions import override

from lightning_lora.config import MethodConfig
from lightning_lora.methods.base import Method
from lightning_lora.model.apply import drop_added, remove
from lightning_lora.model.copies import has_copies, make_base, make_plain
from lightning_lora.model.freeze import freeze, trained_parameters
from lightning_lora.model.journal import all_or_nothing
from lightning_lora.model.record import config_of
from lightning_lora.model.state import base_names, frozen_names, needed_names


class RecordedMethod(Method):
    """Base of the methods: what they remember of a model stands in the records of its modules."""

    @abstractmethod
    def meant(self, model: nn.Module) -> set[int]:
        """The ``id`` of each module in ``model`` that the configuration means."""

    @override
    def present(self, model: nn.Module) -> MethodConfig | None:
        return config_of(model)

    @override
    def make_plain(self, model: nn.Module, known: Iterable[nn.Module]) -> list[str]:
        return make_plain(model, known, mark=True) if has_copies(model, known) else []

    @override
    def make_plain_unless_meant(self, model: nn.Module, known: Iterable[nn.Module]) -> None:
        if has_copies(model, known):
            make_plain(model, known, self.meant(model))

    @override
    def make_base_unless_meant(self, model: nn.Module, known: Iterable[nn.Module]) -> None:
        if has_copies(model, known):
            make_base(model, known, self.meant(model))

    @override
    def drop(self, model: nn.Module) -> None:
        drop_added(model)

    @override
    def remove(self, model: nn.Module) -> None:
        all_or_nothing(model, lambda journal: remove(model, journal))

    @override
    def trained_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return trained_parameters(model)

    @override
    def freeze(self, model: nn.Module) -> None:
        freeze(model, self.config)

    @override
    def needed_names(self, model: nn.Module) -> list[str]:
        return needed_names(model)

    @override
    def frozen_names(self, model: nn.Module) -> set[str]:
        return frozen_names(model)

    @override
    def base_names(self, model: nn.Module) -> set[str]:
        return base_names(model)
