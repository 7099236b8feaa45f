"""Which layers can be adapted, and by which class; the reasons why others cannot."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import nn

from lightning_lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.layers.base import LoRALayer, parameter_of
from lightning_lora.layers.bilinear import LoRABilinear
from lightning_lora.layers.conv import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAConvTranspose1d,
    LoRAConvTranspose2d,
    LoRAConvTranspose3d,
)
from lightning_lora.layers.embedding import LoRAEmbedding, LoRAEmbeddingBag
from lightning_lora.layers.linear import (
    LoRALinear,
    LoRAQuantizedLinear,
    is_quantizing,
    transposed_kind,
    transposed_root,
)
from lightning_lora.layers.merged_forward import OnWeight
from lightning_lora.layers.parameter import OnRead, expert_keys, holds_experts, readable_part, reading
from lightning_lora.layers.recurrent import LoRACell, LoRARecurrent
from lightning_lora.layers.source_code import HANDLING, names_in
from lightning_lora.layers.transformer import LoRATransformerEncoder, LoRATransformerEncoderLayer
from lightning_lora.layers.weight_view import Part

KINDS: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    nn.Embedding: LoRAEmbedding,
    nn.EmbeddingBag: LoRAEmbeddingBag,
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
    nn.Conv3d: LoRAConv3d,
    nn.ConvTranspose1d: LoRAConvTranspose1d,
    nn.ConvTranspose2d: LoRAConvTranspose2d,
    nn.ConvTranspose3d: LoRAConvTranspose3d,
    nn.Bilinear: LoRABilinear,
    nn.MultiheadAttention: LoRAMultiheadAttention,
    nn.LSTM: LoRARecurrent,
    nn.GRU: LoRARecurrent,
    nn.RNN: LoRARecurrent,
    nn.LSTMCell: LoRACell,
    nn.GRUCell: LoRACell,
    nn.RNNCell: LoRACell,
}
# They read the weights of layers inside, and are swapped where one of those is adapted.
HOSTS: dict[type[nn.Module], type[LoRALayer]] = {
    nn.MultiheadAttention: LoRAMultiheadAttention,
    nn.TransformerEncoderLayer: LoRATransformerEncoderLayer,
    nn.TransformerEncoder: LoRATransformerEncoder,
}
Keys = tuple[str, ...]
# One class for all layers of a class: torch.compile guards on it.
_SWAPPED: dict[tuple[type[nn.Module], Keys], type[LoRALayer]] = {}
WEIGHTS = {"getattr", "weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
COMPUTED = "computes its weight (a parametrization or weight norm): remove that first"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Derived(LoRALayer):
    """Mixed into classes made at run time: they have no importable name, so what is pickled is the class they adapt."""

    lora_keys: ClassVar[Keys] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy by the original class."""
        rebuild, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(max(2, protocol)))
        if rebuild is copyreg.__newobj__ and arguments[0] is type(self):  # type: ignore[attr-defined]
            return (_new, (self.lora_original_class, self.lora_keys, *arguments[1:]), *rest)
        return (rebuild, arguments, *rest)


def _new(original: type[nn.Module], keys: Keys, *arguments: Any) -> nn.Module:
    cls = swapped_class(original, keys)
    return cls.__new__(cls, *arguments)


