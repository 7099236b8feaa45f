"""AdapterFusion as a method of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import nn
from typing_extensions import override

from lightning_lora.layers.adapted import Adapted
from lightning_lora.methods.added import AddedMethod
from lightning_lora.methods.bottleneck.config import BottleneckConfig
from lightning_lora.methods.bottleneck.layer import new_bottleneck
from lightning_lora.methods.bottleneck.sites import entries, find_sites
from lightning_lora.methods.fast_paths import Host, fast_path_hosts
from lightning_lora.methods.fusion.config import FusionConfig
from lightning_lora.methods.fusion.files import TrainedBottlenecks, read_all
from lightning_lora.methods.fusion.layer import (
    FrozenBottleneck,
    Fusion,
    FusionEncoder,
    FusionEncoderLayer,
    FusionEntryLayer,
    FusionLayer,
    ParallelFusionLayer,
)
from lightning_lora.model.fingerprint import Fingerprint, fingerprint
from lightning_lora.model.record import config_of
from lightning_lora.targets.blocks import Sublayer
from lightning_lora.targets.survey import Survey


class FusionMethod(AddedMethod):
    """Attention over the updates of frozen bottlenecks (Pfeiffer et al. 2021, arXiv 2005.00247).

    Args:
        config: which bottlenecks. If it has the arguments of these, no file is read: they start at zero, and a state
            that is loaded brings their values.
    """

    key: ClassVar[str] = "fusion"
    config_class = FusionConfig
    config: FusionConfig

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config)
        self._reads_files = config.bottleneck is None
        self._trained: dict[str, TrainedBottlenecks] = {}  # from `check` to `hosts`, while a model is adapted
        self._sublayers: dict[str, Sublayer] = {}  # of the survey that `sites` saw last, for `new`

    @override
    def check(self, model: nn.Module) -> None:
        is_adapted = config_of(model) is not None
        if self._reads_files and (self.config.bottleneck is None or not is_adapted):
            self._read(None if is_adapted else fingerprint(model))  # what trains is no base any more

    def _read(self, base: Fingerprint | None) -> None:
        """Read the files, which must be of ``base`` if it is given, and complete the configuration by them."""
        self._trained = read_all(self.config.adapters)
        for trained in self._trained.values():
            if base is not None:
                trained.check_base(base)
        self.config = replace(
            self.config,
            adapters={name: str(trained.path) for name, trained in self._trained.items()},
            bottleneck=next(iter(self._trained.values())).config.to_dict(),
        )

    @property
    def bottleneck(self) -> BottleneckConfig:
        """The arguments of the bottlenecks, with what the fusion leaves out as well."""
        assert self.config.bottleneck is not None
        config = BottleneckConfig.from_file(self.config.bottleneck)
        left_out = [*(config.exclude or ()), *(config.also_train or ()), *(self.config.exclude or ())]
        return replace(config, exclude=left_out or None, also_train=self.config.also_train)

    @override
    def sites(self, survey: Survey) -> dict[str, nn.Module]:
        self._sublayers = {sublayer.output: sublayer for sublayer in find_sites(survey, self.bottleneck)}
        return {name: survey.by_name[name] for name in self._sublayers}

    @override
    def mixin(self, module: nn.Module) -> type[Adapted]:
        return ParallelFusionLayer if self.bottleneck.placement == "parallel" else FusionLayer

    @override
    def new(self, name: str, module: nn.Module, seed: int) -> nn.Module:
        device = next(module.parameters()).device
        adapters = {}
        for adapter in self.config.adapters:
            bottleneck = new_bottleneck(FrozenBottleneck, self.bottleneck, self._sublayers[name], device)
            if adapter in self._trained and not bottleneck.down.is_meta:
                self._trained[adapter].give_to(bottleneck, name)
            adapters[adapter] = bottleneck.freeze()
        return Fusion(adapters, init_std=self.config.init_std, seed=seed)

    @override
    def hosts(self, survey: Survey) -> dict[str, Host]:
        """Where torch's fast path would bypass a fusion, and the first layers of MLPs in parallel placement."""
        self._trained = {}
        parallel = self.bottleneck.placement == "parallel"
        first = entries(survey, self._sublayers, self.key, FusionEntryLayer) if parallel else {}
        return {**first, **fast_path_hosts(survey, self._sublayers, FusionEncoderLayer, FusionEncoder)}
