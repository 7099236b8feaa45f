"""How what is added acts on the output of a module: the classes that the modules get, whatever the method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.layers.adapted import Adapted, added_to


class PassedInput:
    """The input of an MLP on its way to what was added to the last layer, while the layers between run."""

    value: Tensor | None = None
    grad_enabled: bool = False

    def put(self, x: Tensor) -> None:
        """Keep ``x`` until it is taken."""
        self.value, self.grad_enabled = x, torch.is_grad_enabled()

    def take(self, site: str) -> Tensor:
        """The input that was put last, for what was added to ``site``."""
        x, self.value = self.value, None
        if x is None:
            raise RuntimeError(
                f"`{site}` was called, but not the first layer of its MLP, whose input is read here. Take "
                "placement='pfeiffer', which reads the output."
            )
        if self.grad_enabled != torch.is_grad_enabled():
            raise RuntimeError(
                f"A part of the MLP that ends in `{site}` is checkpointed without the rest, so gradients of its input "
                "would be lost. Checkpoint the whole block, or take placement='pfeiffer'."
            )
        return x

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no activations."""
        return {}


class Entry(nn.Module):
    """What is added to the first layer of an MLP: it has no parameters, and passes the input on.

    Args:
        passed: where the input goes.
    """

    def __init__(self, passed: PassedInput) -> None:
        super().__init__()
        self.passed = passed


class AtSite(nn.Module):
    """Base of what is added to a module and changes its output.

    Attributes:
        site: name of the module, for errors.
        features: number of features of the output.
        channel_dim: the dimension of the features.
        passed: where the input of an MLP comes from, if the module is not all of it.
    """

    site: str
    features: int
    channel_dim: int
    passed: PassedInput | None = None

    def add(self, y: Tensor, x: Tensor, update: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``y + update(y, x)``, where ``update`` gets and gives features in the last dimension."""
        dim = self.channel_dim
        if y.shape[dim] != self.features or x.shape[dim] != self.features:
            raise RuntimeError(
                f"What was added to `{self.site}` acts on {self.features} features, but the input has shape "
                f"{tuple(x.shape)} and the output {tuple(y.shape)}. Leave the module out: exclude=[{self.site!r}]."
            )
        if dim == -1:
            # A mixture of experts may take (batch, length, features) and return (tokens, features).
            return y + update(y.reshape(x.shape), x).to(y.dtype).reshape(y.shape)
        return y + update(y.movedim(dim, -1), x.movedim(dim, -1)).movedim(-1, dim).to(y.dtype)


class AfterModule(Adapted):
    """A module whose output goes through what was added."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module, or its first element, through what was added."""
        child = cast(AtSite, added_to(self))
        return on_first(super().forward(*args, **kwargs), child, child.site)


class AfterMLP(Adapted):
    """The last layer of an MLP, or all of it: what was added reads the input of the MLP too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the MLP through what was added."""
        output = super().forward(*args, **kwargs)
        child = cast(AtSite, added_to(self))
        x = first_argument(args, kwargs) if child.passed is None else child.passed.take(child.site)
        return on_first(output, lambda y: cast(Tensor, child(y, x)), child.site)


class MLPEntry(Adapted):
    """The first layer of an MLP, whose input goes to the last one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the layer; its input is passed on."""
        cast(Entry, added_to(self)).passed.put(first_argument(args, kwargs))
        return super().forward(*args, **kwargs)


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a call, by position or by name."""
    return cast(Tensor, args[0] if args else next(iter(kwargs.values())))


def on_first(output: Any, change: Callable[[Tensor], Tensor], site: str) -> Any:
    """``output`` with ``change`` applied to it, or to the first element of a tuple or list."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        changed = (change(output[0]), *output[1:])
        return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)
    raise TypeError(
        f"The output of `{site}` must be a tensor, or a tuple that starts with one, but got a "
        f"{type(output).__name__}. Leave the module out: exclude=[{site!r}]."
    )
