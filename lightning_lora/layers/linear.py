"""LoRA for linear layers: ``nn.Linear``, Hugging Face's ``Conv1D``, and linear layers of the user's.

``Conv1D`` stores its weight transposed. Layers with a quantized weight are in ``quantized``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from lightning_lora.foreign import CONV1D
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.mixed.linear import mixed_layer
from lightning_lora.layers.mixed.terms import MixedTerms, add_terms
from lightning_lora.layers.source_code import is_library, is_linear_forward
from lightning_lora.layers.sums.reading import summed_by_choice, summed_weight
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.ops.linear import Coefficient, add_pair, base_linear, linear, linear_by_choice
from lightning_lora.ops.shared_input import SharedInputGroup


class LinearAdapter(Adapter):
    """Adds ``scale * B A x``: a pair of :func:`lightning_lora.ops.linear.linear`."""

    shared_input: SharedInputGroup | None = None

    def forward(self, y: Tensor, x: Tensor, coefficient: Coefficient = None) -> Tensor:
        """The base output ``y`` of shape ``(..., out_features)`` plus the low-rank term for the input ``x``."""
        return add_pair(y, x, self, coefficient)

    def placed_B(self, out_features: int) -> Tensor:
        """B of shape ``(out_features, r)``, zero in the rows that are not adapted."""
        return self.part.place_rows(self.B, out_features)


class LoRALinear(LoRALayer, nn.Linear):
    """An ``nn.Linear`` with adapters: ``W0 x + b + scale * B A x``."""

    original_class = nn.Linear
    lora_adapter_class = LinearAdapter

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        adapters: Any = self._modules["lora"]  # reading attributes of a module takes longer
        if adapters.acting is not None:
            return self.lora_by_choice(input, adapters)
        parameters: Any = self._parameters
        if "weight" in parameters and "bias" in parameters:
            W0, bias = parameters["weight"], parameters["bias"]
        else:  # sharded by FSDP1, or computed
            W0, bias = self.weight, self.bias
        pairs = adapters.active_pairs()
        drops = len(pairs) == 1 and pairs[0].dropout and pairs[0].training  # dropout acts on the input, not on a sum
        weight = summed_by_choice(self, input, None) if adapters.sums and not drops else None
        return linear(input, W0, bias, pairs) if weight is None else base_linear(input, weight, bias)

    def lora_by_choice(self, input: Tensor, adapters: Any) -> Tensor:
        """The forward where a choice of adapters was made."""
        choice = adapters.choice_now()
        if choice is not None and not choice.is_uniform and adapters.enabled:
            y = mixed_layer(adapters, choice).output(input, self.weight, self.bias, choice)
            if y is not None:
                return y
        elif adapters.sums:
            weight = summed_by_choice(self, input, choice)
            if weight is not None:
                return base_linear(input, weight, self.bias)
        terms = adapters.terms(input)
        if isinstance(terms, MixedTerms):
            return terms.add_to(base_linear(input, self.weight, self.bias), [input])
        return linear_by_choice(input, self.weight, self.bias, terms)


class TransposedLinear(LoRALayer):
    """Mixin for the model's own ``Conv1D`` class, as transformers is not imported; the weight is ``(in, out)``."""

    lora_adapter_class = LinearAdapter

    @classmethod
    def lora_parts(cls, module: nn.Module) -> list[WeightPart]:
        """One matrix, stored transposed."""
        return [WeightPart(transposed=True)]

    def forward(self, x: Tensor) -> Any:
        """The base output plus the low-rank term of each adapter, or the product with the summed weight."""
        weight = summed_weight(self, x)
        if weight is not None:
            return base_linear(x, weight.t(), self.bias)  # type: ignore[arg-type]
        y = super().forward(x)
        return add_terms(y, self.lora.terms(x), [x])


class OwnLinear(LoRALayer):
    """Mixin for a linear layer that is no ``nn.Linear``; the adapters add to its output."""

    lora_adapter_class = LinearAdapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base output plus the low-rank term of each adapter."""
        y = super().forward(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        return add_terms(y, self.lora.terms(x), [x])


def own_linear_class(root: type[nn.Module]) -> type[LoRALayer]:
    """The adapted class for the linear class ``root`` of the user's."""
    return type(f"LoRA{root.__name__}", (OwnLinear, root), {"original_class": root, "__module__": __name__})


def own_linear_base(cls: type[nn.Module]) -> type[nn.Module] | None:
    """``cls``, if its forward is ``F.linear`` of its input and its ``weight`` and no more, as in PyG's ``Linear``.

    The forward is read, not run.
    """
    hashable: Any = cls
    return cls if _computes_linear(hashable) else None


@cache
def _computes_linear(cls: Any) -> bool:
    owner = next((base for base in cls.__mro__ if "forward" in vars(base)), nn.Module)
    return not is_library(owner) and not issubclass(cls, nn.Linear) and is_linear_forward(vars(owner)["forward"])


def conv1d_base(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Hugging Face's ``Conv1D`` among the bases of ``cls``; by its upper-case D it differs from ``nn.Conv1d``."""
    return next((base for base in cls.__mro__ if base.__name__ == CONV1D and issubclass(base, nn.Module)), None)


def conv1d_class(root: type[nn.Module]) -> type[LoRALayer]:
    """The adapted class for the ``Conv1D`` class ``root``."""
    return type("LoRAConv1D", (TransposedLinear, root), {"original_class": root, "__module__": __name__})
