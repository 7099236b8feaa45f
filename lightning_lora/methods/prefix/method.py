"""Prefix tuning as a method of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn
from typing_extensions import override

from lightning_lora.layers.adapted import Adapted
from lightning_lora.methods.added import AddedMethod
from lightning_lora.methods.fast_paths import Host, fast_path_hosts
from lightning_lora.methods.prefix.config import PrefixConfig
from lightning_lora.methods.prefix.layer import Prefix, PrefixAttention
from lightning_lora.methods.prefix.multihead import PrefixEncoder, PrefixEncoderLayer, PrefixMultiheadAttention
from lightning_lora.methods.prefix.sites import find_sites, is_plain_multihead
from lightning_lora.targets.attention_kernel import KernelSizes
from lightning_lora.targets.survey import Survey


class PrefixMethod(AddedMethod):
    """Trained keys and values before those of every attention (Li and Liang 2021, arXiv 2101.00190).

    Args:
        config: how many, and of which blocks.

    Example:
        >>> model = nn.ModuleList([nn.MultiheadAttention(8, 2)])
        >>> method = PrefixMethod(PrefixConfig(length=3))
        >>> method.complete(model)
        ['0']
        >>> [(name, tuple(p.shape)) for name, p in method.trained_parameters(model)]
        [('0.prefix.K', (2, 3, 4)), ('0.prefix.V', (2, 3, 4))]
    """

    key: ClassVar[str] = "prefix"
    config_class = PrefixConfig
    config: PrefixConfig

    def __init__(self, config: PrefixConfig) -> None:
        super().__init__(config)
        self._sizes: dict[str, KernelSizes | None] = {}  # of the survey that `sites` saw last, for `new`

    @override
    def sites(self, survey: Survey) -> dict[str, nn.Module]:
        self._sizes = find_sites(survey, self.config)
        return {name: survey.by_name[name] for name in self._sizes}

    @override
    def mixin(self, module: nn.Module) -> type[Adapted]:
        return PrefixMultiheadAttention if is_plain_multihead(module) else PrefixAttention

    @override
    def new(self, name: str, module: nn.Module, seed: int) -> nn.Module:
        sizes = self._sizes[name]
        assert sizes is not None
        return Prefix(
            name,
            heads=sizes.heads,
            length=self.config.length,
            key_features=sizes.key_features,
            value_features=sizes.value_features,
            seed=seed,
            device=next(module.parameters()).device,
        )

    @override
    def hosts(self, survey: Survey) -> Mapping[str, Host]:
        return fast_path_hosts(survey, self._sizes, PrefixEncoderLayer, PrefixEncoder)
