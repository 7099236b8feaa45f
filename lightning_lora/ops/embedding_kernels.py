"""Triton kernel for the gradient of A of an embedding; imported only where Triton can be used.

torch sorts the indices, and finds where each begins: some twenty kernels, which take the host longer to launch than a
GPU to compute. Here each index is compared with every other one. The sums are in a fixed order, so the kernel is
deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.ops.gated_kernels import padded_rank


@triton.jit
def _sum_of_equal_indices(
    index, d_hidden, dA, n, r, columns, padding,
    BY_FREQUENCY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    rows, ranks = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, R)
    column = tl.load(index + rows, mask=rows < n, other=padding)
    total = tl.zeros((BM, R), tl.float32)
    count = tl.zeros((BM,), tl.int32)
    for start in range(0, n, BN):
        others = start + tl.arange(0, BN)
        same = column[:, None] == tl.load(index + others, mask=others < n, other=-1)[None, :]
        at = others[:, None] * r + ranks[None, :]
        g = tl.load(d_hidden + at, mask=(others < n)[:, None] & (ranks < r)[None, :], other=0.0)
        total = tl.dot(same.to(g.dtype), g, total)
        if BY_FREQUENCY:
            count += tl.sum(same.to(tl.int32), 1)
    if BY_FREQUENCY:
        total = total / count[:, None].to(tl.float32)
    writes = (rows < n) & (column != padding)  # every row of an index writes the same bits
    at = ranks[None, :].to(tl.int64) * columns + column[:, None]
    tl.store(dA + at, total, mask=writes[:, None] & (ranks < r)[None, :])


def column_gradient(
    d_hidden: Tensor, index: Tensor, columns: int, padding: int, by_frequency: bool, dtype: torch.dtype
) -> Tensor:
    """The sum of the rows of ``d_hidden`` that have one index, as a column, in ``dtype``; other columns are zero.

    Args:
        d_hidden: ``(n, r)``, in a half dtype; the sums are in fp32.
        index: ``(n,)``, contiguous.
        columns: of the result ``(r, columns)``.
        padding: an index whose column stays zero; -1 for none.
        by_frequency: whether each sum is divided by the number of its rows.
        dtype: of the result.
    """
    n, r = d_hidden.shape
    dA = torch.zeros(r, columns, dtype=dtype, device=d_hidden.device)
    _sum_of_equal_indices[(triton.cdiv(n, 32),)](
        index, d_hidden.contiguous(), dA, n, r, columns, padding, by_frequency, 32, 128, padded_rank(r)
    )
    return dA
