"""UpdateRatio: how large each layer's update is, and its stable rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_lora.analysis.measures import measure
from lightning_lora.analysis.metric import QuantityMetric
from lightning_lora.analysis.plot import draw_by_layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class UpdateRatio(QuantityMetric):
    r"""The size of each layer's update ``delta = scale * B A`` beside its weight, and the stable rank of it.

    .. math::
        \frac{\|\Delta W\|_F}{\|W\|_F}
        \qquad
        \mathrm{srank}(\Delta W) = \frac{\|\Delta W\|_F^2}{\|\Delta W\|_2^2} \in [1, r]

    W is the part of the frozen weight that the pair adapts, such as the rows of query in a fused projection; of a
    quantized weight, the dequantized matrix. After a merge it is the weight from before. Neither delta nor W + delta is
    built.

    Args:
        name: Name of the adapter to measure. None is the only one of the model.
        kwargs: As of :class:`torchmetrics.Metric`.

    ``update`` takes a module with adapters in it, live or merged, or a part of one. A later update replaces what was
    measured before. Under a strategy that shards, every rank must call it: weights are gathered one after the other.

    ``compute`` gives for each layer, by its name, a dictionary of ``ratio``, ``stable_rank`` (NaN where delta is zero),
    ``delta_norm`` and ``weight_norm``: numbers, or tensors of shape ``(experts,)`` for stacked experts.

    Raises:
        ValueError: If there are no adapters, or several and ``name`` is None, or a quantized weight is sharded.

    Source: Hu et al. 2021 (arXiv 2106.09685), table 7, has the two norms; the stable rank is that of Rudelson and
    Vershynin 2007 (arXiv math/0503442).

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Sequential(nn.Linear(4, 4, bias=False))
        >>> _ = apply_lora(model, LoRAConfig(r=2, targets=["0"]))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.eye(4))
        ...     _ = model[0].lora["default"].A.copy_(torch.eye(2, 4))
        ...     _ = model[0].lora["default"].B.copy_(torch.eye(4, 2))
        >>> ratio = UpdateRatio()
        >>> ratio.update(model)
        >>> {key: round(value.item(), 3) for key, value in ratio.compute()["0"].items()}
        {'ratio': 0.707, 'stable_rank': 2.0, 'delta_norm': 1.414, 'weight_norm': 2.0}
    """

    quantities = ("ratio", "stable_rank", "delta_norm", "weight_norm")

    def update(self, model: nn.Module) -> None:
        """Measure ``model``."""
        measures = measure(model, self.name).items()
        self.store_quantities({layer: (m.ratio, m.stable_rank, m.delta, m.weight) for layer, m in measures})

    def draw(self, values: Mapping[str, Any], ax: Axes) -> None:
        """Draw the ratio by layer."""
        draw_by_layer({layer: each["ratio"] for layer, each in values.items()}, ax)
        ax.set_ylabel(r"$\|\Delta W\|_F\ /\ \|W\|_F$")
        ax.set_title("Size of the update")
