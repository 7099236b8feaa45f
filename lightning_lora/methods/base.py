"""The questions that a run asks of a method of fine-tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.config import MethodConfig
from lightning_lora.model.twins import Agree, own_answer


@dataclass(frozen=True)
class Watched:
    """One added module, for the check that it runs and learns.

    Args:
        module: the added module.
        parameter: its parameter that must have a gradient after the first backward pass.
        calls: the methods of ``module`` of which a forward pass calls at least one.
        weight: the name of the base's parameter that it adapts, which an error can advise to name; empty where there
            is none.
        shared: whether ``parameter`` gets a gradient from other modules too, so that only a call tells of this one.
        adapter: which of several adapters it belongs to; empty where there is one.
    """

    module: nn.Module
    parameter: nn.Parameter
    calls: tuple[str, ...] = ("forward",)
    weight: str = ""
    shared: bool = False
    adapter: str = ""


class Method(ABC):
    """A method of fine-tuning with its configuration; the model is an argument of every function.

    A method adds parameters to a model and freezes the rest. Nothing about one model is kept here: what a method must
    remember of a model stands on the model's modules, so that it travels with a copy of the model.

    "The base" below is the model as the user built it. A model is "adapted" while the method acts in its forward, and
    "merged" while the update is in the base's weights and can be taken out again.

    Args:
        config: the arguments.

    Attributes:
        key: the word for the method in parameter names, ``<site>.<key>.<name>``, and in logged hyperparameters.
    """

    key: ClassVar[str]
    reads_weights_by_name: ClassVar[bool] = False  # wherever code reads them, so that they must be whole parameters

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    # The configuration.

    @abstractmethod
    def difference(self, other: MethodConfig) -> str | None:
        """The first argument in which ``other`` means another model, as ``r=4 instead of r=8``.

        Arguments that change no shape, no site and no formula (dropout, seed) are no difference.

        Returns:
            The difference, or ``None`` if there is none.
        """

    # The model before, during and after the run.

    @abstractmethod
    def check_same(self, model: nn.Module) -> None:
        """Raise if ``model`` is adapted or merged with another configuration, or by another method.

        Raises:
            ValueError: naming the first difference and the ways out.
        """

    @abstractmethod
    def present(self, model: nn.Module) -> MethodConfig | None:
        """The configuration that ``model`` is adapted or merged with; ``None`` for a base alone."""

    @abstractmethod
    def is_adapted(self, model: nn.Module) -> bool:
        """Whether the method acts in the forward of ``model``."""

    @abstractmethod
    def adapt(self, model: nn.Module, agree: Agree = own_answer) -> None:
        """Adapt the sites of ``model`` that exist already, and freeze the rest. Adapted sites stay as they are.

        For a model of which a part is built later: a site that is missing is no error yet. ``model`` is not merged.

        Args:
            model: any module.
            agree: gives the answer of rank 0 on every rank; what a method asks the weights may differ by rank.
        """

    @abstractmethod
    def complete(self, model: nn.Module, agree: Agree = own_answer) -> list[str]:
        """Adapt everything in ``model`` that the configuration means, and freeze the rest. Adapted sites stay.

        The first values of what may change (trained biases, buffers) are kept for :meth:`remove`. ``model`` is not
        merged. For the arguments see :meth:`adapt`.

        Returns:
            The names of the sites.

        Raises:
            ValueError: if something that was asked for is not there or cannot be adapted; nothing is changed then.
        """

    @abstractmethod
    def make_plain(self, model: nn.Module, known: Iterable[nn.Module]) -> list[str]:
        """Make plain the adapted modules that came into ``model`` as copies; what they compute stays.

        They are plain from then on, also where ``model`` is adapted again, and are no part of its base.

        Args:
            model: an adapted model.
            known: the modules that it had before.

        Returns:
            The names of the outermost copies.
        """

    @abstractmethod
    def make_plain_unless_meant(self, model: nn.Module, known: Iterable[nn.Module]) -> None:
        """Make plain those copies that the configuration does not mean, in a model that is adapted or merged.

        For the arguments see :meth:`make_plain`.
        """

    @abstractmethod
    def make_base_unless_meant(self, model: nn.Module, known: Iterable[nn.Module]) -> None:
        """As :meth:`make_plain_unless_meant`, but without a trained update: the copies are copies of the base then."""

    @abstractmethod
    def drop(self, model: nn.Module) -> None:
        """Take everything that the method added off ``model``; the values of the base's own parameters stay."""

    @abstractmethod
    def remove(self, model: nn.Module) -> None:
        """Make ``model`` what it was before :meth:`adapt`: every value, flag, class and key, merged or not."""

    @abstractmethod
    def describe(self, model: nn.Module, save: str = "adapter") -> str:
        """What is adapted, what trains, what stays frozen and what files hold, as lines for the start of a run.

        Args:
            model: an adapted model.
            save: what the checkpoints of the run hold, as the argument of the callback.
        """

    def warnings(self, model: nn.Module) -> list[str]:
        """What is likely to be meant otherwise, for the start of a run that loaded nothing; ``model`` is adapted."""
        return []

    # What trains.

    @abstractmethod
    def added_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that the method added, with their names; those of a merged model too."""

    def main_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that the method is about: those that it added, or the base's own where it adds none."""
        return self.added_parameters(model)

    @abstractmethod
    def trained_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything that trains, with its name: the added parameters and the base's own that were asked for."""

    @abstractmethod
    def adapted_weights(self, model: nn.Module) -> dict[int, tuple[str, nn.Parameter]]:
        """For each added parameter, by ``id``, the name and the parameter of the base that it adapts.

        An optimizer trains an added parameter in the group of that weight. Empty where a method adapts no weight.
        """

    @abstractmethod
    def freeze(self, model: nn.Module) -> None:
        """Set every ``requires_grad`` of an adapted ``model`` to what the method trains."""

    @abstractmethod
    def as_found(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the ``with`` block ``model`` looks as without the method: ``requires_grad``, and no update in weights.

        For the user's ``configure_optimizers``, which may choose by ``requires_grad`` or by identity.
        """

    @abstractmethod
    def is_untrained(self, model: nn.Module) -> bool:
        """Whether the added parameters still have the values that they start from."""

    @abstractmethod
    def watched(self, model: nn.Module) -> dict[str, Watched]:
        """Every added module under the name of its site."""

    def copies(self, model: nn.Module) -> dict[str, str]:
        """The adapted layers that start as bit-equal copies of another one, with the name of that."""
        return {}

    # What a file holds.

    @abstractmethod
    def state(self, model: nn.Module) -> dict[str, Any]:
        """All that a checkpoint must hold, by clean name: what trains, and buffers that changed.

        The tensors are the model's own memory.
        """

    @abstractmethod
    def load(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state` gave: everything, or nothing at all.

        Raises:
            ValueError: naming the first key that is missing, unknown or of another shape.
        """

    @abstractmethod
    def needed_names(self, model: nn.Module) -> list[str]:
        """The keys that every state of ``model`` has."""

    @abstractmethod
    def frozen_names(self, model: nn.Module) -> set[str]:
        """The names, under every alias, of the parameters that no file holds: they neither train nor change."""

    @abstractmethod
    def base_names(self, model: nn.Module) -> set[str]:
        """The keys of the full state dict that no file of the method holds: frozen parameters, unchanged buffers."""

    # The end of a run, for methods that merge.

    def is_merged(self, model: nn.Module) -> bool:
        """Whether the update is in the base's weights now."""
        return False

    def is_plain(self, model: nn.Module) -> bool:
        """Whether ``model`` computes what it does now without this package, from its state dict alone."""
        return self.is_merged(model)

    def never_merges(self, model: nn.Module) -> str | None:
        """Why the weights of ``model`` cannot hold the merged update at all; ``None`` where they can."""
        return "The method has no update of the weights."

    def cannot_write(self, model: nn.Module) -> str | None:
        """Why the weights cannot take the update where they are, though a file of merged weights could be written."""
        return None

    def merged_as(self, model: nn.Module) -> Any:
        """How the update is in the weights of ``model`` now, for :meth:`merge`; ``None`` where there is one way."""
        return None

    def merge(self, model: nn.Module, device: torch.device | None = None, like: Any = None) -> dict[str, float]:
        """Put the update into the base's weights; :meth:`unmerge` takes it out bit for bit.

        Args:
            model: any module; its weights stay where they are.
            device: where to compute, one weight at a time; the bits are the same on each.
            like: what :meth:`merged_as` gave of another merge.

        Returns:
            For each site the share of the update's norm that rounding to the weight's dtype lost.

        Raises:
            ValueError: if the method cannot be merged, or this ``model`` cannot.
        """
        raise ValueError(f"`{self.key}` cannot be merged into the weights: leave it on the model.")

    def unmerge(self, model: nn.Module, device: torch.device | None = None) -> None:
        """Take a merged update out of the weights: the method acts again. For the arguments see :meth:`merge`.

        Raises:
            ValueError: if ``model`` is not merged, or its weights were changed since.
        """
        raise ValueError(f"`{self.key}` is never merged into the weights.")

    def merged_values(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The state dict of the merged model, one tensor at a time, nothing in ``model`` changed; all ranks call it."""
        raise ValueError(f"`{self.key}` cannot be merged into the weights: save the model with its {self.key}.")

    def merged_state(
        self, model: nn.Module, state: Mapping[str, Any], adapter: Mapping[str, Any], names: Mapping[str, str]
    ) -> dict[str, Any]:
        """The state dict of the merged model, made from ``state`` and marked with ``adapter``; ``model`` stays.

        Args:
            model: an adapted or merged model with all weights on this rank.
            state: a state dict of it.
            adapter: values of what :meth:`state` gives, which may be others than those in ``model``.
            names: for each key of ``state`` its name in ``model``, as a hook may have renamed it.

        Raises:
            ValueError: if the method cannot be merged, or ``state`` lacks an adapted weight.
        """
        raise ValueError(f"`{self.key}` cannot be merged into the weights: save the model with its {self.key}.")