def root_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class of a known kind that ``cls`` is or derives from."""
    return next((base for base in cls.__mro__ if base in KINDS), None) or transposed_root(cls)


def host_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class that ``cls`` is or derives from whose forward reads weights of layers inside."""
    return next((base for base in cls.__mro__ if base in HOSTS), None)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` has without adapters."""
    return module.lora_original_class if isinstance(module, LoRALayer) else type(module)


def swapped_class(original: type[nn.Module], keys: Keys = ()) -> type[LoRALayer]:
    """The class that an ``original`` module gets when it is adapted, or when only its parameters ``keys`` are.

    A forward of a user's class that calls ``super().forward`` finds the adapted one there, so that what it does before
    and after applies to the sum, as it will after a merge. Any other forward of its own reads the weight, so the sum is
    put there.
    """
    if (original, keys) not in _SWAPPED:
        _SWAPPED.setdefault((original, keys), _derive_reading(original, keys) if keys else _derive(original))
    return _SWAPPED[original, keys]


def class_for(module: nn.Module, parts: Iterable[Part]) -> type[LoRALayer]:
    """The class that ``module`` gets when these ``parts`` of it are adapted."""
    keys = dict.fromkeys(part.key for part in parts if part.read)
    return swapped_class(plain_class(module), tuple(keys))


def _derive(original: type[nn.Module]) -> type[LoRALayer]:
    root, host = root_of(original), host_of(original)
    if root is None or (host is not None and calls_super(original, root)):
        assert host is not None
        return HOSTS[host] if original is host else _derived(original, [original, HOSTS[host]])
    kind = KINDS[root] if root in KINDS else transposed_kind(root)
    if vars(kind).get("lora_original_class") is original and root in KINDS:
        return kind
    if kind is LoRALinear and is_quantizing(original):
        return _derived(original, [LoRAQuantizedLinear, original])
    if issubclass(kind, OnWeight):
        return _derived(original, [kind, original])
    if original is root:
        return _derived(original, [kind])
    if calls_super(original, root):
        return _derived(original, [original, kind])
    facts = {"lora_parts": kind.lora_parts, "lora_arguments": staticmethod(kind.lora_arguments)}
    return _derived(original, [OnWeight, original], facts)


def _derived(
    original: type[nn.Module], bases: list[type[nn.Module]], facts: dict[str, Any] | None = None
) -> type[LoRALayer]:
    own = {**(facts or {}), "lora_original_class": original, "__module__": __name__}
    return type(f"LoRA{original.__name__}", (Derived, *bases), own)


def _derive_reading(original: type[nn.Module], keys: Keys) -> type[LoRALayer]:
    return _derived(original, [OnRead, original], {"lora_keys": keys, **{key: reading(key) for key in keys}})


def calls_super(cls: type[nn.Module], root: type[nn.Module]) -> bool:
    """Whether every forward between ``cls`` and ``root`` hands on by ``super().forward`` and reads no weight itself."""
    between = cls.__mro__[: cls.__mro__.index(root)]
    forwards = [vars(owner)["forward"] for owner in between if "forward" in vars(owner)]
    hands_on = all({"super", "forward"} <= (used := _names_in(f)) and not used & WEIGHTS for f in forwards)
    others = (value for owner in between for name, value in vars(owner).items() if not HANDLING.fullmatch(name))
    reads = any(_names_in(getattr(value, "fget", value)) & WEIGHTS for value in others)
    return hands_on and not reads and not any("_conv_forward" in vars(owner) for owner in between)


def _names_in(function: Any) -> set[str]:
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return names_in(code) if code is not None else set()


def parts_of(module: nn.Module) -> list[Part]:
    """The matrices of ``module`` that naming it means."""
    if root_of(plain_class(module)) is not None:
        return swapped_class(plain_class(module)).lora_parts(module)
    return [readable_part(module, key) for key in expert_keys(module)] if holds_experts(module) else []


def is_known(module: nn.Module) -> bool:
    """Whether ``module`` is of a kind that has matrices to adapt."""
    return root_of(plain_class(module)) is not None or holds_experts(module)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a plain linear map: ``nn.Linear`` or Hugging Face's ``Conv1D``."""
    root = root_of(plain_class(module))
    return root is not None and (root is nn.Linear or root is transposed_root(root))


def refusal(module: nn.Module) -> str | None:
    """Why ``module`` cannot be adapted, as the end of a sentence about it; ``None`` where it can."""
    if isinstance(module, LoRALayer) and module.lora.every():
        return None
    if not is_known(module):
        return (
            f"is a {plain_class(module).__name__}; LoRA adapts torch's linear, embedding, convolution, bilinear, "
            "recurrent and attention layers, Hugging Face's Conv1D, experts in one parameter, and any matrix that is "
            "named itself"
        )
    if "forward" in vars(module):
        return "has a `forward` set on the instance, which would pass the adapter by"
    if plain_class(module).__call__ is not nn.Module.__call__:
        return "has a `__call__` of its own, which may pass the adapter by"
    if hasattr(module, "lora") and not isinstance(module, LoRALayer):
        return "has an attribute `lora` of its own, where the adapter would go"
    if "parametrizations" in module._modules or any(f"{key}_g" in module._parameters for key in vars(module)):
        return COMPUTED
    if root_of(plain_class(module)) is nn.Linear and is_quantizing(plain_class(module)):
        return None
    return _refused_weights(module, [part.key for part in parts_of(module)])


def refused_parameter(module: nn.Module, key: str) -> str | None:
    """Why the parameter ``key`` cannot be adapted wherever it is read; ``None`` where it can."""
    parameter = parameter_of(module, key)
    if hasattr(module, "lora") and not isinstance(module, LoRALayer):
        return "lies beside an attribute `lora` of the module's own, where the adapter would go"
    if not torch.nn.parameter.is_lazy(parameter) and parameter.dim() not in (2, 3):
        return f"has shape {tuple(parameter.shape)}; LoRA adapts matrices, and stacks of them"
    return _refused_weights(module, [key])


def _refused_weights(module: nn.Module, keys: list[str]) -> str | None:
    reasons = (_refused_weight(module._parameters.get(key)) for key in keys)
    return next((reason for reason in reasons if reason is not None), None)


def _refused_weight(weight: nn.Parameter | None) -> str | None:
    if weight is None:
        return COMPUTED
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "has no shape yet (a lazy module): run one batch through the model first"
    if weight.dtype not in DTYPES:
        return f"has a weight of {weight.dtype}; LoRA adapts float32, bfloat16, float16 and float64"
    return None
