"""LoRA on a parameter that any code may read: whoever asks for the attribute gets the sum.

Each read builds the sum (experts' sums are not built), and what is written into it is lost: write into the parameter.
As in ``torch.nn.utils.parametrize`` a property of the swapped class answers, but the parameter stays where it was,
under its own name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora.distributed.sharded import is_sharded, shape_of
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, parameter_of
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.ops.stacked import StackedSum


class ParameterAdapter(Adapter):
    """Gives the sum for a weight, unbuilt where that is a stack of experts' matrices."""

    def forward(self, weight: Tensor) -> Tensor | StackedSum:
        """``weight + scale * B A``, through which A and B get their gradients."""
        if not self.part.stacked:
            return self.add_to_weight(weight)
        left, right = (matrix.to(weight.dtype) for matrix in self.factors(weight))
        return StackedSum(weight, left, right)


class LoRAParameterHolder(LoRALayer):
    """Mixed into the class of the module that holds the parameter."""

    lora_adapter_class = ParameterAdapter


def adapted_property(key: str) -> Any:
    """The property that stands before the parameter ``key``."""

    def read(module: LoRAParameterHolder) -> Any:
        if key not in module._parameters:
            raise AttributeError(key)
        weight: Any = parameter_of(module, key)
        if not _is_here(weight):
            return weight
        for adapter in module.lora.active_pairs():
            if adapter.part.key == key:
                weight = adapter(weight)
        return weight

    def write(module: LoRAParameterHolder, value: Any) -> None:
        module._parameters[key] = value  # torch's own setattr registers a Parameter without coming here

    return property(read, write)


def _is_here(weight: Tensor) -> bool:
    """Whether its values are: FSDP asks for the attribute too, to replace it, where it is a part or freed memory."""
    if torch.compiler.is_compiling():
        return True
    return weight.dim() > 1 and not is_sharded(weight) and bool(weight.untyped_storage().size())


def part_of_parameter(module: nn.Module, key: str) -> WeightPart:
    """The parameter ``key`` as a part: one matrix, or with three dimensions a stack of them."""
    parameter = parameter_of(module, key)
    stacked = len(shape_of(parameter)) == 3
    return WeightPart(key, key, transposed=_kept_transposed(module, key), stacked=stacked, read=True)


def _kept_transposed(module: nn.Module, key: str) -> bool:
    """Whether experts keep ``(in, out)``: they say so, or a bias or the next map's shape does; else it is a guess."""
    shape = shape_of(parameter_of(module, key))
    if len(shape) != 3:
        return False
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    bias = module._parameters.get(f"{key}_bias")
    if bias is not None:
        return shape_of(bias)[-1] == shape[-1] != shape[-2]
    stacks = [shape_of(p) for p in module._parameters.values() if p is not None and len(shape_of(p)) == 3]
    first, last = stacks[0], stacks[-1]
    return first[1] == last[2] and first[2] != last[1]


def holds_experts(module: nn.Module) -> bool:
    """Whether ``module`` keeps the weights of many experts in one parameter."""
    return "expert" in type(module).__name__.lower() and bool(expert_keys(module))


def expert_keys(module: nn.Module) -> list[str]:
    """The parameters of three dimensions."""
    own = ((key, parameter) for key, parameter in module._parameters.items() if parameter is not None)
    return [key for key, parameter in own if not is_lazy(parameter) and len(shape_of(parameter)) == 3]
