"""The methods of the package by their keys: what reads a file finds its method here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_lora.config import LoRAConfig, MethodConfig
from lightning_lora.methods.base import Method
from lightning_lora.methods.bottleneck.config import BottleneckConfig
from lightning_lora.methods.bottleneck.method import BottleneckMethod
from lightning_lora.methods.fusion.config import FusionConfig
from lightning_lora.methods.fusion.method import FusionMethod
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.methods.prefix.config import PrefixConfig
from lightning_lora.methods.prefix.method import PrefixMethod
from lightning_lora.methods.prompt.config import PromptConfig
from lightning_lora.methods.prompt.method import PromptMethod
from lightning_lora.methods.subspace.config import SubspaceConfig
from lightning_lora.methods.subspace.method import SubspaceMethod
from lightning_lora.methods.tune.config import TuneConfig
from lightning_lora.methods.tune.method import TuneMethod

METHODS: dict[type[Any], type[Any]] = {
    LoRAConfig: LoRAMethod,
    BottleneckConfig: BottleneckMethod,
    FusionConfig: FusionMethod,
    PrefixConfig: PrefixMethod,
    PromptConfig: PromptMethod,
    SubspaceConfig: SubspaceMethod,
    TuneConfig: TuneMethod,
}
CONFIGS: dict[str, type[Any]] = {method.key: config for config, method in METHODS.items()}


def method_of(config: MethodConfig) -> Method:
    """The method that takes ``config``.

    Raises:
        TypeError: if ``config`` is that of no method.
    """
    if type(config) not in METHODS:
        known = ", ".join(each.__name__ for each in METHODS)
        raise TypeError(
            f"`config` must be a configuration ({known}), but got a {type(config).__name__}. A callback has one, its "
            "`.config`."
        )
    method: Method = METHODS[type(config)](config)
    return method


def config_from_file(key: Any, values: Mapping[str, Any]) -> MethodConfig:
    """The configuration that the method ``key`` wrote as ``values``.

    Raises:
        ValueError: if there is no such method.
    """
    if key not in CONFIGS:
        raise ValueError(f"its method is {key!r:.50}, and the known ones are {', '.join(CONFIGS)}")
    config: MethodConfig = CONFIGS[key].from_file(values)
    return config
