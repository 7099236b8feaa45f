"""Methods that add a module to some modules of a model, or train some of its own parameters, and freeze the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_lora.config import MethodConfig
from lightning_lora.files.json_files import printable
from lightning_lora.layers.adapted import Adapted, adapted_modules, added_to, has_added, not_swappable, swap_in
from lightning_lora.layers.adapter import seed_of
from lightning_lora.layers.restoring import Restoring, Undo
from lightning_lora.methods.added_config import AddedConfig
from lightning_lora.methods.base import Watched
from lightning_lora.methods.recorded import RecordedMethod
from lightning_lora.model.adapter_loading import accept_adapters
from lightning_lora.model.freeze import unfreeze
from lightning_lora.model.hooks import equip
from lightning_lora.model.initial_values import is_trained, remember, remember_added
from lightning_lora.model.journal import Journal, all_or_nothing
from lightning_lora.model.loading import load_trained_state
from lightning_lora.model.record import config_of, configs_of, is_plain_copy, record_of
from lightning_lora.model.report.summary import describe_added
from lightning_lora.model.same_config import check_method
from lightning_lora.model.state import (
    added_parameters,
    trained_state,
)
from lightning_lora.model.twins import Agree, own_answer
from lightning_lora.targets.problems import raise_refusals
from lightning_lora.targets.resolve import useless_patterns
from lightning_lora.targets.survey import Survey


class AddedMethod(RecordedMethod):
    """Base of the methods: a sub-class says where something is added, and what.

    What is added stays a child of the module that it was added to, under the method's key. It is no sub-class's task to
    freeze, save, load, watch or remove.

    Args:
        config: the arguments.
    """

    config_class: ClassVar[type[AddedConfig]]
    config: AddedConfig

    # What a sub-class answers.

    def sites(self, survey: Survey) -> dict[str, nn.Module]:
        """The modules to adapt, by first clean name; those that are adapted already are among them.

        Raises:
            ValueError: if there is none, or one that cannot be adapted, with the reason.
        """
        return {}

    def mixin(self, module: nn.Module) -> type[Adapted]:
        """The class that ``module`` gets in addition to its own."""
        raise NotImplementedError

    def new(self, name: str, module: nn.Module, seed: int) -> nn.Module:
        """What is added to ``module``, with its initial values, in fp32 and on the device of ``module``.

        Args:
            name: of the module.
            module: not adapted yet; it may be on the meta device.
            seed: for a generator of its own: the global random stream is neither read nor advanced.
        """
        raise NotImplementedError

    def hosts(self, survey: Survey) -> Mapping[str, tuple[type[Adapted], nn.Module]]:
        """Modules that get another class though nothing that trains is added to them, once the sites are adapted.

        Returns:
            By first clean name the mixin and a child without parameters; a module that is adapted already stays.
        """
        return {}

    def children(self, survey: Survey, fresh: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """What is added to each of the ``fresh`` modules, by name. Override it where one child depends on others."""
        return {name: self.new(name, site, self.seed_of(name)) for name, site in fresh.items()}

    def connect(self, survey: Survey) -> None:
        """Called when all modules are adapted: what their children hold in common is set here."""

    def in_base(self, survey: Survey) -> Iterable[tuple[nn.Module, str]]:
        """Parameters of the base that train, each as a module and the key in it, but for those the config names.

        Raises:
            ValueError: if something that was asked for is not there.
        """
        return ()

    def check(self, model: nn.Module) -> None:
        """Raise for a ``model`` in which the method cannot work, whatever its sites are.

        Raises:
            ValueError: with the reason.
        """

    # The configuration.

    @override
    def difference(self, other: MethodConfig) -> str | None:
        if not isinstance(other, type(self.config)):
            return f"a {type(other).__name__} instead of a {type(self.config).__name__}"
        return self.config.difference(other)

    # The model before, during and after the run.

    @override
    def check_same(self, model: nn.Module) -> None:
        survey = Survey(model)
        check_method(survey, self.config)
        for present in configs_of(survey).values():
            difference = None if not isinstance(present, AddedConfig) else present.difference(self.config)
            if difference is not None:
                raise ValueError(
                    f"The model is adapted by a {type(present).__name__} already, and this asks for "
                    f"{printable(difference, 1300)}. To start over on the original base call `remove_adapted(model)`; "
                    "to keep what was trained in the model's own weights as the new base call `remove_adapted(model, "
                    "keep=True)`; to continue, ask for the same."
                )

    @override
    def is_adapted(self, model: nn.Module) -> bool:
        return config_of(model) is not None

    @override
    def adapt(self, model: nn.Module, agree: Agree = own_answer) -> None:
        try:
            self.complete(model, agree)
        except ValueError:  # a part of the model may be built later
            return

    @override
    def complete(self, model: nn.Module, agree: Agree = own_answer) -> list[str]:
        return all_or_nothing(model, lambda journal: self._complete(model))

    def checked_sites(self, survey: Survey) -> tuple[dict[str, nn.Module], list[tuple[nn.Module, str]]]:
        """The sites, and the parameters of the base that train; what cannot work is refused here."""
        self.check(survey.model)
        useless = useless_patterns(survey, self.config)
        if useless:
            raise ValueError("\n".join(useless))
        sites = {name: site for name, site in self.sites(survey).items() if not is_plain_copy(site)}
        self._check_meant(survey, sites)
        fresh = ((name, site) for name, site in sites.items() if not isinstance(site, Adapted))
        raise_refusals({name: not_swappable(site, self.key) for name, site in fresh})
        return sites, [(module, key) for module, key in self.in_base(survey) if not is_plain_copy(module)]

    def _complete(self, model: nn.Module) -> list[str]:
        survey = Survey(model)
        sites, in_base = self.checked_sites(survey)
        fresh = {name: site for name, site in sites.items() if not isinstance(site, Adapted)}
        children = self.children(survey, fresh)
        for module, key in in_base:
            record_of(module).trained.add(key)
            record_of(module).adapted_by[self.config.name] = self.config
        for name, site in fresh.items():
            record_of(site).adapted_by[self.config.name] = self.config
            swap_in(site, self.mixin(site), children[name])
        for name, (mixin, child) in self.hosts(survey).items():
            if not isinstance(survey.by_name[name], Adapted):
                swap_in(survey.by_name[name], mixin, child)
        self.connect(survey)
        record_of(model).configs = {self.config.name: self.config}
        survey = Survey(model)
        equip(survey, self.config)
        accept_adapters(survey)
        remember(survey)
        remember_added(survey)
        return list(sites) or self._names(survey, in_base)

    def _check_meant(self, survey: Survey, sites: Mapping[str, nn.Module]) -> None:
        """Raise if a module is adapted that the configuration does not mean in this model, as it did in another."""
        meant = set(map(id, sites.values()))
        added = ((name, module) for name, module in adapted_modules(survey.model) if has_added(module))
        stray = next((name for name, module in added if id(module) not in meant), None)
        if stray is not None:
            raise ValueError(
                f"`{stray}` has a {self.key}, and in this model the configuration does not mean it: it was adapted as "
                "a part of another model. To take it off call `remove_adapted` with that module."
            )

    def seed_of(self, name: str) -> int:
        """The seed of what is added to the site ``name``."""
        return seed_of(self.config.seed, name, self.key)

    @staticmethod
    def _names(survey: Survey, in_base: Iterable[tuple[nn.Module, str]]) -> list[str]:
        trained = {id(module) for module, _ in in_base}
        return [name for name, site in survey.sites.items() if id(site.module) in trained]

    @override
    def meant(self, model: nn.Module) -> set[int]:
        survey = Survey(model)
        return {*map(id, self.sites(survey).values()), *(id(module) for module, _ in self.in_base(survey))}

    @override
    def describe(self, model: nn.Module, save: str = "adapter") -> str:
        return describe_added(model, self.key)

    # What trains.

    @override
    def added_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return added_parameters(model)

    @override
    def adapted_weights(self, model: nn.Module) -> dict[int, tuple[str, nn.Parameter]]:
        return {}

    @override
    def as_found(self, model: nn.Module) -> AbstractContextManager[None]:
        def change(undo: Undo) -> None:
            undo.append(partial(self.freeze, model))
            unfreeze(model)

        return Restoring(change)

    @override
    def is_untrained(self, model: nn.Module) -> bool:
        return not is_trained(model)

    @override
    def watched(self, model: nn.Module) -> dict[str, Watched]:
        return {name: self.watch(module) for name, module in adapted_modules(model) if has_added(module)}

    def watch(self, module: Adapted) -> Watched:
        """What of one adapted module is watched: by default its child, by the first parameter that trains."""
        child = added_to(module)
        return Watched(child, next(parameter for parameter in child.parameters() if parameter.requires_grad))

    # What a file holds.

    @override
    def state(self, model: nn.Module) -> dict[str, Any]:
        return trained_state(model)

    @override
    def load(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        def change(journal: Journal) -> None:
            load_trained_state(model, state, journal)

        all_or_nothing(model, change)

    @override
    def never_merges(self, model: nn.Module) -> str | None:
        return f"A {self.key} cannot be merged into the weights: the module keeps it."
