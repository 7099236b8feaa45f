"""AmplificationFactor: how much the update amplifies directions that the weight has already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lora.analysis.measures import Measure, measure
from lightning_lora.analysis.metric import QuantityMetric
from lightning_lora.analysis.plot import draw_series
from lightning_lora.analysis.updates import frozen_matrices, updates_of
from lightning_lora.ops.low_rank import truncated_svd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = {
    "delta_norm": r"$\Delta W$",
    "weight_directions": r"$W$ in its own directions",
    "update_directions": r"$W$ in directions of $\Delta W$",
    "random_directions": r"$W$ in random directions",
}


class AmplificationFactor(QuantityMetric):
    r"""How much each layer's update amplifies the directions that it acts on, compared with the weight (table 7).

    .. math:: \frac{\|\Delta W\|_F}{\|U^\top W V\|_F}

    U and V are the singular directions of ``delta = scale * B A``. The denominator is the part of W in the subspace of
    the update. It stands between two others with as many directions: those of W with the largest singular values, and
    random ones. A small value beside W's own says that the update amplifies what W does not emphasise; a large one
    beside the random ones, that it does not act just anywhere.

    W is the part of the frozen weight that the pair adapts, dequantized if it is quantized; after a merge it is the
    weight from before. Delta is not built. For random directions no subspace is drawn: over all of them the root mean
    square of the norm is :math:`k \|W\|_F / \sqrt{mn}`, for k directions and a matrix of m x n. The paper draws one.
    W's own directions take a truncated SVD of W: of a large matrix seconds on a CPU.

    Args:
        name: Name of the adapter to measure. None is the only one of the model.
        kwargs: As of :class:`torchmetrics.Metric`.

    ``update`` takes a module with adapters in it, live or merged, or a part of one. A later update replaces what was
    measured before. Under a strategy that shards, every rank must call it: weights are gathered one after the other.

    ``compute`` gives for each layer, by its name, a dictionary of ``factor`` (NaN where delta is zero),
    ``delta_norm``, ``weight_norm``, and the norm of W in three kinds of directions: ``update_directions``,
    ``weight_directions`` and ``random_directions``. They are numbers, or tensors of shape ``(experts,)`` for stacked
    experts.

    Raises:
        ValueError: If there are no adapters, or several and ``name`` is None, or a quantized weight is sharded.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 7.3, table 7 and appendix H.4.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = apply_lora(model, LoRAConfig(r=1, targets=["0"]))
        >>> with torch.no_grad():  # W has 10 and 1 on its diagonal, delta 3 in the second place
        ...     _ = model[0].weight.copy_(torch.diag(torch.tensor([10.0, 1.0])))
        ...     _ = model[0].lora["default"].A.copy_(torch.tensor([[0.0, 1.0]]))
        ...     _ = model[0].lora["default"].B.copy_(torch.tensor([[0.0], [3.0]]))
        >>> amplification = AmplificationFactor()
        >>> amplification.update(model)
        >>> result = amplification.compute()["0"]
        >>> [round(result[key].item(), 3) for key in ("factor", "update_directions", "weight_directions")]
        [3.0, 1.0, 10.0]
    """

    quantities = (
        "factor",
        "delta_norm",
        "weight_norm",
        "update_directions",
        "weight_directions",
        "random_directions",
    )

    def update(self, model: nn.Module) -> None:
        """Measure ``model``."""
        measures, values = measure(model, self.name), {}
        for update, matrix in frozen_matrices(model, updates_of(model, self.name)):
            values[update.name] = _quantities(measures[update.name], matrix)
        self.store_quantities({layer: values[layer] for layer in measures})

    def draw(self, values: Mapping[str, Any], ax: Axes) -> None:
        """Draw delta's norm by layer, and that of W in the three kinds of directions."""
        draw_series({label: {layer: each[key] for layer, each in values.items()} for key, label in DRAWN.items()}, ax)
        ax.set_ylabel(r"$\|U^\top W V\|_F$ and $\|\Delta W\|_F$")
        ax.set_title("What the update amplifies")


def _quantities(measured: Measure, matrix: Tensor) -> tuple[Tensor, ...]:
    random = measured.directions * measured.weight / (matrix.shape[-2] * matrix.shape[-1]) ** 0.5
    stack = matrix.reshape(-1, *matrix.shape[-2:])
    largest = [_top_norm(*each) for each in zip(stack, measured.directions.flatten().tolist(), strict=True)]
    own = torch.tensor(largest, dtype=random.dtype).view(random.shape)
    return (measured.amplification, measured.delta, measured.weight, measured.projected, own, random)


def _top_norm(matrix: Tensor, count: int) -> float:
    """The Frobenius norm of ``matrix`` in its first ``count`` singular directions."""
    precise = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    # A large matrix is decomposed from random vectors, drawn where it is; the stream of a run must not move.
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        energy = truncated_svd(precise, count).energy
    return float(torch.linalg.vector_norm(precise, dtype=torch.float64)) * math.sqrt(energy)
