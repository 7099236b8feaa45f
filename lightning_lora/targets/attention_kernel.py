"""What an attention block gives to ``F.scaled_dot_product_attention``, found by a trial run of the block alone.

The sizes of its heads have many names, and switches decide whether it calls the kernel at all. So the forward of the
block runs on a replica whose projections return random numbers, until it reaches the kernel: the arguments of that call
have the sizes.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.registry import is_linear, is_pointwise, parts_of
from lightning_lora.targets.fused_qkv import EMPTY, SIZES, VAR_KEYWORD, VAR_POSITIONAL, replica

BATCH, LENGTH = 2, 64
SHAPES = [(BATCH, LENGTH), (BATCH, 8, 8), (LENGTH,)]  # of the input: sequences, images, sequences packed into one
KINDS = ["first", "states", "one rotation"]  # which arguments are given, see `_argument`
ABSENT = ("mask", "past", "cache")  # words in the names of arguments that may be None
POSITIONS = ("position_embeddings", "rotary", "freqs")
LENGTHS = ("seqlens", "lengths")
STATES = ("states", "context", "memory")
WITHOUT_KERNEL = "computes attention without `F.scaled_dot_product_attention`"


@dataclass(frozen=True)
class KernelSizes:
    """The sizes of keys and values in the call of the kernel.

    Args:
        heads: number of heads of keys and values, before they are repeated for the query's heads.
        key_features: of each head.
        value_features: of each head.
    """

    heads: int
    key_features: int
    value_features: int


class Reached(Exception):  # noqa: N818 - no error
    """Raised with query, key and value where the block calls the kernel."""


class StopAtKernel(TorchFunctionMode):
    """Inside it a call of the kernel raises :class:`Reached`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Torch calls this for every function."""
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            raise Reached(*[*args, *(value for key, value in (kwargs or {}).items() if key in names)][:3])
        return func(*args, **(kwargs or {}))


class Neutral(Tensor):
    """Rotations by an angle of 0, whatever their shape: an operation with another tensor returns that tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Torch calls this for every function with such an argument."""
        lists = [value if isinstance(value, (list, tuple)) else [value] for value in (*args, *(kwargs or {}).values())]
        tensors = [value for values in lists for value in values if isinstance(value, Tensor)]
        others = [value for value in tensors if not isinstance(value, Neutral)]
        if others:
            return max(others, key=Tensor.numel)
        try:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        except RuntimeError:  # it has not the shape that the code expects
            return tensors[0]


class RandomWeight(Tensor):
    """Replaces the weight of a projection, for code that reads it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """``F.linear`` returns random numbers; all else sees a tensor of zeros."""
        if func is not F.linear:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        x, weight = [*args, *(value for key, value in (kwargs or {}).items() if key in ("input", "weight"))][:2]
        return random_features(x, len(weight))


class RandomProjection(nn.Module):
    """Replaces a projection: returns random numbers, so that two heads are equal only if one is a copy."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = torch.zeros(1, 1, device="cpu").expand(out_features, in_features).as_subclass(RandomWeight)
        self.bias = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Features for every position of ``x``."""
        return random_features(x, self.out_features)


def random_features(x: Tensor, count: int) -> Tensor:
    """Random numbers in place of the output of a projection on ``x``."""
    return torch.randn(*x.shape[:-1], count, device="cpu")


class Unchanged(nn.Module):
    """Replaces a module that is no projection, such as a norm."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The first argument."""
        return x


