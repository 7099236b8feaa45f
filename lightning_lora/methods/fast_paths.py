"""Modules of torch whose fast path in evaluation would bypass what a method adds inside them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_lora.layers.adapted import Adapted
from lightning_lora.layers.transformer import WithoutFastPath, WithoutNestedTensors
from lightning_lora.targets.role_names import around
from lightning_lora.targets.survey import Survey

Host = tuple[type[Adapted], nn.Module]


def fast_path_hosts(
    survey: Survey, sites: Iterable[str], layer: type[WithoutFastPath], encoder: type[WithoutNestedTensors]
) -> dict[str, Host]:
    """The modules around ``sites`` that need another class, each with it and an empty child.

    Args:
        survey: of the model.
        sites: names of adapted modules.
        layer: the class for an ``nn.TransformerEncoderLayer``, with the key of the method.
        encoder: the class for an ``nn.TransformerEncoder``.
    """
    containers = dict.fromkeys(container for site in sites for container in around(site))
    hosts: dict[str, Host] = {}
    for name in containers:
        module = survey.by_name.get(name)
        if isinstance(module, Adapted):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            hosts[name] = layer, nn.Module()
        elif isinstance(module, nn.TransformerEncoder):
            hosts[name] = encoder, nn.Module()
    return hosts
