"""``W0 x + b + scale * B (c * (A x))`` where samples use different pairs, as one node of autograd on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import check_unmodified, without_autocast
from lightning_lora.ops.fused_linear import PLAIN, can_fuse, undropped
from lightning_lora.ops.mixed_products import BySample, MixedProducts, PairCopies, Stacked, copies_of
from lightning_lora.ops.mixture import Mixture
from lightning_lora.ops.packed.weight import Weight, matrix_of, stored_in
from lightning_lora.ops.products import as_matrix, like
from lightning_lora.torch_internals import apply_of, is_batched, saved_tensors_have_hooks, versions_of

MAX_STACKED = 1024  # positions of a sample times pairs; measured on an H200 with 64 samples and r = 16


def can_mix(x: Tensor, weight: Weight, bias: Tensor | None, matrices: Sequence[Tensor], mixture: Mixture) -> bool:
    """Whether :class:`MixedLinear` can be used: as the fused op of one pair.

    Args:
        x: the input.
        weight: W0.
        bias: of the layer.
        matrices: every A, then every B.
        mixture: which samples use which pair.
    """
    return (
        mixture.is_used
        and x.dim() > 1
        and x.shape[0] == mixture.size
        and PLAIN.issuperset(map(type, matrices))
        and can_fuse(x, weight, bias, matrices[0], matrices[-1])
    )


class MixedLinear(torch.autograd.Function):
    """The sum for a batch whose samples use different pairs.

    Saved for backward are ``x``, with dropout the dropped input and its mask, and ``A x``; the copies of A and B are
    kept, but no copies of them for each sample.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        constants: tuple[Weight, MixedProducts, float],
        *matrices: Tensor,
    ) -> Any:
        """``(samples, ..., in_features)`` to ``(samples, ..., out_features)``; with dropout also the dropped input.

        Args:
            ctx: the node.
            x: in the dtype of W0, contiguous.
            bias: ``(out_features,)``.
            constants: W0, the products with the copies of A and B, and the probability of dropout.
            matrices: every A, then every B.
        """
        weight, products, p = constants
        x_of_A, mask = torch.native_dropout(x, p, True) if p else (x, None)
        hidden = products.hidden(x_of_A)
        y = products.output(x, weight, bias, hidden)
        ctx.save_for_backward(x_of_A, mask, None if saved_tensors_have_hooks() else hidden)
        ctx.matrices, ctx.versions = matrices, versions_of(stored_in(weight), *matrices)
        ctx.constants = constants
        if not p:
            return y
        ctx.set_materialize_grads(False)
        return y, x_of_A

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor | None, d_dropped: Tensor | None = None) -> Any:
        """The gradients of the inputs; those of A and B in their own dtype."""
        x, mask, hidden = ctx.saved_tensors
        weight, products, p = ctx.constants
        needs_dx, needs_db, _, *needs = ctx.needs_input_grad
        if dy is None:  # only a second derivative goes this way
            dx = None if d_dropped is None else undropped(d_dropped, mask, p)
            return dx, None, None, *[None] * len(needs)
        again = torch.is_grad_enabled() or is_batched(dy) or d_dropped is not None
        _check(ctx, needs_dx, again)
        db = as_matrix(dy).sum(0) if needs_db else None
        if again:
            scales, mixture = products.scales, products.mixture
            base, low, gradients = differentiable_gradients(dy, x, matrix_of(weight), ctx.matrices, scales, mixture)
            low = low if d_dropped is None else low + d_dropped
            return base + (low if mask is None else undropped(low, mask, p)), db, None, *gradients
        dy = dy if dy.is_contiguous() else dy.contiguous()
        d_hidden, dx = products.through_B(dy), None
        if needs_dx:
            low = products.through_A(d_hidden)
            low = low if mask is None else undropped(low, as_matrix(mask), p)
            dx = like(low.addmm_(as_matrix(dy), matrix_of(weight)), x)
        return dx, db, None, *_gradients_of_pairs(ctx, dy, d_hidden, x, hidden)


