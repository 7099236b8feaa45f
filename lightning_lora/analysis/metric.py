"""Base of the metrics: numbers of each layer, in one tensor that is the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric


def of_first_rank(stacked: Tensor) -> Tensor:
    """The values of the first rank: every rank has measured the same."""
    return stacked[0]


class UpdateMetric(Metric):
    """A metric that holds what its last ``update`` measured; a later one replaces it.

    All ranks measure the same numbers, so ``compute`` does not gather them (``sync_on_compute=False``). Where it is
    asked to, the values of the first rank are taken and not added up.

    Args:
        kwargs: as of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = True  # the result of `forward` is that of its update
    quantities: ClassVar[tuple[str, ...]] = ()
    measured: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"sync_on_compute": False, **kwargs})
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

    def store_quantities(self, values: Mapping[str, Sequence[Tensor]]) -> None:
        """Keep one tensor for each of the quantities of the class, for each layer."""
        self.store({layer: torch.stack(list(quantities)) for layer, quantities in values.items()})

    def stored_quantities(self) -> dict[str, dict[str, Tensor]]:
        """What was kept, by the name of the layer and of the quantity."""
        return {layer: dict(zip(self.quantities, values, strict=True)) for layer, values in self.stored().items()}

    def reset(self) -> None:
        """Forget what was measured."""
        super().reset()
        self.shapes = {}
