"""LoRA for the weights of many experts in one parameter, ``W_e + scale * B_e A_e``, without building the sums.

The code of such a layer indexes the parameter or passes it to a grouped product. It reads a :class:`StackedSum`
instead, whose products are the frozen one plus two of rank r.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class StackedSum:
    """``W + left @ right`` for one matrix or a stack of them, as an argument of torch's functions.

    Args:
        weight: W, ``(..., rows, columns)``.
        left: ``(..., rows, r)``.
        right: ``(..., r, columns)``.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        self.weight, self.left, self.right = weight, left, right
        self.wants_gradient = torch.is_grad_enabled() and left.requires_grad

    def materialize(self) -> Tensor:
        """The sum as a tensor, of the size of the weight: for functions that are not known to be linear in it."""
        self._check_gradient()
        return self.weight + self.left @ self.right

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch for every function of torch that gets a :class:`StackedSum`."""
        sums = [value for value in args if isinstance(value, StackedSum)]
        for value in sums:
            value._check_gradient()
        if func in LINEAR_FUNCTIONS and len(sums) == 1 and set(kwargs or {}) <= NOT_FACTORS:
            result = LINEAR_FUNCTIONS[func](*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        args = [_materialized(value) for value in args]
        return func(*args, **{key: _materialized(value) for key, value in (kwargs or {}).items()})

    def _check_gradient(self) -> None:
        """Raise inside of a user's autograd function, which hands gradients to tensors alone."""
        if not torch.compiler.is_compiling() and self.wants_gradient and not torch.is_grad_enabled() and _in_function():
            raise RuntimeError(
                "A parameter of three dimensions that LoRA adapts was passed to a torch.autograd.Function, which would "
                "give its adapters no gradient. Leave it out with `exclude`, or read it in a method of its own module "
                "that calls `.apply`: there the sum is built."
            )

    def _map(self, function: Callable[[Tensor], Tensor]) -> StackedSum:
        self._check_gradient()
        return StackedSum(function(self.weight), function(self.left), function(self.right))

    def __getitem__(self, index: Any) -> Any:
        """Some of the experts; any other index gives a plain tensor."""
        selects_experts = isinstance(index, (int, slice, list)) or (isinstance(index, Tensor) and index.dim() < 2)
        if self.weight.dim() == 3 and selects_experts:
            return self._map(lambda matrices: matrices[index])
        return self.materialize()[index]

    def __len__(self) -> int:
        return len(self.weight)

    def __matmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(self, x)  # type: ignore[arg-type]

    def transpose(self, dim0: int, dim1: int) -> Any:
        """Transposed matrices; for other dimensions a plain tensor."""
        if {dim % self.weight.dim() for dim in (dim0, dim1)} == {self.weight.dim() - 1, self.weight.dim() - 2}:
            return self.mT
        return self.materialize().transpose(dim0, dim1)

    def t(self) -> Any:
        """The transposed matrix."""
        return self.transpose(0, 1)

    @property
    def mT(self) -> StackedSum:
        """The transposed matrices."""
        self._check_gradient()
        return StackedSum(self.weight.mT, self.right.mT, self.left.mT)

    @property
    def T(self) -> Any:
        """All dimensions in reverse order."""
        return self.mT if self.weight.dim() == 2 else self.materialize().permute(2, 1, 0)

    def to(self, *args: Any, **kwargs: Any) -> StackedSum:
        """The sum in another dtype or on another device."""
        return self._map(lambda matrices: matrices.to(*args, **kwargs))

    def contiguous(self) -> StackedSum:
        """The sum in contiguous memory."""
        return self._map(Tensor.contiguous)

    def __getattr__(self, name: str) -> Any:
        # Shape, dtype, device and the like are those of the weight; whatever gives values needs the sum.
        return getattr(self.weight if name in DESCRIBES else self.materialize(), name)


