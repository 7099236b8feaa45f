"""What a case of a layer is: how it is made and called, and where `scale * B @ A` belongs in the plain layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Matrix:
    """One adapted matrix: the parameter of the plain layer that holds it, and the shape of `B @ A`."""

    parameter: str
    shape: tuple[int, ...]
    place: Callable[[Tensor], Tensor] = lambda delta: delta
    """`B @ A` in the shape of the parameter."""


def call_with(plain: nn.Module, sums: dict[str, Tensor], inputs: tuple, others: dict) -> Any:
    return functional_call(plain, sums, inputs, others)


@dataclass(frozen=True)
class LayerCase:
    """`make` gives the plain layer, what it is called with, and keyword arguments."""

    make: Callable[[], tuple]
    matrices: Callable[[nn.Module], dict[str, Matrix]]
    """Of a plain layer: each matrix by the name of its adapter, without `.A` and `.B`."""
    call: Callable[..., Any] = call_with
    """The plain layer called with other values for its weights."""
    targets: list[str] | str = "layer"
    gradients: bool = True
    """Whether A's gradient is the one through the sum; one scaled by frequency is not."""
    same_bits_when_disabled: bool = True
    same_bits_in_inference: bool = True
