"""Which layers can be adapted, by which class, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from lightning_lora.foreign import OUTPUT_QUANTIZATION, PARAMETRIZATIONS, TERNARY_LINEAR, is_a
from lightning_lora.layers.adapted import Adapted, DynamicClass, derived, not_swappable
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
    conv1d_base,
    conv1d_class,
    own_linear_base,
    own_linear_class,
)
from lightning_lora.layers.merged_forward import MergedForward
from lightning_lora.layers.mixed.experts import LoRAExperts
from lightning_lora.layers.parameter import (
    LoRAParameterHolder,
    adapted_property,
    expert_keys,
    holds_experts,
    is_named_experts,
    part_of_parameter,
)
from lightning_lora.layers.quantized.formats import is_quantized, is_quantized_class
from lightning_lora.layers.quantized.linear import LoRAQuantizedLinear
from lightning_lora.layers.recurrent import LoRACell, LoRARecurrent
from lightning_lora.layers.source_code import NOT_COMPUTING, function_of, names_in
from lightning_lora.layers.transformer import LoRATransformerEncoder, LoRATransformerEncoderLayer
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor

ADAPTED_CLASSES: dict[type[nn.Module], type[LoRALayer]] = {
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
# Their forward reads weights of layers inside, so their class is replaced too if such a layer is adapted.
HOST_CLASSES: dict[type[nn.Module], type[LoRALayer]] = {
    nn.MultiheadAttention: LoRAMultiheadAttention,
    nn.TransformerEncoderLayer: LoRATransformerEncoderLayer,
    nn.TransformerEncoder: LoRATransformerEncoder,
}
Keys = tuple[str, ...]
# One adapted class per original class and keys: torch.compile guards on the class.
_CLASSES: dict[tuple[type[nn.Module], Keys], type[LoRALayer]] = {}
WEIGHT_NAMES = {"getattr", "weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
COMPUTED = "computes its weight (a parametrization or weight norm): remove that first"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def adaptable_base(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The adaptable class that ``cls`` is or derives from."""
    known = next((base for base in cls.__mro__ if base in ADAPTED_CLASSES), None)
    return known or conv1d_base(cls) or own_linear_base(cls)


