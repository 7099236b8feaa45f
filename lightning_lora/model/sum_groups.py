"""Which layers of a model are summed with their adapters in one batch: those with weights of one shape."""

from __future__ import annotations

from torch import nn

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, adapted_layers, parameter_of
from lightning_lora.layers.conv import LoRAConv
from lightning_lora.layers.linear import LoRALinear, LoRAQuantizedLinear
from lightning_lora.layers.summed_weight import SumGroup, SummedWeight
from lightning_lora.targets.survey import Survey

MAX_BYTES = 2**27  # of the weights of a group: their gradients live until the group's last one is there


def group_sums(survey: Survey, compute: str) -> None:
    """Let the adapted layers of ``survey`` compute on the side of the equation that ``compute`` names.

    Args:
        survey: of a model with adapters.
        compute: ``"activations"``, ``"weights"``, or ``"auto"``: the weight's side where it is faster.
    """
    groups: dict[object, SumGroup] = {}
    for layer in survey.layers():
        width, sums = width_of(layer), {}
        for key, pairs in layer.lora.by_weight().items() if width and compute != "activations" else ():
            weight, kind = parameter_of(layer, key), _kind(layer, key, pairs)
            group = groups.get(kind)
            if group is None or (len(group.members) + 1) * weight.numel() * weight.element_size() > MAX_BYTES:
                groups[kind] = group = SumGroup(weight.numel())
            sums[key] = SummedWeight(layer, key, group, width, compute == "weights")
        layer.lora.sums = sums


def compute_on_activations(model: nn.Module) -> None:
    """Let every adapted layer of ``model`` compute on the side of the activations."""
    for _, layer in adapted_layers(model):
        layer.lora.sums = {}


def width_of(layer: LoRALayer) -> int:
    """Features at one position of the input of ``layer``; 0 if its kind has no weight's side."""
    if isinstance(layer, LoRALinear) and not isinstance(layer, LoRAQuantizedLinear):
        return layer.in_features
    return int(layer.in_channels) if isinstance(layer, LoRAConv) else 0  # type: ignore[arg-type]


def _kind(layer: LoRALayer, key: str, pairs: list[Adapter]) -> object:
    """Equal for parameters that can be summed in one batch."""
    weight = parameter_of(layer, key)
    ranks = sum(pair.r for pair in pairs)
    return weight.shape, weight.stride(), weight.dtype, weight.device, ranks, pairs[0].scale