def kernel_sizes(block: nn.Module, **attributes: Any) -> KernelSizes | str:
    """The sizes in the first call of the kernel by ``block``, which is not changed.

    Args:
        block: any module.
        attributes: values that its attributes would have, to see what it would do then.

    Returns:
        The sizes, or why they are not known, as the end of a sentence about the block. A block may not run alone:
        nothing but names is known of the arguments that its forward takes.
    """
    if any(is_lazy(parameter) for parameter in block.parameters()):
        return "has no shape yet (a lazy module): run one batch through the model first"
    errors: list[Exception] = []
    for arguments, keep in product(_attempts(block), (True, False)):
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with StopAtKernel():
                    type(block).forward(_stand_in(block, keep, attributes), **arguments)
                return WITHOUT_KERNEL
            except Reached as reached:
                return _sizes(*reached.args)
            except Exception as error:  # any: the code is the user's, and the arguments are guesses
                errors.append(error)
    why = f" ({type(errors[0]).__name__}: {errors[0]!s:.200})" if errors else ""
    return f"could not be run alone, so the sizes of its heads are not known{why}"


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> KernelSizes | str:
    """The sizes, from tensors of shape ``(batch, heads, length, features)`` or ``(batch, length, features)``."""
    if key.dim() != 4 and tuple(key.shape[:-1]) != (BATCH, LENGTH):
        return (
            f"gives `F.scaled_dot_product_attention` keys of shape {tuple(key.shape)}, where (batch, heads, length, "
            "features) is needed"
        )
    heads = key.shape[-3] if key.dim() > 3 else 1
    copies = next(count for count in range(heads, 0, -1) if heads % count == 0 and _are_copies(key, count))
    return KernelSizes(heads // copies, key.shape[-1], value.shape[-1])


def _are_copies(key: Tensor, count: int) -> bool:
    """Whether each ``count`` heads that follow each other are equal: grouped queries repeat the keys."""
    if count == 1:
        return True
    groups = key.reshape(len(key), -1, count, *key.shape[-2:])
    return bool((groups == groups[..., :1, :, :]).all())


def _stand_in(block: nn.Module, keep: bool, attributes: Mapping[str, Any]) -> nn.Module:
    """A replica of ``block`` with random projections; other modules are copies, or do nothing unless ``keep``."""
    inside: dict[str, nn.Module | None] = {}
    for name, module in block._modules.items():
        if module is not None and is_linear(module):
            inside[name] = RandomProjection(*_features(module))
        else:
            inside[name] = copy.deepcopy(module).eval() if keep and module is not None else Unchanged()
    stand_in = replica(block, inside)
    stand_in.__dict__.update(attributes)
    return stand_in


def _attempts(block: nn.Module) -> Iterator[dict[str, Any]]:
    """Arguments for the forward of ``block``: what it takes is not known."""
    features = _in_features(block)
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    named = [parameter for parameter in parameters if parameter.kind not in (VAR_POSITIONAL, VAR_KEYWORD)]
    for kind, shape in product(KINDS, SHAPES if features and named else []):
        x = torch.zeros(*shape, features, device="cpu")
        given = {parameter.name: _argument(parameter, x, kind) for parameter in named[1:]}
        yield {named[0].name: x, **{name: value for name, value in given.items() if value is not EMPTY}}


def _in_features(block: nn.Module) -> int:
    layers = (module for module in block.modules() if is_linear(module) or is_pointwise(module))
    first = next(layers, None)
    return 0 if first is None else _features(first)[0]


def _features(layer: nn.Module) -> tuple[int, int]:
    """The features of the input and the output of a linear layer; the weight of a quantized one has another shape."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return parts_of(layer)[0].full_features(parameter_of(layer))


def _argument(parameter: inspect.Parameter, x: Tensor, kind: str) -> Any:
    """A value for an argument, by its name; the empty one where its default will do.

    Args:
        parameter: of the forward.
        x: the hidden states.
        kind: ``"first"``: other hidden states are given only where they are required; ``"states"``: always;
            ``"one rotation"``: positions are one tensor, not cosine and sine.
    """
    name = parameter.name.lower()
    required = parameter.default is EMPTY
    if any(word in name for word in POSITIONS):
        rotation = torch.ones(1, LENGTH, 1, device="cpu").as_subclass(Neutral)
        return rotation if kind == "one rotation" else (rotation, rotation)
    if any(word in name for word in LENGTHS) and required:
        return torch.tensor([0, LENGTH], device="cpu")
    if kind == "states" and any(word in name for word in STATES):
        return x
    if not required:
        return EMPTY
    last = name.rpartition("_")[2]
    if last in SIZES:
        return SIZES[last]
    return None if any(word in name for word in ABSENT) else x
