"""The arguments of prefix tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from lightning_lora.arguments import check_length, check_patterns
from lightning_lora.methods.added_config import AddedConfig

ATTENTION = "attn"


@dataclass(frozen=True)
class PrefixConfig(AddedConfig):
    """The arguments of prefix tuning: ``length`` trained keys and values before those of each attention.

    Args:
        length: number of positions of a prefix.
        targets: ``"attn"`` (every attention block), or a list of patterns of their names or of modules around them.
        exclude: as of :class:`AddedConfig`, as the next four.
        also_train: modules or parameters of the base that train.
        bias: biases of the base that train.
        seed: of the initial values.
        name: a word for the run.

    Raises:
        ValueError: if a value is out of its range.
        TypeError: if a value has the wrong type.

    Example:
        >>> PrefixConfig(length=4, targets=["decoder"]).to_dict()["length"]
        4
    """

    length: int = 16
    targets: str | Sequence[str] = ATTENTION

    @override
    def __post_init__(self) -> None:
        """Make every argument plain data and check it."""
        super().__post_init__()
        check_length("length", self.length, "prefix")
        if not isinstance(self.targets, str):
            check_patterns("targets", self.targets)
            if not self.targets:
                raise ValueError(f"`targets` must name at least one attention block, but got {self.targets!r}.")
        elif self.targets != ATTENTION:
            raise ValueError(
                f"`targets` must be {ATTENTION!r} or a list of names of attention blocks, but got {self.targets!r}. "
                f"For blocks of that name write targets=[{self.targets!r}]."
            )
