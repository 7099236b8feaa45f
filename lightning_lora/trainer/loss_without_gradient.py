"""A loss that requires no gradient: name what is frozen or cut off, before torch raises its own short error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.methods.base import Method
from lightning_lora.trainer.imports import MisconfigurationException
from lightning_lora.trainer.liveness import Liveness
from lightning_lora.trainer.optimizers import OptimizerSnapshot


def check_loss(
    loss: Tensor, model: nn.Module, method: Method, snapshots: Iterable[OptimizerSnapshot], liveness: Liveness | None
) -> None:
    """Raise if ``loss`` depends on nothing that trains.

    Args:
        loss: of this step, before its backward pass.
        model: the module that trains.
        method: what it is adapted by.
        snapshots: of its optimizers, before they were restricted.
        liveness: what is known of which adapters ran.

    Raises:
        MisconfigurationException: naming the adapters and why, and the frozen modules that the optimizers held.
    """
    if loss.requires_grad:
        return
    causes = [] if liveness is None else [liveness.causes()]
    for part in frozen_parts(snapshots, model, method):
        causes.append(f"`{part}` is frozen, and an optimizer held it before: to train it too, also_train=[{part!r}].")
    raise MisconfigurationException(
        "The loss requires no gradient: it depends on no adapter and on nothing that `also_train` names. "
        + " ".join(causes)
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
