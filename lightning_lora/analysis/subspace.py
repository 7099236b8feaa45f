"""SubspaceSimilarity: how much of its subspace one adapter shares with another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_lora.analysis.decomposition import directions
from lightning_lora.analysis.metric import UpdateMetric
from lightning_lora.analysis.plot import draw_grid
from lightning_lora.analysis.sources import Source, matrices_of, same_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class SubspaceSimilarity(UpdateMetric):
    r"""How much of the subspace of an adapter's first i directions lies in that of another's first j (equation 4).

    .. math:: \phi(A_1, A_2, i, j) = \frac{\|U_1^{i\top} U_2^j\|_F^2}{\min(i, j)} \in [0, 1]

    The columns of :math:`U_1^i` are the first i right singular directions of :math:`A_1`. 1 means that one subspace
    contains the other, 0 that they are orthogonal. For two random subspaces of n features it is about
    :math:`\max(i, j) / n`. The two sides may be two ranks (figure 3 of the paper), two seeds (figure 4), two steps of
    one run, or two adapters of one model.

    Args:
        matrix: "A" for its right singular directions, as in the paper; "B" for its left ones.
        name: Name of the adapter on both sides. None is the only one.
        second_name: Name of the adapter on the second side, where it is another one. None is ``name``.
        kwargs: As of :class:`torchmetrics.Metric`.

    ``update`` takes two sides. Each is a module with adapters in it, live or merged; the path of a directory in PEFT's
    format, or of its safetensors file; or a state dict, such as ``lora_state_dict(model)`` or the ``"state_dict"`` of a
    run's checkpoint. Layers that only one side has are left out. A later update replaces what was measured before.

    ``compute`` gives a tensor of shape ``(r_1, r_2)`` for each layer, by its name on the first side: the element
    ``[i - 1, j - 1]`` is the similarity of the first i and the first j directions. It is NaN where a side has fewer
    directions, such as B before its first step. Stacked experts have a dimension of experts in front.

    Raises:
        ValueError: If a side has no adapters, or several and no name is given; if no layer is on both sides; or if a
            layer has other features on the two.
        TypeError: If ``update`` gets something else.

    Source: Hu et al. 2021 (arXiv 2106.09685), equation 4, section 7.2 and appendix G.

    Example:
        >>> first = {"q.lora.default.A": torch.eye(1, 3), "q.lora.default.B": torch.ones(3, 1)}
        >>> second = {"q.lora.default.A": torch.diag(torch.tensor([1.0, 2.0, 3.0])), "q.lora.default.B": torch.eye(3)}
        >>> similarity = SubspaceSimilarity()
        >>> similarity.update(first, second)
        >>> similarity.compute()["q"]  # the only direction of the first is the third of the second
        tensor([[0., 0., 1.]])
    """

    def __init__(
        self,
        matrix: Literal["A", "B"] = "A",
        name: str | None = None,
        second_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, **kwargs)
        if matrix not in ("A", "B"):
            raise ValueError(f"`matrix` must be 'A' or 'B', but got {matrix!r}.")
        self.matrix, self.second_name = matrix, name if second_name is None else second_name

    def update(self, first: Source, second: Source) -> None:
        """Compare two adapters."""
        ours, theirs = matrices_of(first, self.name), matrices_of(second, self.second_name)
        values = {}
        for name, other in same_layers(ours, theirs):
            side = 1 if self.matrix == "A" else 0
            left, right = ours[name][side], theirs[other][side]
            if self.matrix == "A":
                left, right = left.mT, right.mT
            _check_features(name, left, right)
            values[name] = subspace_similarity(directions(left), directions(right.to(left.device)))
        self.store(values)

    def draw(self, values: Mapping[str, Any], ax: Axes) -> None:
        """Draw a heat map of the mean over the layers, as far as all of them have so many directions."""
        grids = [grid.reshape(-1, *grid.shape[-2:]) for grid in values.values()]
        rows, columns = (min(grid.shape[side] for grid in grids) for side in (-2, -1))
        draw_grid(torch.cat([grid[:, :rows, :columns] for grid in grids]).nanmean(0), ax)
        ax.set_xlabel("first $j$ directions of the second")
        ax.set_ylabel("first $i$ directions of the first")
        ax.set_title(f"Similarity of the subspaces of ${self.matrix}$")


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Equation 4 for all i and j: ``(..., r_1, r_2)``.

    Args:
        first: orthonormal columns, ``(..., features, r_1)``.
        second: as ``first``, ``(..., features, r_2)``.
    """
    shared = (first.mT @ second).square().cumsum(-2).cumsum(-1)
    i, j = (torch.arange(1, count + 1, device=shared.device) for count in shared.shape[-2:])
    return shared / torch.minimum(i[:, None], j)


def _check_features(name: str, first: Tensor, second: Tensor) -> None:
    if first.shape[:-1] != second.shape[:-1]:
        raise ValueError(
            f"`{name}` has {list(first.shape[:-1])} features on the first side and {list(second.shape[:-1])} on the "
            "second: the two adapt other models."
        )
