"""One walk of a model: every module once, with all its names. Targets, plan and injection read this list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.distributed.sharded import local_shard
from lightning_lora.layers.adapted import Adapted, added_to
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.weight_reads import WeightReads
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.names import clean, every_module, is_wrapper, join


@dataclass(frozen=True)
class Site:
    """A module of the user's model, and what a configuration wants of it.

    Args:
        names: all clean names of the module, the first one first.
        module: the module.
        parts: the matrices to adapt in it.
        why: the preset or pattern that chose it, for people.
        refusal: why it cannot be adapted, as the end of a sentence about it; ``None`` where it can.
    """

    names: list[str]
    module: nn.Module
    parts: list[WeightPart] = field(default_factory=list)
    why: str = ""
    refusal: str | None = None

    @property
    def name(self) -> str:
        """The first clean name."""
        return self.names[0]

    def names_of(self, part: WeightPart) -> list[str]:
        """All names of a matrix in the module, those of the module last: a pattern may mean either."""
        return [join(name, part.name) for name in self.names if part.name] + self.names


class Survey:
    """The modules of ``model`` at the time of the survey.

    Adapters that are put on or taken off later do not change a survey. Take a new one after modules or parameters were
    replaced.

    Args:
        model: any module.

    Attributes:
        walk: what ``model.named_modules`` gives, each module under all its names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.walk: list[tuple[str, nn.Module]] = every_module(model)

    @cached_property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """Every module once, under the first name that torch gives it; wrappers and adapters too."""
        first: dict[int, tuple[str, nn.Module]] = {}
        for name, module in self.walk:
            first.setdefault(id(module), (name, module))
        return list(first.values())

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Every module of the user's by its first clean name: no wrapper, and nothing that a method added."""
        added = {id(inner) for module in self.adapted() for inner in added_to(module).modules()}
        sites: dict[int, Site] = {}
        for name, module in self.walk:
            if id(module) not in added and not is_wrapper(module):
                sites.setdefault(id(module), Site([], module)).names.append(clean(name))
        return {site.name: site for site in sites.values()}

    @cached_property
    def by_name(self) -> dict[str, nn.Module]:
        """The modules of ``sites`` by first clean name."""
        return {name: site.module for name, site in self.sites.items()}

    @cached_property
    def reads(self) -> WeightReads:
        """What the code of the model reads of its layers."""
        return WeightReads(self.by_name)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, under its first clean name, in the order of ``model.named_parameters``."""
        seen: set[int] = set()
        for name, module in self.modules:
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield join(clean(name), key), parameter

    def is_shared(self, module: nn.Module, key: str) -> bool:
        """Whether another module has the parameter ``key`` of ``module`` too, or one in the same memory."""
        return self._holders[memory_of(module, key)] > 1

    @cached_property
    def _holders(self) -> Counter[tuple[int, bool]]:
        return Counter(memory_of(module, key) for _, module in self.modules for key in module._parameters)

    def adapted(self) -> list[Adapted]:
        """The modules that are adapted now, by whatever method."""
        return [module for _, module in self.modules if isinstance(module, Adapted)]

    def layers(self) -> list[LoRALayer]:
        """The modules that LoRA adapts now."""
        return [module for _, module in self.modules if isinstance(module, LoRALayer)]

    def around(self, inside: Iterable[nn.Module]) -> dict[int, nn.Module]:
        """By ``id``: every module that is one of ``inside``, or that one of these lies in."""
        at, wanted = dict(self.walk), set(map(id, inside))
        paths = (name.split(".") if name else [] for name, module in self.walk if id(module) in wanted)
        around = (at[".".join(path[:length])] for path in paths for length in range(len(path) + 1))
        return {id(module): module for module in around}

    def around_layers(self) -> dict[int, nn.Module]:
        """By ``id``: every module that LoRA adapts now, and every module that such a one lies in."""
        return self.around(self.layers())


def survey_of(model: nn.Module | Survey) -> Survey:
    """The survey of ``model``, which may be a survey already: several steps of one injection share it."""
    return model if isinstance(model, Survey) else Survey(model)


def memory_of(module: nn.Module, key: str) -> tuple[int, bool]:
    """A value that two parameters have in common only if they are one object or one memory."""
    parameter = module._parameters[key]
    if parameter is None or parameter.is_meta or is_lazy(parameter) or not local_shard(parameter).data_ptr():
        return (id(parameter), False)
    return (local_shard(parameter).data_ptr(), True)
