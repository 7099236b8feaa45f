"""Initial values of what changes in a frozen base: trained biases and modules, and buffers such as statistics."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import is_partitioned, local_shard
from lightning_lora.layers.adapted import added_to
from lightning_lora.model.journal import Journal
from lightning_lora.model.record import record_of, records
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.targets.survey import Survey, survey_of


def remember(model: nn.Module | Survey) -> None:
    """Copy to the CPU everything of the base that may change. What has a copy already keeps that.

    Of a sharded tensor each rank keeps its own part.
    """
    for site in survey_of(model).sites.values():
        _keep(site.module, record_of(site.module).trained | site.module._buffers.keys())


def remember_added(model: nn.Module | Survey) -> None:
    """As :func:`remember`, of what a method added: values that do not follow from the method alone."""
    for module in survey_of(model).adapted():
        for inner in added_to(module).modules():
            _keep(inner, inner._parameters.keys())


def _keep(module: nn.Module, keys: Collection[str]) -> None:
    record = record_of(module)
    for key, tensor in _saved_tensors(module).items():
        if key in keys and not tensor.is_meta and key not in record.originals:
            record.originals[key] = local_shard(tensor).to("cpu", copy=True)


def renew(model: nn.Module) -> None:
    """Take the present values of what changed as the initial ones: the model was completed after :func:`remember`."""
    for _, module, record in records(model):
        tensors = _saved_tensors(module)
        for key in record.originals.keys() & tensors.keys():
            record.originals[key] = local_shard(tensors[key]).to("cpu", copy=True)


def moved(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every tensor of the base that changed since :func:`remember`, with its initial value; a cast is no change."""
    seen: set[int] = set()
    for _, module, record in records(model):
        tensors = _saved_tensors(module)
        for key, original in record.originals.items():
            if key not in tensors or id(tensors[key]) in seen:
                continue
            seen.add(id(tensors[key]))
            if not same_bits(local_shard(tensors[key]), original.to(tensors[key].dtype)):
                yield module, key, original


def is_trained(model: nn.Module) -> bool:
    """Whether a parameter changed since :func:`remember` or :func:`remember_added`."""
    return any(key in module._parameters for module, key, _ in moved(model))


def check_writable(name: str, parameter: Tensor) -> None:
    """Raise if the initial value of ``parameter`` cannot be written into it.

    Raises:
        ValueError: if ZeRO 3 has partitioned it.
    """
    if is_partitioned(parameter):
        raise ValueError(
            f"`{name}` is partitioned by ZeRO 3, so the base's initial value cannot be written into it. Load the "
            "adapter's file into a model on one device, and call this on that model."
        )


@torch.no_grad()
def put_back(model: nn.Module, journal: Journal) -> None:
    """Give the base its initial values back."""
    for module, key, original in list(moved(model)):
        journal.keep(_saved_tensors(module)[key])
        local_shard(_saved_tensors(module)[key]).copy_(original)


@torch.no_grad()
def put_back_own(module: nn.Module, journal: Journal) -> None:
    """Give the parameters of ``module`` itself their initial values back."""
    for key, original in record_of(module).originals.items():
        parameter = module._parameters.get(key)
        if parameter is not None:
            journal.keep(parameter)
            local_shard(parameter).copy_(original)


def _saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``module`` itself, and the buffers that its state dict has."""
    buffers = {key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return {key: value for key, value in {**module._parameters, **buffers}.items() if value is not None}
