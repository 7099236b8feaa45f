"""LoRA for weights of many experts in one parameter, ``W_e + scale * B_e A_e``, and none of the sums is built.

The code of such a layer indexes the parameter, or hands it to a grouped product. What it reads here is a
:class:`StackedSum`, which takes part in those products as two thin ones beside the frozen one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class StackedSum:
    """``W + left @ right`` as torch's functions see it, for one matrix or a stack of them.

    Args:
        weight: ``(..., rows, columns)``.
        left: ``(..., rows, r)``.
        right: ``(..., r, columns)``.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        self.weight, self.left, self.right = weight, left, right

    def total(self) -> Tensor:
        """The sum itself, of the size of the weight: for what is not known to be linear in it."""
        return self.weight + self.left @ self.right

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch for every function of its that gets such a sum."""
        known = LINEAR.get(func)
        if known is not None:
            result = known(*args, **(kwargs or {})) if _expected(kwargs) else NotImplemented
            if result is not NotImplemented:
                return result
        args = [_total(value) for value in args]
        return func(*args, **{key: _total(value) for key, value in (kwargs or {}).items()})

    def _each(self, change: Callable[[Tensor], Tensor]) -> StackedSum:
        return StackedSum(change(self.weight), change(self.left), change(self.right))

    def __getitem__(self, index: Any) -> Any:
        """Some of the experts; any other part is a plain tensor."""
        plain = isinstance(index, (int, slice, list)) or (isinstance(index, Tensor) and index.dim() < 2)
        if self.weight.dim() == 3 and plain:
            return self._each(lambda matrices: matrices[index])
        return self.total()[index]

    def __len__(self) -> int:
        return len(self.weight)

    def __iter__(self) -> Any:
        return (self[index] for index in range(len(self)))

    def __matmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(self, x)  # type: ignore[arg-type]

    def transpose(self, dim0: int, dim1: int) -> Any:
        """The matrices turned; other dimensions of a plain tensor."""
        if {dim % self.weight.dim() for dim in (dim0, dim1)} == {self.weight.dim() - 1, self.weight.dim() - 2}:
            return StackedSum(self.weight.mT, self.right.mT, self.left.mT)
        return self.total().transpose(dim0, dim1)

    def t(self) -> Any:
        """The matrix turned."""
        return self.transpose(0, 1)

    @property
    def mT(self) -> Any:
        """The matrices turned."""
        return self.transpose(-1, -2)

    @property
    def T(self) -> Any:
        """All dimensions the other way round."""
        return self.mT if self.weight.dim() == 2 else self.total().permute(2, 1, 0)

    def to(self, *args: Any, **kwargs: Any) -> StackedSum:
        """In another dtype or on another device."""
        return self._each(lambda matrices: matrices.to(*args, **kwargs))

    def contiguous(self) -> StackedSum:
        """Itself, in contiguous memory."""
        return self._each(Tensor.contiguous)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "left", "right"):  # not yet there, in a copy
            raise AttributeError(name)
        # Shape, dtype, device and the like are the weight's; whatever gives values is asked of the sum.
        return getattr(self.weight if name in DESCRIBES else self.total(), name)


DESCRIBES = {"shape", "dtype", "device", "ndim", "dim", "size", "numel", "stride", "layout", "element_size", "data_ptr"}
DESCRIBES |= {"is_cuda", "is_meta", "is_nested", "is_contiguous", "is_floating_point"}


def _expected(kwargs: Mapping[str, Any] | None) -> bool:
    """Whether what is given by name is none of the factors."""
    return set(kwargs or {}) <= {"bias", "offs", "out_dtype"}


def _total(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_total, value))
    return value.total() if isinstance(value, StackedSum) else value


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, StackedSum) or isinstance(bias, StackedSum):
        return NotImplemented
    return F.linear(x, weight.weight, bias) + F.linear(F.linear(x, weight.right), weight.left)


def _product(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    def multiply(one: Any, other: Any) -> Any:
        if isinstance(one, StackedSum) and isinstance(other, StackedSum):
            return NotImplemented
        if 1 in (one.dim(), other.dim()):
            return NotImplemented
        if isinstance(one, StackedSum):
            return product(one.weight, other) + product(one.left, product(one.right, other))
        return product(one, other.weight) + product(product(one, other.left), other.right)

    return multiply


def _grouped(product: Callable[..., Tensor]) -> Callable[..., Any]:
    def multiply(x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, StackedSum):
            return NotImplemented
        more = -weight.left.shape[-1] % 8  # the kernels want rows of whole 16 bytes
        left, right = F.pad(weight.left, (0, more)), F.pad(weight.right.mT, (0, more)).mT
        hidden = product(x, left, *args, **kwargs)
        return product(x, weight.weight, *args, **kwargs) + product(hidden, right, *args, **kwargs)

    return multiply


def _einsum(equation: Any, *operands: Any) -> Any:
    """``W`` replaced by ``left`` and ``right`` beside it in the equation, the one that meets the others first."""
    flat = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    found = [place for place, operand in enumerate(flat) if isinstance(operand, StackedSum)]
    if not isinstance(equation, str) or len(found) != 1 or "->" not in equation or "." in equation:
        return NotImplemented
    inputs, output = equation.replace(" ", "").split("->")
    terms, (place,), free = inputs.split(","), found, next(c for c in "zyxwvutsr" if c not in equation)
    stacked, row, column, total = terms[place][:-2], terms[place][-2], terms[place][-1], flat[place]
    thin = [(stacked + row + free, total.left), (stacked + free + column, total.right)]
    others = [(term, operand) for at, (term, operand) in enumerate(zip(terms, flat, strict=True)) if at != place]
    if row in output:  # the columns are summed over: they come first
        thin.reverse()
    ordered = [*others, *thin]
    low_rank = torch.einsum(",".join(term for term, _ in ordered) + f"->{output}", *(operand for _, operand in ordered))
    return torch.einsum(equation, *(total.weight if at == place else o for at, o in enumerate(flat))) + low_rank


def _on_total(name: str) -> Callable[..., Any]:
    def operate(total: StackedSum, *others: Any) -> Any:
        return getattr(total.total(), name)(*map(_total, others))

    return operate


for _operator in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "pow", "lt", "gt"):
    setattr(StackedSum, f"__{_operator}__", _on_total(f"__{_operator}__"))

LINEAR: dict[Any, Callable[..., Any]] = {F.linear: _linear, torch.einsum: _einsum}
LINEAR |= {product: _product(product) for product in (torch.matmul, torch.mm, torch.bmm)}
LINEAR |= {getattr(Tensor, name): _product(torch.matmul) for name in ("matmul", "__matmul__", "mm", "bmm")}
for _owner, _name in ((F, "grouped_mm"), (torch, "_grouped_mm")):
    if hasattr(_owner, _name):
        LINEAR[getattr(_owner, _name)] = _grouped(getattr(_owner, _name))
