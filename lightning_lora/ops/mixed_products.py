"""A and B of several pairs copied side by side, and the products of a mixed batch with them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.ops.mixture import Mixture
from lightning_lora.ops.packed.weight import Weight, matrix_of, product_of
from lightning_lora.ops.products import as_matrix, base_plus_low_rank, matmul
from lightning_lora.torch_internals import flattened


class Columns:
    """B of several layers of one form, with the columns of all pairs side by side, by one kernel for these layers.

    Args:
        flat: has every B of the layers, one after the other.
        start: where they begin in it.
        shape: ``(layers, pairs, out_features, r)``.
    """

    def __init__(self, flat: Tensor, start: int, shape: tuple[int, int, int, int]) -> None:
        _, pairs, outside, r = shape
        self.every_B = flat.as_strided(shape, (pairs * outside * r, outside * r, r, 1), start)
        self.made: Sequence[Tensor] | None = None

    def of_layer(self, index: int) -> Tensor:
        """``(out_features, pairs * r)``."""
        made = self.made  # another thread may reset it
        if made is None:
            made = self.made = self.every_B.transpose(1, 2).flatten(2).unbind()
        return made[index]


class PairCopies:
    """A and B of the pairs of one layer, as they are copied into a tensor in the dtype of the products.

    Args:
        flat: the tensor.
        starts: where the copies of every A and of every B of this layer begin in it.
        matrices: every A, ``(r, in_features)``, then every B, ``(out_features, r)``; r may differ.

    Attributes:
        ranks: of each pair.
        every_A: all rows of every A, ``(sum(ranks), in_features)``.
        columns: has all columns of every B, where all pairs have one rank; and the index of the layer in it.
        is_overwritten: whether the next forward pass writes its values into the same tensor.
    """

    is_overwritten = False
    columns: tuple[Columns, int] | None = None

    def __init__(self, flat: Tensor, starts: tuple[int, int], matrices: Sequence[Tensor]) -> None:
        self.flat, (start, self.start_of_B) = flat, starts
        self.ranks, self.inside, self.outside = _form(matrices)
        self.has_one_rank = len(set(self.ranks)) == 1
        self.every_A = flat.as_strided((sum(self.ranks), self.inside), (self.inside, 1), start)
        self._forms: dict[str, Tensor] = {}

    def forget_forms(self) -> None:
        """Called after the values were written again."""
        self._forms.clear()
        if self.columns is not None:
            self.columns[0].made = None

    def every_B(self) -> Tensor:
        """All columns of every B, ``(out_features, sum(ranks))``."""
        if self.columns is not None:
            columns, index = self.columns
            return columns.of_layer(index)
        if "columns" not in self._forms:
            self._forms["columns"] = torch.cat(self._each_B(), 1)
        return self._forms["columns"]

    def stacked_A(self) -> Tensor:
        """``(pairs, max(ranks), in_features)``; lower ranks end in rows of zeros."""
        if self.has_one_rank:
            return self.every_A.view(len(self.ranks), -1, self.inside)
        return self._padded("A", self.every_A.split_with_sizes(self.ranks), (max(self.ranks), self.inside))

    def stacked_B(self) -> Tensor:
        """``(pairs, out_features, max(ranks))``; lower ranks end in columns of zeros."""
        if self.has_one_rank:
            r, outside = self.ranks[0], self.outside
            return self.flat.as_strided((len(self.ranks), outside, r), (outside * r, r, 1), self.start_of_B)
        return self._padded("B", self._each_B(), (self.outside, max(self.ranks)))

    def _each_B(self) -> list[Tensor]:
        end = self.start_of_B + sum(self.ranks) * self.outside
        parts = self.flat[self.start_of_B : end].split_with_sizes([r * self.outside for r in self.ranks])
        return [part.view(self.outside, r) for part, r in zip(parts, self.ranks, strict=True)]

    def _padded(self, key: str, matrices: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        if key not in self._forms:
            total = self.flat.new_zeros(len(matrices), *shape)
            for place, matrix in zip(total, matrices, strict=True):
                place[: matrix.shape[0], : matrix.shape[1]].copy_(matrix)
            self._forms[key] = total
        return self._forms[key]


def _form(matrices: Sequence[Tensor]) -> tuple[tuple[int, ...], int, int]:
    """The rank of each pair, and the columns of every A and rows of every B."""
    count = len(matrices) // 2
    shapes = [A.shape for A in matrices[:count]]
    return tuple([shape[0] for shape in shapes]), shapes[0][1], matrices[count].shape[0]


class Layout:
    """The order in which A and B of several layers are copied: every A, then every B of the layers of each form.

    Args:
        layers: for each layer every A, then every B; all of one dtype on one device.
    """

    def __init__(self, layers: Sequence[Sequence[Tensor]]) -> None:
        self.layers = [_form(matrices) for matrices in layers]
        self.forms: dict[object, list[int]] = {}
        for index, (ranks, _, outside) in enumerate(self.layers):
            self.forms.setdefault((ranks, outside), []).append(index)

    def in_order(self, layers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The matrices of ``layers``, which have the same forms."""
        matrices = [A for each in layers for A in each[: len(each) // 2]]
        for indices in self.forms.values():
            matrices += [B for index in indices for B in layers[index][len(layers[index]) // 2 :]]
        return matrices

    def copies(self, flat: Tensor, layers: Sequence[Sequence[Tensor]]) -> list[PairCopies]:
        """The copies in ``flat``, which has the values of :meth:`in_order`."""
        ends = list(accumulate(sum(ranks) * inside for ranks, inside, _ in self.layers))
        starts, start = [0, *ends], ends[-1]
        copies: dict[int, PairCopies] = {}
        for indices in self.forms.values():
            ranks, _, outside = self.layers[indices[0]]
            has_one_rank = len(set(ranks)) == 1
            columns = Columns(flat, start, (len(indices), len(ranks), outside, ranks[0])) if has_one_rank else None
            for place, index in enumerate(indices):
                copies[index] = PairCopies(flat, (starts[index], start), layers[index])
                if columns is not None:
                    copies[index].columns = columns, place
                start += sum(ranks) * outside
        return [copies[index] for index in range(len(layers))]


def copies_of(layers: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[PairCopies]:
    """The copies of several layers, which a few kernels make for all of them.

    Args:
        layers: for each layer every A, then every B; all of one dtype on one device.
        dtype: of the products.
    """
    layout = Layout(layers)
    with torch.no_grad():
        flat = flattened(layout.in_order(layers)).to(dtype)
    return layout.copies(flat, layers)


class _WithCopies:
    """The products of a mixed batch with the pairs of one layer; ``hidden`` is ``c * scale * A x``.

    Args:
        mixture: which samples use which pairs.
        copies: of the pairs.
        scales: of each pair.
    """

    def __init__(self, mixture: Mixture, copies: PairCopies, scales: tuple[float, ...]) -> None:
        self.mixture, self.copies, self.scales = mixture, copies, scales


class BySample(_WithCopies):
    """Every sample has its own copies of the pairs that it uses.

    The copies cost less than the products where a sample has many positions.
    """

    def hidden(self, x: Tensor) -> Tensor:
        """``(samples, positions, slots * r)``."""
        return self._weighed(torch.bmm(self._by_sample(x), self._A().mT))

    def output(self, x: Tensor, weight: Weight, bias: Tensor | None, hidden: Tensor) -> Tensor:
        """As of :func:`lightning_lora.ops.products.base_plus_low_rank`."""
        B, base = self._B(), product_of(weight, x)
        if bias is None and base is None:
            y = torch.bmm(hidden, B.mT).view(*x.shape[:-1], B.shape[1]).data
            as_matrix(y).addmm_(as_matrix(x), matrix_of(weight).t())
            return y
        y = (F.linear(x, matrix_of(weight), bias) if base is None else base).data
        self._by_sample(y).baddbmm_(hidden, B.mT)
        return y

    def through_B(self, dy: Tensor) -> Tensor:
        """The gradient of ``A x``, ``(samples, positions, slots * r)``, by that of the output."""
        return self._weighed(torch.bmm(self._by_sample(dy), self._B()))

    def through_A(self, d_hidden: Tensor) -> Tensor:
        """The gradient of ``x``, ``(n, in_features)``, by that of ``A x``."""
        return as_matrix(torch.bmm(d_hidden, self._A()))

    def gradients_of_A(self, d_hidden: Tensor, x: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """The sums over the samples of each pair."""
        total = matmul(d_hidden.mT, self._by_sample(x), dtype)
        slots = total.view(self.mixture.size * self.mixture.slots, -1)
        dA = (self.mixture.sums(dtype) @ slots).view(self.mixture.pairs, -1, total.shape[-1])
        return self._of_ranks(dA, 1)

    def gradients_of_B(self, dy: Tensor, hidden: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """The sums over the samples of each pair."""
        size, slots = self.mixture.size, self.mixture.slots
        total = matmul(self._by_sample(dy).mT, hidden, dtype)
        outside = total.shape[1]
        if slots > 1:
            total = total.view(size, outside, slots, -1).transpose(1, 2)
        dB = self.mixture.sums(dtype) @ total.reshape(size * slots, -1)
        return self._of_ranks(dB.view(self.mixture.pairs, outside, -1), 2)

    def _of_ranks(self, total: Tensor, dim: int) -> Sequence[Tensor]:
        if self.copies.has_one_rank:
            return total.unbind()
        return [each.narrow(dim - 1, 0, r) for each, r in zip(total, self.copies.ranks, strict=True)]

    def _by_sample(self, x: Tensor) -> Tensor:
        return x.reshape(self.mixture.size, -1, x.shape[-1])

    def _weighed(self, hidden: Tensor) -> Tensor:
        c = self.mixture.of_slots(self.scales, max(self.copies.ranks), _at_least_fp32(hidden))
        return hidden if c is None else hidden.mul_(c)

    def _A(self) -> Tensor:
        """``(samples, slots * r, in_features)``."""
        gathered = self._gathered(self.copies.stacked_A())
        return gathered if self.mixture.slots == 1 else gathered.view(self.mixture.size, -1, gathered.shape[-1])

    def _B(self) -> Tensor:
        """``(samples, out_features, slots * r)``."""
        gathered = self._gathered(self.copies.stacked_B())
        if self.mixture.slots == 1:
            return gathered
        return gathered.view(self.mixture.size, self.mixture.slots, *gathered.shape[1:]).transpose(1, 2).flatten(2)

    def _gathered(self, stacked: Tensor) -> Tensor:
        """The matrix of each slot of each sample; zeros in an empty slot."""
        if self.mixture.has_empty_slots:
            stacked = F.pad(stacked, (0, 0, 0, 0, 0, 1))
        return stacked.index_select(0, self.mixture.rows)


class Stacked(_WithCopies):
    """All rows are multiplied with all pairs, and coefficients act on ``A x``: 0 for pairs that a sample does not use.

    This costs less than copies of the pairs for each sample where samples have few positions, or pairs are few. Unlike
    copies it lets values of a pair that are not finite reach every sample, as NaN.
    """

    def hidden(self, x: Tensor) -> Tensor:
        """``(samples, ..., sum(ranks))``."""
        return self._weighed(F.linear(x, self.copies.every_A))

    def output(self, x: Tensor, weight: Weight, bias: Tensor | None, hidden: Tensor) -> Tensor:
        """As of :func:`lightning_lora.ops.products.base_plus_low_rank`."""
        return base_plus_low_rank(x, weight, bias, hidden, self.copies.every_B())

    def through_B(self, dy: Tensor) -> Tensor:
        """``(n, sum(ranks))``."""
        return self._weighed(torch.mm(as_matrix(dy), self.copies.every_B()))

    def through_A(self, d_hidden: Tensor) -> Tensor:
        """The gradient of ``x``, ``(n, in_features)``, by that of ``A x``."""
        return torch.mm(d_hidden, self.copies.every_A)

    def gradients_of_A(self, d_hidden: Tensor, x: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """Rows of one product."""
        return matmul(d_hidden.t(), as_matrix(x), dtype).split_with_sizes(self.copies.ranks)

    def gradients_of_B(self, dy: Tensor, hidden: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """Columns of one product, each contiguous: a gradient with other strides is copied once more for each B."""
        dB = matmul(as_matrix(dy).t(), as_matrix(hidden), dtype)
        if not self.copies.has_one_rank:
            return [each.contiguous() for each in dB.split_with_sizes(self.copies.ranks, 1)]
        return dB.view(len(dB), self.mixture.pairs, -1).transpose(0, 1).contiguous().unbind()

    def _weighed(self, hidden: Tensor) -> Tensor:
        c = self.mixture.of_ranks(self.scales, self.copies.ranks, _at_least_fp32(hidden))
        hidden.view(self.mixture.size, -1, hidden.shape[-1]).mul_(c)
        return hidden


MixedProducts = BySample | Stacked


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