def _check(ctx: Any, needs_dx: bool, again: bool) -> None:
    """Raise if W0, or A or B that a second derivative reads, were modified since forward."""
    weight, versions = stored_in(ctx.constants[0]), ctx.versions
    if needs_dx:
        check_unmodified(weight, versions[0])
    for matrix, version in zip(ctx.matrices, versions[1:], strict=True) if again else ():
        check_unmodified(matrix, version)


def _gradients_of_pairs(
    ctx: Any, dy: Tensor, d_hidden: Tensor, x: Tensor, hidden: Tensor | None
) -> list[Tensor | None]:
    """The gradients of every A, then of every B; ``None`` where not needed."""
    products, matrices, needs = ctx.constants[1], ctx.matrices, ctx.needs_input_grad[3:]
    count = len(matrices) // 2
    every_dA: Sequence[Tensor | None] = [None] * count
    every_dB: Sequence[Tensor | None] = [None] * count
    if any(needs[:count]):
        every_dA = products.gradients_of_A(d_hidden, x, matrices[0].dtype)
    if any(needs[count:]):
        hidden = products.hidden(x) if hidden is None else hidden
        every_dB = products.gradients_of_B(dy, hidden, matrices[count].dtype)
    gradients = [*every_dA, *every_dB]
    if all(needs):
        return gradients
    return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]


def differentiable_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, matrices: Sequence[Tensor], scales: Sequence[float], mixture: Mixture
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The two parts of the gradient of ``x``, those of W0 and of every A, then the gradients of every A and B.

    Autograd can record these products, and ``torch.func`` batch them.
    """
    rows, dy_rows, count = as_matrix(x), as_matrix(dy), len(matrices) // 2
    coefficients = mixture.of_samples(x.dtype).view(mixture.size, -1).repeat_interleave(len(rows) // mixture.size, 0)
    low, every_dA, every_dB = torch.zeros_like(rows), [], []
    for pair in range(count):
        A, B, c = matrices[pair], matrices[count + pair], scales[pair] * coefficients[:, pair : pair + 1]
        d_hidden = c * (dy_rows @ B.to(x.dtype))
        low = low + d_hidden @ A.to(x.dtype)
        every_dA.append((d_hidden.t() @ rows).to(A.dtype))
        every_dB.append((dy_rows.t() @ (c * (rows @ A.to(x.dtype).t()))).to(B.dtype))
    return like(dy_rows @ weight, x), like(low, x), [*every_dA, *every_dB]


_apply = apply_of(MixedLinear)


def mixed_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    matrices: Sequence[Tensor],
    scales: Sequence[float],
    mixture: Mixture,
    p: float = 0.0,
    copies: PairCopies | None = None,
    products: type[MixedProducts] | None = None,
) -> Tensor:
    """The output of :class:`MixedLinear`.

    Args:
        x: ``(samples, ..., in_features)``, contiguous.
        weight: W0.
        bias: of the layer.
        matrices: every A, then every B.
        scales: of each pair.
        mixture: which samples use which pair.
        p: probability of dropout on the input of every A.
        copies: of the matrices, in the dtype of ``x``; made if they are not given.
        products: how to multiply; chosen by sizes if it is not given.
    """
    copies = copies_of([matrices], x.dtype)[0] if copies is None else copies
    products = products or (Stacked if is_stacked(x, mixture) else BySample)
    made = products(mixture, copies, tuple(scales))
    if not (p or torch.is_grad_enabled()):  # a node that records nothing takes a third of the time of a small layer
        return made.output(x, weight, bias, made.hidden(x))
    y: Any = _apply(x, bias, (weight, made, p), *matrices)
    output: Tensor = y[0] if p else y
    return output


def is_stacked(x: Tensor, mixture: Mixture) -> bool:
    """Whether every pair for every row costs less than copies of the pairs for each sample.

    For each sample the former is ``positions * pairs * r * (in + out)`` multiplications, the latter ``r * (in + out)``
    numbers that are written and read, by a few kernels more.
    """
    positions = x.numel() // (x.shape[-1] * mixture.size)
    return positions * mixture.pairs <= MAX_STACKED
