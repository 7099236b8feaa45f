"""Which weights of a model are summed together, each with its adapters: neighbours of one dtype.

The weights of a recurrent layer are a group of their own. Such a layer may be called for each position in turn, and a
second call sums its group again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from lightning_lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.layers.base import LoRALayer, adapted_layers, parameter_of
from lightning_lora.layers.conv import LoRAConv, LoRAConvTranspose
from lightning_lora.layers.linear import LoRALinear, TransposedLinear
from lightning_lora.layers.quantized.linear import LoRAQuantizedLinear
from lightning_lora.layers.recurrent import LoRACell
from lightning_lora.layers.sums.group import SumGroup
from lightning_lora.layers.sums.sizes import MAX_ELEMENTS
from lightning_lora.layers.sums.summed_weight import SummedWeight
from lightning_lora.targets.survey import Survey

MAX_BYTES = 2**28  # of the weights of a group: their gradients live until the group's last one is there
MAX_BYTES_OF_SUMS = 3 * 2**30  # of one model; more memory than that is worth more than the launches it saves

WITH_WEIGHT_SIDE = (LoRALinear, TransposedLinear, LoRAConv, LoRAConvTranspose, LoRAMultiheadAttention)


def group_sums(survey: Survey, compute: str) -> None:
    """Let the adapted layers of ``survey`` compute on the side of the equation that ``compute`` names.

    Args:
        survey: of a model with adapters.
        compute: ``"activations"``, ``"weights"``, or ``"auto"``: the weight's side where it is faster, unless the
            sums of the whole model would take too much memory.
    """
    if compute == "auto" and take_too_much_memory(_summed(survey)):
        compute = "activations"
    groups: dict[object, SumGroup] = {}
    sizes: Counter[object] = Counter()  # bytes of the weights in each
    for layer in survey.layers():
        width, sums = width_of(layer), {}
        for key in layer.lora.by_weight() if width and compute != "activations" else ():
            weight = parameter_of(layer, key)
            own_layer = layer if isinstance(layer, LoRACell) else None
            kind, size = (weight.dtype, weight.device, own_layer), weight.numel() * weight.element_size()
            if kind not in groups or sizes[kind] + size > MAX_BYTES:
                groups[kind], sizes[kind] = SumGroup(), 0
            sizes[kind] += size
            sums[key] = SummedWeight(layer, key, groups[kind], width, weight.numel(), compute == "weights")
        layer.lora.sums = sums


def take_too_much_memory(weights: Iterable[Tensor]) -> bool:
    """Whether ``"auto"`` does without the sums of all ``weights``, of which it never sums one of many elements."""
    sizes = (weight.numel() * weight.element_size() for weight in weights if weight.numel() <= MAX_ELEMENTS)
    return sum(sizes) > MAX_BYTES_OF_SUMS


def _summed(survey: Survey) -> Iterable[Tensor]:
    """The weights that have a weight's side."""
    layers = (layer for layer in survey.layers() if width_of(layer))
    return (parameter_of(layer, key) for layer in layers for key in layer.lora.by_weight())


def compute_on_activations(model: nn.Module) -> None:
    """Let every adapted layer of ``model`` compute on the side of the activations."""
    for _, layer in adapted_layers(model):
        layer.lora.sums = {}


def forget_sums(model: nn.Module) -> None:
    """Free the sums of ``model``: the next ones have in them what was written through ``.data`` since."""
    for _, layer in adapted_layers(model):
        for summed in layer.lora.sums.values():
            if summed.group.sums is not None:
                summed.group.forget()


def has_weight_side(cls: type[LoRALayer]) -> bool:
    """Whether layers of the adapted class ``cls`` can run on the sum of their weight and the adapters."""
    return issubclass(cls, WITH_WEIGHT_SIDE) and not issubclass(cls, LoRAQuantizedLinear)


def width_of(layer: LoRALayer) -> int:
    """Features at one position of the input of ``layer``; 0 if its kind never computes with sums of a group."""
    if not has_weight_side(type(layer)) and not isinstance(layer, LoRACell):
        return 0
    if isinstance(layer, TransposedLinear):
        return parameter_of(layer).shape[0]
    if isinstance(layer, LoRAConv):  # its input has more positions than its output, of which the work is
        return int(layer.in_channels) * math.prod(layer.stride)  # type: ignore[arg-type]
    names = ("in_features", "in_channels", "embed_dim", "input_size")
    return next(int(getattr(layer, name)) for name in names if hasattr(layer, name))
