"""A run in which nothing can train, and torch does not say why: name what is frozen or cut off.

The loss may require no gradient, or every gradient may be exactly zero. The usual cause of the second is a frozen
output head whose weight is zero, as timm and torchvision initialize new heads. The gradient of A is zero at the first
step of every run, as B is zero, so it is the gradients of B and of the base that count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import NoReturn

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.distributed.sharded import is_partitioned, local_shard
from lightning_lora.methods.base import Method
from lightning_lora.trainer.imports import MisconfigurationException
from lightning_lora.trainer.optimizers import OptimizerSnapshot


def refuse_loss(
    model: nn.Module, method: Method, snapshots: Iterable[OptimizerSnapshot], causes: Iterable[str]
) -> NoReturn:
    """Raise for a loss that requires no gradient, before its backward pass.

    Args:
        model: the module that trains.
        method: what it is adapted by.
        snapshots: of its optimizers, before they were restricted.
        causes: why no adapter would get a gradient, where that is known.

    Raises:
        MisconfigurationException: naming the adapters and why, and the frozen modules that the optimizers held.
    """
    frozen = [
        f"`{part}` is frozen, and an optimizer held it before: to train it too, also_train=[{part!r}]."
        for part in frozen_parts(snapshots, model, method)
    ]
    adapters = "no adapter and on nothing that `also_train` names"
    what = adapters if next(iter(method.added_parameters(model)), None) else "nothing that trains"
    raise MisconfigurationException(
        f"The loss requires no gradient: it depends on {what}. " + " ".join([*causes, *frozen])
    )


def frozen_parts(snapshots: Iterable[OptimizerSnapshot], model: nn.Module, method: Method) -> Iterator[str]:
    """The modules that one optimizer alone held, and in which nothing trains now."""
    label = {id(parameter): name for name, parameter in names.named_parameters(model)}
    trained = [name for name, _ in method.trained_parameters(model)]
    for snapshot in snapshots:
        part = common_module([label[id(p)] for p in snapshot.parameters() if id(p) in label])
        if part and not any(name.startswith(f"{part}.") for name in trained):
            yield part


def common_module(parameters: Iterable[str]) -> str:
    """The name of the innermost module that all ``parameters`` lie in; the model itself has the empty name.

    Example:
        >>> common_module(["net.head.weight", "net.head.bias"])
        'net.head'
    """
    paths = [name.split(".")[:-1] for name in parameters]
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


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
        f"Every gradient is exactly zero at the first step, so nothing trains. A frozen weight of zeros, as of {shown}"
        f", lets no gradient through: train it too, also_train={culprits[:4]!r}."
    )


def zero_modules(model: nn.Module) -> Iterator[str]:
    """The modules of ``model`` with a frozen weight matrix of zeros."""
    for name, parameter in names.named_parameters(model):
        frozen = parameter.ndim > 1 and not parameter.requires_grad and not is_partitioned(parameter)
        if frozen and not parameter.is_meta and not bool(local_shard(parameter).any()):
            yield name.rpartition(".")[0] or name
