"""Prompt tuning as a method of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_lora.layers.adapted import Adapted
from lightning_lora.methods.added import AddedMethod
from lightning_lora.methods.fast_paths import Host
from lightning_lora.methods.prompt.config import PromptConfig
from lightning_lora.methods.prompt.layer import Passage, Prompt, PromptBlock, PromptEncoder
from lightning_lora.methods.prompt.sites import Place, facts_of, find_places
from lightning_lora.targets.role_names import around
from lightning_lora.targets.survey import Survey


class PromptMethod(AddedMethod):
    """Trained vectors before the tokens (Lester et al. 2021, arXiv 2104.08691).

    Args:
        config: how many, and before which blocks.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)])})
        >>> PromptMethod(PromptConfig(length=3)).complete(model)
        ['layers.0']
        >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
        [('layers.0.prompt.vectors', (3, 8))]
    """

    key: ClassVar[str] = "prompt"
    config_class = PromptConfig
    config: PromptConfig

    def __init__(self, config: PromptConfig) -> None:
        super().__init__(config)
        # Of the survey that `sites` saw last, for `new` and `hosts`.
        self._places: dict[str, Place] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    @override
    def sites(self, survey: Survey) -> dict[str, nn.Module]:
        self._places = find_places(survey, self.config)
        fresh = {name: block for name in self._places if not isinstance(block := survey.by_name[name], Adapted)}
        self._facts = {name: facts_of(name, block, survey) for name, block in fresh.items()}
        return {name: survey.by_name[name] for name, place in self._places.items() if place.first}

    @override
    def mixin(self, module: nn.Module) -> type[Adapted]:
        return PromptBlock

    @override
    def new(self, name: str, module: nn.Module, seed: int) -> nn.Module:
        place = self._places[name]
        return Prompt(
            name,
            features=place.features,
            seed=seed,
            device=next(module.parameters()).device,
            length=self.config.length,
            first=True,
            last=place.last,
            **self._facts[name],
        )

    @override
    def hosts(self, survey: Survey) -> Mapping[str, Host]:
        """The blocks after the first one of a stack, and torch's encoders, which may make nested tensors."""
        containers = {outer for name in self._places for outer in around(name)}
        encoders = [name for name in containers if isinstance(survey.by_name.get(name), nn.TransformerEncoder)]
        hosts: dict[str, Host] = {name: (PromptEncoder, nn.Module()) for name in encoders}
        for name, place in self._places.items():
            if not place.first and not isinstance(survey.by_name[name], Adapted):
                hosts[name] = PromptBlock, self._passage(name, place)
        return hosts

    def _passage(self, name: str, place: Place) -> Passage:
        return Passage(name, length=self.config.length, first=False, last=place.last, **self._facts[name])
