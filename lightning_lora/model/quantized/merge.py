"""The merge of adapters on a quantized base: ``W = W0 + scale * B A`` in a plain layer, and every other layer plain.

``W0`` is the dequantized weight, or a weight in full precision from a file. The sum is computed in fp32 (fp64 for
a file in fp64) and rounded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import is_sharded, is_split
from lightning_lora.foreign import KEPT_IN_FP32, QUANTIZING_LIBRARY, QUANTO, is_from
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, parameter_of, pop_adapters
from lightning_lora.layers.quantized.formats import dequantized, is_quantized, quantized_modules
from lightning_lora.model.freeze import adapter_parameters
from lightning_lora.model.merge_layer import deltas_of, matrices_in
from lightning_lora.model.quantized.base_file import BaseFile, is_transposed, open_base
from lightning_lora.model.quantized.packed import make_plain, pack_again, was_changed
from lightning_lora.model.record import Merged, MergedWeight, packed_layers, record_of
from lightning_lora.model.state import frozen_names
from lightning_lora.names import clean, each_module_once, join, named_parameters
from lightning_lora.ops import exact_sum as exact
from lightning_lora.ops.exact_sum import Squares
from lightning_lora.ops.workspace import Workspace


@dataclass(frozen=True)
class MergeBase:
    """What adapters on a quantized base are added to.

    Args:
        path: of the file or directory with the weights in full precision; ``None`` for the dequantized weights.
        dtype: of the plain layers; ``None`` for :func:`plain_dtype`.
        file: what is at ``path``, if it was opened already.
    """

    path: str | None = None
    dtype: torch.dtype | None = None
    file: BaseFile | None = None


@dataclass(frozen=True)
class PlainWeights:
    """The weights in full precision of the quantized layers of one model.

    Args:
        path: as of :class:`MergeBase`.
        dtype: of the plain layers.
        read: gives the weight of the layer of a name, ``(out_features, in_features)``.
        file: with the values that frozen biases had before bitsandbytes rounded them at the first call; ``None`` if
            there is none.
        frozen: the names of frozen parameters.
    """

    path: str | None
    dtype: torch.dtype
    read: Callable[[str, nn.Module], Tensor]
    file: BaseFile | None = None
    frozen: frozenset[str] = frozenset()

    def bias(self, name: str, layer: nn.Module) -> Tensor | None:
        """The plain bias of the layer ``name``."""
        bias = layer._parameters.get("bias")
        if bias is None:
            return None
        value = bias.detach()
        if self.file is not None and join(name, "bias") in self.frozen:
            value = self.file.bias(name, value, self.dtype)
        return value.to(self.dtype)

    @torch.no_grad()
    def merged(
        self, name: str, layer: nn.Module, adapters: list[Adapter], workspace: Workspace
    ) -> tuple[Tensor, float]:
        """The plain weight with the updates of ``adapters``, and the share of their norm that rounding lost."""
        start = self.read(name, layer)
        weight, squares = workspace.compute(partial(_sum, start, adapters, self.dtype))
        return weight.to(start.device), squares.lost()


def _sum(
    start: Tensor, adapters: list[Adapter], dtype: torch.dtype, workspace: Workspace
) -> tuple[Tensor, exact.Squares]:
    start = workspace.bring(start)
    start = start.to(torch.promote_types(start.dtype, torch.float32)).contiguous()
    if not adapters:
        return start.to(dtype), Squares()
    total, squares = torch.empty_like(start), Squares()
    matrices = adapters[0].part.matrices(start)
    for each in zip(matrices, deltas_of(adapters, start, start.device), matrices_in(total, matrices), strict=True):
        squares += exact.add_delta(*each, workspace)
    rounded = total.to(dtype)
    return rounded, squares + Squares(error=float((rounded - total).double().square().sum()))


def plain_weights(model: nn.Module, base: MergeBase) -> PlainWeights:
    """The weights in full precision of the quantized layers of ``model``.

    Raises:
        FileNotFoundError, ValueError: if they cannot be had, or are another model's; the message names the layer.
    """
    dtype = base.dtype or plain_dtype(model)
    if base.path is None or not quantized_modules(model):
        return PlainWeights(base.path, dtype, lambda name, layer: dequantized(layer))
    file = base.file or open_base(base.path, model)
    return PlainWeights(base.path, dtype, file.weight, file, frozenset(frozen_names(model)))


def plain_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of the parameters that are not quantized: their activations go through the plain layers.

    bitsandbytes' layers cast their input to a dtype of their own and their output back. A model of quantized layers
    alone gets that dtype, or fp32. What transformers keeps in fp32 does not count, as it casts its input.
    """
    quantized = [layer for _, layer in quantized_modules(model)]
    left_out = {id(parameter) for layer in quantized for parameter in layer._parameters.values()}
    left_out |= adapter_parameters(model).keys()
    sizes: Counter[torch.dtype] = Counter()
    kept = _kept_in_fp32(model)
    for name, parameter in named_parameters(model):
        if id(parameter) not in left_out and parameter.is_floating_point() and kept.isdisjoint(name.split(".")):
            sizes[parameter.dtype] += parameter.numel()
    own = next((getattr(layer, "compute_dtype", None) for layer in quantized), None)
    return max(sizes, key=sizes.__getitem__) if sizes else own or torch.float32


