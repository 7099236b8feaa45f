"""Gradients that are all exactly zero: nothing trains, and no other check can tell.

The usual cause is a frozen output head whose weight is zero, as timm and torchvision initialize new heads. The gradient
of A is zero at the first step of every run, as B is zero, so it is the gradients of B and of the base that count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.distributed.sharded import is_partitioned, local_shard


def all_zero(parameters: Iterable[Tensor]) -> bool:
    """Whether every gradient of ``parameters`` is exactly zero on this rank; it stops at the first that is not."""
    return not any(bool(local_shard(p.grad).any()) for p in parameters if p.grad is not None)


def zero_gradients(model: nn.Module) -> str:
    """The warning, with the frozen modules of ``model`` that let no gradient through."""
    culprits = list(zero_modules(model))
    if not culprits:
        return (
            "Every gradient is exactly zero at the first step, so nothing trains. No frozen weight matrix is zero: "
            "does the loss depend on the model's output?"
        )
    shown = ", ".join(f"`{name}`" for name in culprits[:4])
    return (
        f"Every gradient is exactly zero at the first step, so nothing trains. {shown} is frozen and its weight is all "
        f"zeros, which lets no gradient through: train it too, also_train={culprits[:4]!r}."
    )


def zero_modules(model: nn.Module) -> Iterator[str]:
    """The modules of ``model`` with a frozen weight matrix of zeros."""
    for name, parameter in names.named_parameters(model):
        frozen = parameter.ndim > 1 and not parameter.requires_grad and not is_partitioned(parameter)
        if frozen and not parameter.is_meta and not bool(local_shard(parameter).any()):
            yield name.rpartition(".")[0] or name
