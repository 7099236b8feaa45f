"""Base of the metrics: numbers of each layer, in one tensor that is the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lora.analysis.plot import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def of_first_rank(stacked: Tensor) -> Tensor:
    """The values of the first rank: every rank has measured the same."""
    return stacked[0]


class UpdateMetric(Metric):
    """A metric that holds what its last ``update`` measured; a later one replaces it.

    All ranks measure the same numbers, so ``compute`` does not gather them (``sync_on_compute=False``). Where it is
    asked to, the values of the first rank are taken and not added up.

    Args:
        name: of the adapter to measure; ``None`` is the only one of the model.
        kwargs: as of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = True  # the result of `forward` is that of its update
    measured: Tensor

    def __init__(self, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(**{"sync_on_compute": False, **kwargs})
        self.name = name
        self.add_state("measured", torch.zeros(0), dist_reduce_fx=of_first_rank)
        self.shapes: dict[str, torch.Size] = {}

    def store(self, values: Mapping[str, Tensor]) -> None:
        """Keep a tensor for each layer, in fp32, in place of all that was kept before."""
        self.shapes = {name: value.shape for name, value in values.items()}
        flat = [value.flatten().to(self.measured.device, torch.float32) for value in values.values()]
        self.measured = torch.cat(flat) if flat else self.measured.new_zeros(0)

    def stored(self) -> dict[str, Tensor]:
        """What was kept, by the name of the layer."""
        parts = self.measured.split([shape.numel() for shape in self.shapes.values()])  # type: ignore[no-untyped-call]
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def compute(self) -> dict[str, Any]:
        """What was measured, by the name of the layer."""
        return self.stored()

    def plot(self, val: Mapping[str, Any] | None = None, ax: Axes | None = None) -> tuple[Figure | SubFigure, Axes]:
        """Draw the result, as the class says.

        Args:
            val: a result of ``compute``, or some layers of one; ``None`` calls it.
            ax: where to draw; ``None`` makes a figure.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        fig, ax = new_axes(ax)
        self.draw(self.compute() if val is None else val, ax)
        return fig, ax

    def draw(self, values: Mapping[str, Any], ax: Axes) -> None:
        """Draw ``values``, of the form of ``compute``, into ``ax``."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget what was measured."""
        super().reset()
        self.shapes = {}


class QuantityMetric(UpdateMetric):
    """A metric of several numbers for each layer.

    Attributes:
        quantities: their names.
    """

    quantities: ClassVar[tuple[str, ...]]

    def store_quantities(self, values: Mapping[str, Sequence[Tensor]]) -> None:
        """Keep one tensor for each of the quantities of the class, for each layer."""
        self.store({layer: torch.stack(list(quantities)) for layer, quantities in values.items()})

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """What was measured, by the name of the layer and of the quantity."""
        return {layer: dict(zip(self.quantities, values, strict=True)) for layer, values in self.stored().items()}
