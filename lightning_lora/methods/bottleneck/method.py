"""Bottleneck adapters as a method of a run."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from typing_extensions import override

from lightning_lora.layers.adapted import Adapted
from lightning_lora.methods.added import AddedMethod
from lightning_lora.methods.bottleneck.config import BottleneckConfig
from lightning_lora.methods.bottleneck.layer import (
    Bottleneck,
    BottleneckEncoder,
    BottleneckEncoderLayer,
    BottleneckLayer,
    EntryLayer,
    ParallelLayer,
    new_bottleneck,
)
from lightning_lora.methods.bottleneck.segments import connect
from lightning_lora.methods.bottleneck.sites import entries, find_sites
from lightning_lora.methods.fast_paths import Host, fast_path_hosts
from lightning_lora.targets.blocks import Sublayer
from lightning_lora.targets.survey import Survey


class BottleneckMethod(AddedMethod):
    """``y + scale * up(act(down(x)))`` after the sublayers of a model (Houlsby et al. 2019, arXiv 1902.00751).

    Args:
        config: what is added and where.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16)])})
        >>> BottleneckMethod(BottleneckConfig(size=2)).complete(model)
        ['layers.0.self_attn', 'layers.0.linear2']
    """

    key: ClassVar[str] = "bottleneck"
    config_class = BottleneckConfig
    config: BottleneckConfig

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__(config)
        self._sublayers: dict[str, Sublayer] = {}  # of the survey that `sites` saw last, for `new`

    @override
    def sites(self, survey: Survey) -> dict[str, nn.Module]:
        self._sublayers = {sublayer.output: sublayer for sublayer in find_sites(survey, self.config)}
        return {name: survey.by_name[name] for name in self._sublayers}

    @override
    def mixin(self, module: nn.Module) -> type[Adapted]:
        return ParallelLayer if self.config.placement == "parallel" else BottleneckLayer

    @override
    def new(self, name: str, module: nn.Module, seed: int) -> nn.Module:
        return new_bottleneck(Bottleneck, self.config, self._sublayers[name], next(module.parameters()).device, seed)

    @override
    def connect(self, survey: Survey) -> None:
        """Let bottlenecks with task embeddings read the segments in one place."""
        if self.config.segment_count:
            children = [survey.by_name[name]._modules.get(self.key) for name in self._sublayers]
            bottlenecks = [child for child in children if isinstance(child, Bottleneck)]  # a plain copy has none
            is_ambiguous = any(getattr(module, "batch_first", None) is False for _, module in survey.modules)
            connect(bottlenecks, self.config.segment_count, is_ambiguous)

    @override
    def hosts(self, survey: Survey) -> dict[str, Host]:
        """Where torch's fast path would bypass a bottleneck, and the first layers of MLPs in parallel placement."""
        first = entries(survey, self._sublayers, self.key, EntryLayer) if self.config.placement == "parallel" else {}
        return {**first, **fast_path_hosts(survey, self._sublayers, BottleneckEncoderLayer, BottleneckEncoder)}
