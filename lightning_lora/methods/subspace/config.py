"""The arguments of training in a random subspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_lora.arguments import check_choice, check_flag, check_patterns
from lightning_lora.layers.adapter import default_seed
from lightning_lora.methods.added_config import AddedConfig
from lightning_lora.methods.subspace.projections import PROJECTIONS

ALL = "all"


@dataclass(frozen=True)
class SubspaceConfig(AddedConfig):
    """The arguments of intrinsic dimension (Li et al. 2018, arXiv 1804.08838): ``theta = theta_0 + P z``.

    P follows from the seed and the names of the parameters, and no file holds it. So ``seed=None`` becomes a number
    when the configuration is made, and another seed is another model.

    Args:
        dimension: numbers in z, for the whole model.
        projection: ``"fastfood"`` (structured, in O(n log(dimension)) for n parameters) or ``"dense"`` (independent
            normal numbers, in O(n dimension) of time and memory: for small models).
        structure: whether each module has a factor of its own on its part of ``P z``, which trains too (SAID,
            Aghajanyan et al. 2020, arXiv 2012.13255).
        targets: what is projected: ``"all"`` (every floating parameter), or a list of patterns of modules and of
            parameters.
        exclude: patterns of modules and parameters that stay as they are.
        also_train: patterns of modules or parameters that train in full, and are not projected.
        bias: which biases train in full, and are not projected: ``"none"`` or ``"all"``.
        seed: of P; ``None`` takes the one that ``seed_everything`` set, else 0.
        name: a word for the run, a Python identifier.

    Raises:
        ValueError: if a value is out of its range.
        TypeError: if a value has the wrong type.

    Example:
        >>> SubspaceConfig(dimension=50).seed is None
        False
    """

    FREE: ClassVar[frozenset[str]] = frozenset()

    dimension: int = 200
    projection: str = "fastfood"
    structure: bool = False
    targets: str | Sequence[str] = ALL

    def __post_init__(self) -> None:
        """Make every argument plain data and check it."""
        super().__post_init__()
        if not isinstance(self.dimension, int) or isinstance(self.dimension, bool):
            raise TypeError(f"`dimension` must be an integer, but got {self.dimension!r}.")
        if self.dimension < 1:
            raise ValueError(f"`dimension` must be at least 1, but got {self.dimension}.")
        check_choice("projection", self.projection, tuple(PROJECTIONS))
        check_flag("structure", self.structure)
        if self.targets != ALL:
            if isinstance(self.targets, str):
                raise ValueError(
                    f"`targets` must be 'all' or a list of module names, but got {self.targets!r}. To project modules "
                    f"of that name write targets=[{self.targets!r}]."
                )
            check_patterns("targets", self.targets)
            if not self.targets:
                raise ValueError(f"`targets` must name at least one module, but got {self.targets!r}.")
        if self.seed is None:
            object.__setattr__(self, "seed", default_seed())
