"""LoRA on a parameter that any code may read: reading the attribute gives ``W0 + scale * B A``.

Each read computes the sum (for stacked experts it is not built). Values written into the sum are lost: write into the
parameter. As in ``torch.nn.utils.parametrize`` the attribute is a property of the adapted class, but the parameter
keeps its place and its name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora.distributed.sharded import is_sharded, shape_of
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, parameter_of
from lightning_lora.layers.reachable import calls_autograd_function
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.ops.linear import Coefficient
from lightning_lora.ops.stacked import StackedSum


class ParameterAdapter(Adapter):
    """Adds ``scale * B A`` to a parameter; for stacked experts the sum is not built."""

    def forward(
        self, weight: Tensor | StackedSum, build: bool = False, coefficient: Coefficient = None
    ) -> Tensor | StackedSum:
        """``weight + scale * B A``, differentiable by A and B; with ``build`` a tensor in any case.

        The sum with another adapter's factors has theirs side by side with these.
        """
        base: Any = weight.weight if isinstance(weight, StackedSum) else weight
        if build or not self.part.stacked:
            return self.add_to_weight(base, coefficient)
        left, right = (matrix.to(base.dtype) for matrix in self.factors(base, coefficient))
        if isinstance(weight, StackedSum):
            left, right = torch.cat([weight.left, left], -1), torch.cat([weight.right, right], -2)
        return StackedSum(base, left, right)


class LoRAParameterHolder(LoRALayer):
    """Mixin for the class of the module that holds the parameter."""

    lora_adapter_class = ParameterAdapter


def adapted_property(key: str) -> Any:
    """The property that adds the adapters to the parameter ``key`` at each read."""

    def read(module: LoRAParameterHolder) -> Any:
        if key not in module._parameters:
            raise AttributeError(key)
        weight: Any = parameter_of(module, key)
        original: Any = module.original_class
        if not _has_values(weight):
            return weight
        for adapter, coefficient in module.lora.terms_of_weight():
            if adapter.part.key == key:
                weight = adapter(weight, calls_autograd_function(original, key), coefficient)
        return weight

    def write(module: LoRAParameterHolder, value: Any) -> None:
        module._parameters[key] = value  # torch's setattr registers a Parameter without calling this

    return property(read, write)


def _has_values(weight: Tensor) -> bool:
    """Whether the full values are in memory: FSDP reads the attribute too, of a shard or of freed memory."""
    if torch.compiler.is_compiling():
        return True
    return weight.dim() > 1 and not is_sharded(weight) and bool(weight.untyped_storage().size())


def part_of_parameter(module: nn.Module, key: str) -> WeightPart:
    """The parameter ``key`` as a part: one matrix, or a stack of matrices if it has three dimensions."""
    parameter = parameter_of(module, key)
    stacked = len(shape_of(parameter)) == 3
    return WeightPart(key, key, transposed=_is_stored_transposed(module, key), stacked=stacked, read=True)


def _is_stored_transposed(module: nn.Module, key: str) -> bool:
    """Whether stacked experts are stored as ``(in, out)``: by their flag, a bias, or the next parameter's shape."""
    shape = shape_of(parameter_of(module, key))
    if len(shape) != 3:
        return False
    flag = getattr(module, "is_transposed", None)
    if isinstance(flag, bool):
        return flag
    bias = module._parameters.get(f"{key}_bias")
    if bias is not None:
        return shape_of(bias)[-1] == shape[-1] != shape[-2]
    stacks = [shape_of(parameter_of(module, each)) for each in expert_keys(module)]
    first, last = stacks[0], stacks[-1]
    return first[1] == last[2] and first[2] != last[1]


def holds_experts(module: nn.Module) -> bool:
    """Whether ``module`` stores the weights of many experts in one parameter."""
    return is_named_experts(type(module)) and bool(expert_keys(module))


def is_named_experts(cls: type) -> bool:
    """Whether modules of class ``cls`` are experts by its name."""
    return "expert" in cls.__name__.lower()


def expert_keys(module: nn.Module) -> list[str]:
    """The names of the parameters with three dimensions."""
    parameters = ((key, parameter) for key, parameter in module._parameters.items() if parameter is not None)
    return [key for key, parameter in parameters if not is_lazy(parameter) and len(shape_of(parameter)) == 3]