def _in_function() -> bool:
    """Whether the forward of an autograd function is running."""
    apply, frame = torch.autograd.Function.apply.__func__.__code__, sys._getframe()  # type: ignore[attr-defined]
    outer: FrameType | None = frame
    while outer is not None:
        if outer.f_code is apply:
            return True
        outer = outer.f_back
    return False


DESCRIBES = {"shape", "dtype", "device", "ndim", "dim", "size", "numel", "stride", "layout", "element_size", "data_ptr"}
DESCRIBES |= {"is_cuda", "is_meta", "is_nested", "is_contiguous", "is_floating_point"}

NOT_FACTORS = {"bias", "offs", "out_dtype"}  # keyword arguments


def _materialized(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_materialized, value))
    return value.materialize() if isinstance(value, StackedSum) else value


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, StackedSum):
        return NotImplemented
    return F.linear(x, weight.weight, bias) + F.linear(F.linear(x, weight.right), weight.left)


def _product(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    def multiply(a: Any, b: Any) -> Any:
        if 1 in (a.dim(), b.dim()):
            return NotImplemented
        if isinstance(a, StackedSum):
            return product(a.weight, b) + product(a.left, product(a.right, b))
        return product(a, b.weight) + product(product(a, b.left), b.right)

    return multiply


def _grouped(product: Callable[..., Tensor]) -> Callable[..., Any]:
    def multiply(x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        padding = -weight.left.shape[-1] % 8  # the kernels need rows of a multiple of 16 bytes
        left, right = F.pad(weight.left, (0, padding)), F.pad(weight.right.mT, (0, padding)).mT
        hidden = product(x, left, *args, **kwargs)
        return product(x, weight.weight, *args, **kwargs) + product(hidden, right, *args, **kwargs)

    return multiply


def _einsum(equation: Any, *operands: Any) -> Any:
    """The einsum with W, plus one with ``left`` and ``right`` in its place, in the order with small intermediates."""
    if "->" not in equation or "." in equation:
        return NotImplemented
    place = next(place for place, operand in enumerate(operands) if isinstance(operand, StackedSum))
    inputs, output = equation.replace(" ", "").split("->")
    terms, rank = inputs.split(","), next(c for c in "zyxwvutsr" if c not in equation)
    stacked, row, column, weight = terms[place][:-2], terms[place][-2], terms[place][-1], operands[place]
    factors = [(stacked + row + rank, weight.left), (stacked + rank + column, weight.right)]
    others = [(term, operand) for at, (term, operand) in enumerate(zip(terms, operands, strict=True)) if at != place]
    if row in output:  # the columns are summed over: the factor that has them comes first
        factors.reverse()
    ordered = [*others, *factors]
    low_rank = torch.einsum(",".join(term for term, _ in ordered) + f"->{output}", *(operand for _, operand in ordered))
    return torch.einsum(equation, *(weight.weight if at == place else o for at, o in enumerate(operands))) + low_rank


def _on_materialized(name: str) -> Callable[..., Any]:
    def operate(weight: StackedSum, *others: Any) -> Any:
        return getattr(weight.materialize(), name)(*map(_materialized, others))

    return operate


for _operator in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "pow", "lt", "gt"):
    setattr(StackedSum, f"__{_operator}__", _on_materialized(f"__{_operator}__"))

LINEAR_FUNCTIONS: dict[Any, Callable[..., Any]] = {F.linear: _linear, torch.einsum: _einsum}
LINEAR_FUNCTIONS |= {product: _product(product) for product in (torch.matmul, torch.mm, torch.bmm)}
LINEAR_FUNCTIONS |= {getattr(Tensor, name): _product(torch.matmul) for name in ("matmul", "__matmul__", "mm", "bmm")}
for _owner, _name in ((F, "grouped_mm"), (torch, "_grouped_mm")):
    if hasattr(_owner, _name):
        LINEAR_FUNCTIONS[getattr(_owner, _name)] = _grouped(getattr(_owner, _name))
