"""Frozen weights in the dtype in which autocast computes, for the length of a run.

Under ``bf16-mixed`` autocast casts a frozen fp32 weight at every use, and autograd keeps the cast in addition to the
weight. A weight that is stored in bf16 is read without a cast, and every product is bit-identical.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.layers.base import LoRALayer, parameter_of
from lightning_lora.layers.conv import LoRAConv
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.weight_reads import WeightReads
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor
from lightning_lora.targets.survey import memory_of

CAST_BY_AUTOCAST = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
ADDS_TO_IT = (LoRALinear.forward, LoRAConv.forward)


class LoweredWeights:
    """Parameters in another dtype, with their old values on the CPU.

    Args:
        dtype: that other dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.originals: list[tuple[nn.Parameter, Tensor]] = []

    def lower(self, parameters: Iterable[nn.Parameter]) -> None:
        """Cast ``parameters``; the old value of each is kept before that."""
        for parameter in parameters:
            self.originals.append((parameter, parameter.data.cpu()))
            parameter.data = parameter.data.to(self.dtype)

    def restore(self) -> None:
        """Restore the old values; after an interrupt it goes on where it was.

        A parameter that was written to meanwhile, such as by a loaded state dict, keeps what was written, in its old
        dtype.
        """
        while self.originals:
            parameter, original = self.originals[-1]
            value = parameter.data.cpu()
            unchanged = same_bits(value, original.to(self.dtype))
            parameter.data = (original if unchanged else value.to(original.dtype)).to(parameter.device)
            self.originals.pop()


def cast_by_autocast(model: nn.Module) -> Iterator[nn.Parameter]:
    """The frozen fp32 parameters of ``model`` that autocast casts at every use.

    These are weights and biases of linear layers and convolutions whose forward is torch's own or adds to its result.
    Norms, embeddings, and weights that other code reads are not among them.
    """
    users: dict[tuple[int, bool], list[tuple[str, nn.Module, str]]] = {}
    modules = dict(names.named_modules(model))
    reads = WeightReads(modules)
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(memory_of(module, key), []).append((name, module, key))
    for sharing in users.values():
        parameters = [parameter_of(module, key) for _, module, key in sharing]
        first = parameters[0]
        if is_quantized_tensor(first):
            continue
        frozen = first.dtype == torch.float32 and not first.requires_grad and not first.is_meta
        if frozen and all(_is_cast(m, key) and not reads.is_read_raw(name, key) for name, m, key in sharing):
            yield from {id(parameter): parameter for parameter in parameters}.values()


def _is_cast(module: nn.Module, key: str) -> bool:
    forwards = ADDS_TO_IT if isinstance(module, LoRALayer) else CAST_BY_AUTOCAST
    return key in ("weight", "bias") and "forward" not in vars(module) and type(module).forward in forwards