def host_base(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class of :data:`HOST_CLASSES` that ``cls`` is or derives from."""
    return next((base for base in cls.__mro__ if base in HOST_CLASSES), None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` without what a method added to it."""
    return type(module).original_class if isinstance(module, Adapted) else type(module)


def adapted_class(original: type[nn.Module], keys: Keys = ()) -> type[LoRALayer]:
    """The adapted class of ``original``; with ``keys``, the class that adapts only these parameters at each read.

    If the forward of a user's class calls ``super().forward``, that is the adapted forward: the user's code then runs
    on the sum, as it will after a merge. Any other overridden forward reads the weight and runs on the merged one.
    """
    if (original, keys) not in _CLASSES:
        _CLASSES.setdefault((original, keys), _derive_holder(original, keys) if keys else _derive(original))
    return _CLASSES[original, keys]


def adapted_class_for(module: nn.Module, parts: Iterable[WeightPart]) -> type[LoRALayer]:
    """The adapted class of ``module`` when these ``parts`` of it are adapted."""
    keys = dict.fromkeys(part.key for part in parts if part.read)
    return adapted_class(original_class(module), tuple(keys))


def _derive(original: type[nn.Module]) -> type[LoRALayer]:
    root = adaptable_base(original)
    if root is None:
        host = host_base(original)
        assert host is not None
        return HOST_CLASSES[host] if original is host else _derived(original, [original, HOST_CLASSES[host]])
    if root in ADAPTED_CLASSES:
        cls = ADAPTED_CLASSES[root]
    else:
        cls = conv1d_class(root) if root is conv1d_base(root) else own_linear_class(root)
    if vars(cls).get("original_class") is original and root in ADAPTED_CLASSES:
        return cls
    if is_quantized_class(original):
        return _derived(original, [LoRAQuantizedLinear, original])
    if issubclass(cls, MergedForward):
        return _derived(original, [cls, original])
    if original is root:
        return _derived(original, [cls])
    if calls_super(original, root):
        return _derived(original, [original, cls])
    methods = {"lora_parts": cls.lora_parts, "lora_arguments": staticmethod(cls.lora_arguments)}
    return _derived(original, [MergedForward, original], methods)


def _derived(
    original: type[nn.Module],
    bases: list[type[nn.Module]],
    methods: dict[str, Any] | None = None,
    keys: Keys = (),
) -> type[LoRALayer]:
    recipe = {"class_recipe": (adapted_class, (original, keys)), "__module__": __name__}
    cls = derived(original, [DynamicClass, *bases], f"LoRA{original.__name__}", {**(methods or {}), **recipe})
    return cast("type[LoRALayer]", cls)


def _derive_holder(original: type[nn.Module], keys: Keys) -> type[LoRALayer]:
    properties = {key: adapted_property(key) for key in keys}
    holder = LoRAExperts if is_named_experts(original) else LoRAParameterHolder
    return _derived(original, [holder, original], dict(properties), keys)


def calls_super(cls: type[nn.Module], root: type[nn.Module]) -> bool:
    """Whether each forward between ``cls`` and ``root`` calls ``super().forward``, and nothing there reads a weight."""
    between = cls.__mro__[: cls.__mro__.index(root)]
    forwards = [vars(owner)["forward"] for owner in between if "forward" in vars(owner)]
    computing = [v for owner in between for name, v in vars(owner).items() if not NOT_COMPUTING.fullmatch(name)]
    return (
        all({"super", "forward"} <= _names_in(forward) for forward in forwards)
        and not any(_names_in(value) & WEIGHT_NAMES for value in computing)
        and not any("_conv_forward" in vars(owner) for owner in between)
    )


def _names_in(value: object) -> set[str]:
    function = function_of(value)
    return set() if function is None else names_in(function.__code__)


def parts_of(module: nn.Module) -> list[WeightPart]:
    """The matrices that are adapted when ``module`` is a target."""
    if adaptable_base(original_class(module)) is not None:
        return adapted_class(original_class(module)).lora_parts(module)
    return [part_of_parameter(module, key) for key in expert_keys(module)] if holds_experts(module) else []


def is_known(module: nn.Module) -> bool:
    """Whether ``module`` is of a kind that can be adapted."""
    return adaptable_base(original_class(module)) is not None or holds_experts(module)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer: ``nn.Linear``, Hugging Face's ``Conv1D`` or one of the user's."""
    root = adaptable_base(original_class(module))
    if root is None or root in ADAPTED_CLASSES:
        return root is nn.Linear
    weight = module._parameters.get("weight")  # one of the user's may keep it as something else
    return weight is not None and (torch.nn.parameter.is_lazy(weight) or weight.dim() == 2)


def is_own_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer that derives from no known class, which other packages cannot adapt."""
    return own_linear_base(original_class(module)) is not None


def is_convolution(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution."""
    return adaptable_base(original_class(module)) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_pointwise(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution of kernel size 1 that mixes channels: a linear layer at each position."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    depthwise = module.groups == module.in_channels > 1
    return (
        not depthwise
        and {*module.kernel_size, *module.stride} == {1}
        and module.padding in ("valid", "same", (0,) * len(module.kernel_size))
    )


def refusal(module: nn.Module) -> str | None:
    """Why ``module`` cannot be adapted, as the end of a sentence about it; ``None`` if it can."""
    if isinstance(module, LoRALayer) and module.lora.all_pairs():
        return None
    if not is_known(module):
        return (
            f"is a {original_class(module).__name__}; LoRA adapts torch's linear, embedding, convolution, bilinear, "
            "recurrent and attention layers, Hugging Face's Conv1D, experts in one parameter, and any matrix that is "
            "named itself"
        )
    reason = not_swappable(module, LoRALayer.method_key)
    if reason is not None:
        return reason
    if original_class(module).__call__ is not nn.Module.__call__:
        return "has a `__call__` of its own, which may bypass the adapter"
    if PARAMETRIZATIONS in module._modules or any(f"{key}_g" in module._parameters for key in vars(module)):
        return COMPUTED
    reason = _rounds_update(module)
    if reason is not None:
        return reason
    if is_quantized_class(original_class(module)):
        return None
    if takes_quantized_tensor(module) and is_quantized(module):
        return None
    return _refused_weights(module, [part.key for part in parts_of(module)])


def _rounds_update(module: nn.Module) -> str | None:
    """Why an update of ``module`` would be rounded together with what the layer quantizes."""
    if getattr(module, OUTPUT_QUANTIZATION, None) is not None:
        return (
            "quantizes its output (quanto's `activations`), and an update smaller than a step of it would be lost: "
            "quantize the weights alone"
        )
    if is_a(module, TERNARY_LINEAR):
        return (
            f"is an {TERNARY_LINEAR}, which computes with weights of -1, 0 and 1 and would round an update with them: "
            "load the model without quantization"
        )
    return None


def takes_quantized_tensor(module: nn.Module) -> bool:
    """Whether the adapted forward of ``module`` is that of ``nn.Linear``, which can compute with a quantized tensor."""
    original = original_class(module)
    return adaptable_base(original) is nn.Linear and issubclass(adapted_class(original), LoRALinear)


def refused_parameter(module: nn.Module, key: str) -> str | None:
    """Why the parameter ``key`` cannot be adapted at each read; ``None`` if it can."""
    parameter = parameter_of(module, key)
    if hasattr(module, "lora") and not isinstance(module, LoRALayer):
        return "is in a module that has an attribute `lora` of its own, where the adapter would go"
    if is_quantized(module) and key == "weight":
        return "is quantized, and no code reads it as a matrix: name the layer instead"
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
    if is_quantized_tensor(weight):
        return (
            f"has a weight that is a {type(weight).__name__}, which LoRA adapts only in linear layers with torch's own "
            "forward: quantize the model without it (`filter_fn` of `quantize_`), or leave it out of the targets with "
            "`exclude`"
        )
    if weight.dtype not in DTYPES:
        return (
            f"has a weight of {weight.dtype}; LoRA adapts float32, bfloat16, float16 and float64, and weights that "
            "bitsandbytes, torchao or quanto quantized"
        )
    return None
