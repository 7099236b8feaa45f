"""Which layers can be adapted, and by which class; the reasons why others cannot."""

from __future__ import annotations

import copyreg
import inspect
from typing import Any, cast

import torch
from torch import nn

from lightning_lora.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lightning_lora.embedding import LoRAEmbedding
from lightning_lora.layer import LoRALayer, OnWeight
from lightning_lora.linear import LoRALinear
from lightning_lora.transposed_linear import transposed_kind, transposed_root

KINDS: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    nn.Embedding: LoRAEmbedding,
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
    nn.Conv3d: LoRAConv3d,
}
# One class for all layers of a class: torch.compile guards on it.
_SWAPPED: dict[type[nn.Module], type[LoRALayer]] = {}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Derived(LoRALayer):
    """Mixed into classes made at run time: they have no importable name, so what is pickled is the class they adapt."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy by the original class."""
        rebuild, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if rebuild is copyreg.__newobj__ and arguments[0] is type(self):  # type: ignore[attr-defined]
            return (_new, (self.original_class, *arguments[1:]), *rest)
        return (rebuild, arguments, *rest)


def _new(original: type[nn.Module], *arguments: Any) -> nn.Module:
    cls = swapped_class(original)
    return cls.__new__(cls, *arguments)


def root_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class of a known kind that ``cls`` is or derives from."""
    return next((base for base in cls.__mro__ if base in KINDS), None) or transposed_root(cls)


def swapped_class(original: type[nn.Module]) -> type[LoRALayer]:
    """The class that an ``original`` module gets when it is adapted.

    A forward of a user's class that calls ``super().forward`` finds the adapted one there, so that what it does before
    and after applies to the sum, as it will after a merge. Any other forward of its own reads the weight, so the sum is
    put there.
    """
    if original not in _SWAPPED:
        _SWAPPED[original] = _derive(original)
    return _SWAPPED[original]


def _derive(original: type[nn.Module]) -> type[LoRALayer]:
    root = root_of(original)
    assert root is not None
    kind = KINDS[root] if root in KINDS else transposed_kind(root)
    facts: dict[str, Any] = {"original_class": original, "__module__": __name__}
    if original is root:
        return kind if root in KINDS else type(kind.__name__, (Derived, kind), facts)
    if calls_super(original, root):
        return type(f"LoRA{original.__name__}", (Derived, original, kind), facts)
    facts |= {"transposed": kind.transposed, "adapter_arguments": staticmethod(kind.adapter_arguments)}
    return type(f"LoRA{original.__name__}", (Derived, OnWeight, original), facts)


def calls_super(cls: type[nn.Module], root: type[nn.Module]) -> bool:
    """Whether every forward between ``cls`` and ``root`` hands on by ``super().forward`` and reads no weight itself."""
    between = cls.__mro__[: cls.__mro__.index(root)]
    forwards = [vars(owner)["forward"] for owner in between if "forward" in vars(owner)]
    hands_on = all({"super", "forward"} <= (used := _names_in(f)) and "weight" not in used for f in forwards)
    return hands_on and not any("_conv_forward" in vars(owner) for owner in between)


def _names_in(function: Any) -> set[str]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set(code.co_names) if code is not None else set()


def holds_experts(module: nn.Module) -> bool:
    """Whether ``module`` keeps the weights of many experts in one parameter of three dimensions."""
    if "expert" not in type(module).__name__.lower():
        return False
    return any(parameter is not None and parameter.dim() == 3 for parameter in module._parameters.values())


def refusal(module: nn.Module, parent: nn.Module | None = None) -> str | None:
    """Why ``module`` cannot be adapted, as the end of a sentence about it; ``None`` where it can."""
    if isinstance(module, LoRALayer):
        return None
    if isinstance(module, nn.MultiheadAttention):
        return (
            "is a nn.MultiheadAttention, which reads its weights directly and would pass adapters by: not supported yet"
        )
    if holds_experts(module):
        return "keeps the weights of all its experts in one parameter, which is not supported yet"
    if root_of(type(module)) is None:
        return f"is a {type(module).__name__}; LoRA adapts Linear, Embedding, Conv1d/2d/3d and Hugging Face's Conv1D"
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"lies in a {type(parent).__name__}, which reads its weights directly and would pass the adapter by"
    return _refused_weight(module)


def _refused_weight(module: nn.Module) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return "computes its `weight` (a parametrization or weight norm): remove that first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "has no shape yet (a lazy module): run one batch through the model first"
    if weight.dtype not in DTYPES:
        return f"has a weight of {weight.dtype}; LoRA adapts float32, bfloat16, float16 and float64"
    if "forward" in vars(module):
        return "has a `forward` set on the instance, which would pass the adapter by"
    if hasattr(module, "lora"):
        return "has an attribute `lora` of its own, where the adapter would go"
    return None
