"""Frozen weights kept in the dtype in which autocast computes, for the length of a run.

Under ``bf16-mixed`` a frozen fp32 weight is cast at every use, and its cast is kept for backward beside it. Kept in
bf16 it is read as it is, and every product has the bits that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.conv import LoRAConv
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.weight_reads import is_read_raw
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.targets.survey import memory_of

CAST_BY_AUTOCAST = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
ADDS_TO_IT = (LoRALinear.forward, LoRAConv.forward)


def lower(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> Callable[[], None]:
    """Cast ``parameters``, whose old values wait on the CPU; what is returned gives them back.

    What was written to meanwhile, such as weights that were loaded into the module, keeps what was written.
    """
    found: list[tuple[nn.Parameter, Tensor]] = []
    for parameter in parameters:
        found.append((parameter, parameter.data.cpu()))
        parameter.data = parameter.data.to(dtype)

    def restore() -> None:
        for parameter, value in found:
            now = parameter.data.cpu()
            kept = value if same_bits(now, value.to(dtype)) else now.to(value.dtype)
            parameter.data = kept.to(parameter.device)

    return restore


def cast_by_autocast(model: nn.Module) -> Iterator[nn.Parameter]:
    """The frozen fp32 parameters of ``model`` that autocast casts at every use, whoever uses them.

    These are weights and biases of linear layers and convolutions whose forward is torch's own or adds to its result:
    norms, embeddings, and weights that other code reads are none.
    """
    holders: dict[tuple[int, bool], list[tuple[str, nn.Module, str]]] = {}
    modules = dict(names.named_modules(model))
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(memory_of(module, key), []).append((name, module, key))
    for held in holders.values():
        _, module, key = held[0]
        parameter = module._parameters[key]
        assert parameter is not None
        frozen = parameter.dtype == torch.float32 and not parameter.requires_grad and not parameter.is_meta
        if frozen and all(_is_cast(one, k) and not is_read_raw(at, k, modules.get) for at, one, k in held):
            yield from {id(p): p for _, one, k in held if (p := one._parameters[k]) is not None}.values()


def _is_cast(module: nn.Module, key: str) -> bool:
    known = ADDS_TO_IT if isinstance(module, LoRALayer) else CAST_BY_AUTOCAST
    return key in ("weight", "bias") and "forward" not in vars(module) and type(module).forward in known
