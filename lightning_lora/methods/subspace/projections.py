"""The rows of P for one parameter, as a product with z and, for the gradient, as a product with their transpose.

Columns of these rows have a mean square of 1, so with ``rows_in_all`` rows in the model and z divided by its square
root, P has columns of unit norm, and its entries are close to uncorrelated: ``P^T P`` is close to the identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from lightning_lora.methods.subspace.random_numbers import normals, permutation, random_bits, signs

NUMBERS_IN_CACHE = 2**17  # of a CPU: with larger chunks the passes over them wait for memory


def hadamard(x: Tensor) -> Tensor:
    """``H x`` in place, with the Hadamard matrix H of Sylvester's order, entries 1 and -1.

    Args:
        x: contiguous, of shape ``(2**k, columns)``.
    """
    size, columns = x.shape
    half = 1
    while half < size:
        upper, lower = x.view(size // (2 * half), 2, half * columns).unbind(1)
        difference = upper - lower
        upper += lower
        lower.copy_(difference)
        half *= 2
    return x


class Fastfood:
    """Blocks of ``H G S H B`` (Le, Sarlos and Smola 2013, arXiv 1408.3060), in O(rows log(dimension)) operations.

    B is a diagonal of random signs, S a permutation, G a diagonal of normal numbers, and H the Hadamard matrix of the
    power of two that z is padded to. Each block has its own B and G. One S for all blocks of a parameter is enough: it
    breaks the symmetry of ``H G H``, and two blocks are uncorrelated by their G. G has unit norm, so the columns of a
    whole block have a mean square of exactly 1; those of the last block, which is cut, have it on average.
    """

    @staticmethod
    def rows(z: Tensor, seed: int, rows: int) -> Tensor:
        """``P z`` for a parameter of this number of ``rows``."""
        width = _padded(len(z))
        z = torch.nn.functional.pad(z, (0, width - len(z)))[:, None]
        chunks = []
        for block in _blocks(seed, rows, width, z.device):
            x = hadamard(block.signs * z)
            chunks.append(hadamard(x[block.order] * block.scales).t().reshape(-1))
        return torch.cat(chunks)[:rows]

    @staticmethod
    def transposed(gradient: Tensor, seed: int, dimension: int) -> Tensor:
        """``P^T g`` for the ``gradient`` of one parameter, a vector."""
        width, rows = _padded(dimension), len(gradient)
        total = gradient.new_zeros(width)
        start = 0
        for block in _blocks(seed, rows, width, gradient.device):
            count = block.scales.shape[1]
            part = gradient[start : start + count * width]
            part = torch.nn.functional.pad(part, (0, count * width - len(part))).view(count, width)
            x = hadamard(part.t().contiguous()) * block.scales
            x = hadamard(torch.zeros_like(x).index_copy_(0, block.order, x))
            total += (x * block.signs).sum(1)
            start += count * width
        return total[:dimension]


class _Blocks(NamedTuple):
    """Some blocks of one parameter side by side: B and G of shape ``(width, blocks)``, and S."""

    signs: Tensor
    scales: Tensor
    order: Tensor


def _blocks(seed: int, rows: int, width: int, device: torch.device) -> Iterator[_Blocks]:
    """The blocks of a parameter, so many at a time that a CPU keeps them in its cache."""
    blocks = -(-rows // width)
    order = permutation(~seed, width, device)
    at_once = max(1, NUMBERS_IN_CACHE // width) if device.type == "cpu" else blocks
    for start in range(0, blocks, at_once):
        columns = torch.arange(start, min(blocks, start + at_once), dtype=torch.int32, device=device)
        places = torch.arange(width, dtype=torch.int32, device=device)[:, None] * blocks + columns
        bits = random_bits(seed, places)
        scales = normals(bits)
        scales *= scales.square().sum(0).rsqrt()
        yield _Blocks(signs(bits), scales, order)


def _padded(dimension: int) -> int:
    return max(2, 1 << (dimension - 1).bit_length())


class Dense:
    """Independent normal numbers, in O(rows * dimension) operations and memory: for small models.

    Each column is scaled to a mean square of exactly 1.
    """

    @staticmethod
    def rows(z: Tensor, seed: int, rows: int) -> Tensor:
        """``P z`` for a parameter of this number of ``rows``."""
        return (dense_matrix(seed, rows, len(z), z.device) * z).sum(1)

    @staticmethod
    def transposed(gradient: Tensor, seed: int, dimension: int) -> Tensor:
        """``P^T g`` for the ``gradient`` of one parameter, a vector."""
        return (dense_matrix(seed, len(gradient), dimension, gradient.device) * gradient[:, None]).sum(0)


def dense_matrix(seed: int, rows: int, dimension: int, device: torch.device) -> Tensor:
    """The rows of P for one parameter."""
    count = rows * dimension
    places = torch.arange(count + count % 2, dtype=torch.int32, device=device)
    matrix = normals(random_bits(seed, places))[:count].view(rows, dimension)
    return matrix * matrix.square().mean(0).rsqrt()


PROJECTIONS: dict[str, type[Fastfood] | type[Dense]] = {"fastfood": Fastfood, "dense": Dense}


def project(z: Tensor, seed: int, shape: torch.Size, projection: str) -> Tensor:
    """``P z`` for one parameter, differentiable by z; P is made again for the gradient, and never kept.

    Args:
        z: of the dimension of the subspace.
        seed: of the rows of P.
        shape: of the parameter.
        projection: ``"fastfood"`` or ``"dense"``.
    """
    delta: Tensor = _project(z, seed, shape, projection)
    return delta


# Operators of their own: a compiler would otherwise trace about a hundred operations for each parameter of a model.
@custom_op(
    "lightning_lora::project", mutates_args=(), schema="(Tensor z, int seed, SymInt[] shape, str kind) -> Tensor"
)
def _project(z: Tensor, seed: int, shape: Sequence[int], kind: str) -> Tensor:
    return PROJECTIONS[kind].rows(z, seed, math.prod(shape)).view(shape)


@custom_op("lightning_lora::project_back", mutates_args=(), schema="(Tensor g, int seed, int size, str kind) -> Tensor")
def _project_back(gradient: Tensor, seed: int, dimension: int, kind: str) -> Tensor:
    """The gradient of :func:`_project`, which is linear too: so it has a gradient of its own."""
    return PROJECTIONS[kind].transposed(gradient.reshape(-1), seed, dimension)


@_project.register_fake
def _(z: Tensor, seed: int, shape: Sequence[int], kind: str) -> Tensor:
    return z.new_empty(shape)


@_project_back.register_fake
def _(gradient: Tensor, seed: int, dimension: int, kind: str) -> Tensor:
    return gradient.new_empty(dimension)


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensor, ctx.seed, _, ctx.kind = inputs
    ctx.shape = tensor.shape


def _gradient_of_z(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    dense = gradient.to_dense() if gradient.is_sparse else gradient  # of an embedding with `sparse=True`
    return _project_back(dense, ctx.seed, ctx.shape[0], ctx.kind), None, None, None


def _gradient_of_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _project(gradient, ctx.seed, ctx.shape, ctx.kind), None, None, None


_project.register_autograd(_gradient_of_z, setup_context=_keep_arguments)
_project_back.register_autograd(_gradient_of_gradient, setup_context=_keep_arguments)
