"""The arguments of AdapterFusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from lightning_lora.arguments import check_path, check_positive, plain_data
from lightning_lora.methods.added_config import AddedConfig
from lightning_lora.methods.bottleneck.config import BottleneckConfig

ALIKE = ("placement", "size", "activation", "scale")  # what bottlenecks must have in common to be fused


@dataclass(frozen=True)
class FusionConfig(AddedConfig):
    """The arguments of AdapterFusion (Pfeiffer et al. 2021, arXiv 2005.00247): attention over frozen bottlenecks.

    Args:
        adapters: checkpoints of AdapterCallback, or directories that hold one, by the name that each gets; in a list
            each has the ``name`` that its run had. They share one base, placement and size.
        init_std: standard deviation of the initial query and key matrices; the value matrix starts as the identity.
        bottleneck: the arguments of the bottlenecks; ``None`` takes them from the files, and a checkpoint of a fusion
            records them. Where they are given the files need not exist: a checkpoint then brings the values.

    The other arguments are those of :class:`~lightning_lora.methods.added_config.AddedConfig`: ``exclude``,
    ``also_train``, ``bias``, ``seed`` (of the query and key matrices) and ``name``.

    Raises:
        ValueError: if a value is out of its range.
        TypeError: if a value has the wrong type.

    Example:
        >>> FusionConfig(adapters={"fr": "runs/fr/last.ckpt", "de": "runs/de/last.ckpt"}).init_std
        0.02
    """

    FREE: ClassVar[frozenset[str]] = frozenset({"seed", "init_std", "bottleneck", "adapters"})

    adapters: Mapping[str, str] | Sequence[str] = ()
    init_std: float = 0.02
    bottleneck: Mapping[str, Any] | None = None

    @override
    def __post_init__(self) -> None:
        """Make every argument plain data and check it."""
        super().__post_init__()
        adapters = self.adapters
        if not isinstance(adapters, (list, dict)) or not adapters:
            raise ValueError(f"`adapters` must be a list or a dict of at least one path, but got {adapters!r}.")
        for path in adapters.values() if isinstance(adapters, dict) else adapters:
            if path is None:
                raise TypeError("`adapters` must hold paths as strings, but got None.")
            check_path("adapters", path)
        for name in adapters if isinstance(adapters, dict) else ():
            _check_name(name)
        check_positive("init_std", self.init_std)
        if self.bottleneck is not None:
            bottleneck = BottleneckConfig(**self.bottleneck)
            if bottleneck.segment_count:
                raise ValueError(
                    f"The bottlenecks have task embeddings (`segment_count={bottleneck.segment_count}`), and a fusion "
                    "cannot say which segment a token belongs to. Fuse bottlenecks without task embeddings."
                )
            object.__setattr__(self, "bottleneck", plain_data(bottleneck.to_dict()))

    @override
    def difference(self, other: AddedConfig) -> str | None:
        """As of other configurations; paths are no difference, but names and the kind of the bottlenecks are."""
        difference = super().difference(other)
        if difference is not None or not isinstance(other, FusionConfig):
            return difference
        if isinstance(self.adapters, dict) and isinstance(other.adapters, dict):
            mine, theirs = list(self.adapters), list(other.adapters)
            if mine != theirs:
                return f"`adapters` named {theirs!r:.600} instead of {mine!r:.600}"
        if self.bottleneck is None or other.bottleneck is None:
            return None
        kinds = [BottleneckConfig(**{key: each[key] for key in ALIKE}) for each in (self.bottleneck, other.bottleneck)]
        return kinds[0].difference(kinds[1])


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"`adapters` must have Python identifiers as names, but got {name!r}.")
