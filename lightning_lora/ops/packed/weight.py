"""A frozen weight that is stored in fewer bits than a matrix has, such as in four.

The fused ops take one in place of W0. They compute the matrix at most once in forward and once in backward, and keep
neither: for backward they keep only this object, which refers to what is in memory anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class PackedWeight:
    """How to compute with a weight that is not a matrix.

    Args:
        stored: the tensor that holds it, which must not be written between forward and backward.
        dtype: of the matrix, and of the activations that it multiplies.
        matrix: computes W0, ``(out_features, in_features)``, in new memory.
        product: computes ``W0 x + b`` as the library that stores the weight does; ``None`` where it does so by the
            matrix.
    """

    __slots__ = ("dtype", "matrix", "product", "stored")
    requires_grad = False

    def __init__(
        self,
        stored: Tensor,
        dtype: torch.dtype,
        matrix: Callable[[], Tensor],
        product: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.stored, self.dtype, self.matrix, self.product = stored, dtype, matrix, product


Weight = Tensor | PackedWeight


def matrix_of(weight: Weight) -> Tensor:
    """W0 as a matrix: the tensor itself, or a new one."""
    return weight.matrix() if isinstance(weight, PackedWeight) else weight


def stored_in(weight: Weight) -> Tensor:
    """The tensor that holds W0."""
    return weight.stored if isinstance(weight, PackedWeight) else weight


def product_of(weight: Weight, x: Tensor) -> Tensor | None:
    """``W0 x + b`` where another library computes it without the matrix, else ``None``."""
    return weight.product(x) if isinstance(weight, PackedWeight) and weight.product is not None else None