def _kept_in_fp32(model: nn.Module) -> set[str]:
    """Names of modules that transformers keeps in fp32 whatever the dtype of the model, such as ``wo`` in T5."""
    every = (getattr(module, key, None) for module in model.modules() for key in KEPT_IN_FP32)
    return {name for names in every for name in names or ()}


def merge_quantized_layer(
    name: str, layer: LoRALayer, weights: PlainWeights, workspace: Workspace, factors: Mapping[str, float] | None = None
) -> float:
    """Merge the adapters of the quantized ``layer`` into a plain weight; its packed one moves into the record.

    Every change is one of structure, which a journal undoes.

    Returns:
        The share of delta's norm that rounding lost.
    """
    factors = dict(layer.lora.strengths_now() if factors is None else factors)
    by_key = layer.lora.to_merge(factors)
    weight, lost = weights.merged(name, layer, by_key.get("weight", []), workspace)
    quantized, adapters = parameter_of(layer), pop_adapters(layer)
    packed = make_plain(layer, weight, weights.bias(name, layer), weights.path, workspace)
    record = MergedWeight([], packed.checksum, 0, shared=quantized)  # nothing is computed back
    record_of(layer).merged = Merged(adapters, dict.fromkeys(by_key, record), factors)
    return lost


def make_others_plain(model: nn.Module, weights: PlainWeights, workspace: Workspace) -> None:
    """Make every quantized layer of ``model`` plain that has no adapters."""
    for name, layer in quantized_modules(model):
        if not isinstance(layer, LoRALayer):
            weight, _ = weights.merged(name, layer, [], workspace)
            make_plain(layer, weight, weights.bias(name, layer), weights.path, workspace)


def pack_others_again(model: nn.Module, workspace: Workspace) -> str | None:
    """Make the plain layers of ``model`` that were quantized, and had no adapters, quantized again.

    Returns:
        ``None``; or the first weight that was changed since.
    """
    for name, layer, packed in packed_layers(model):
        if was_changed(layer, packed, workspace):
            return join(name, "weight")
        pack_again(layer)
    return None


def merge_base_of(model: nn.Module) -> MergeBase | None:
    """What adapters of ``model`` are merged into, if its base was quantized."""
    return next(
        (MergeBase(packed.source, parameter_of(layer).dtype) for _, layer, packed in packed_layers(model)), None
    )


def plain_values(
    model: nn.Module, weights: PlainWeights, factors: Mapping[str, float] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The weight and the bias of each quantized layer as a merge would write them, one at a time, by clean name."""
    workspace = Workspace()
    for name, layer in quantized_modules(model):
        adapters = layer.lora.to_merge(factors).get("weight", []) if isinstance(layer, LoRALayer) else []
        weight = weights.merged(name, layer, adapters, workspace)[0]
        yield join(name, "weight"), weight.T.contiguous() if is_transposed(layer) else weight
        bias = weights.bias(name, layer)
        if bias is not None:
            yield join(name, "bias"), bias


def why_not_plain(model: nn.Module) -> str | None:
    """Why the quantized layers of ``model`` cannot become plain ones; ``None`` if they can."""
    for name, layer in each_module_once(model):
        if is_quantized(layer) and is_from(type(layer), QUANTO):
            return (
                f"`{clean(name)}` is a layer of quanto, which cannot become a plain one. Call save_adapter(model, "
                "PATH), load the model without quantization, and call load_adapter(model, PATH) and merge_lora(model) "
                "there."
            )
        for key, parameter in layer._parameters.items():
            if is_quantized(layer) and parameter is not None and (is_sharded(parameter) or is_split(parameter)):
                return f"`{join(clean(name), key)}` is quantized and sharded: load and merge it on one device."
            if not is_quantized(layer) and is_from(type(parameter), QUANTIZING_LIBRARY):
                return (
                    f"`{join(clean(name), key)}` of a {type(layer).__name__} is quantized, and only linear layers can "
                    "be made plain: load this module without quantization."
                )
    return None
