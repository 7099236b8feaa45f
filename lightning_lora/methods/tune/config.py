"""Which parameters of a model train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_lora.arguments import check_patterns
from lightning_lora.methods.added_config import AddedConfig

PARTS = ("bias", "norm", "head", "all")


@dataclass(frozen=True)
class TuneConfig(AddedConfig):
    """The arguments of training a part of a model as it is: BitFit, norm tuning, a linear probe, full fine-tuning.

    Args:
        train: ``"bias"`` (every bias: BitFit, Ben-Zaken et al. 2021, arXiv 2106.10199), ``"norm"`` (the parameters of
            every normalization layer), ``"head"`` (the output head), ``"all"``, or a list of these words and of
            patterns of modules and parameters, as in ``targets`` of :class:`~lightning_lora.LoRAConfig`.

    The other arguments are those of :class:`~lightning_lora.methods.added_config.AddedConfig`: ``exclude``,
    ``also_train``, ``bias``, ``seed`` (nothing is drawn, so it has no effect) and ``name``.

    Raises:
        ValueError: if a value is out of its range.
        TypeError: if a value has the wrong type.

    Example:
        >>> TuneConfig("bias", also_train=["classifier"]).to_dict()["also_train"]
        ['classifier']
    """

    train: str | Sequence[str] = "bias"

    def __post_init__(self) -> None:
        """Make every argument plain data and check it."""
        super().__post_init__()
        if not isinstance(self.train, str):
            check_patterns("train", self.train)
            if not self.train:
                raise ValueError(f"`train` must name at least one part of the model, but got {self.train!r}.")
        elif self.train not in PARTS:
            raise ValueError(
                f"`train` must be one of {', '.join(map(repr, PARTS))} or a list of module names, but got "
                f"{self.train!r}. To train a part of that name write train=[{self.train!r}]."
            )

    def parts(self) -> list[str]:
        """The words and patterns of ``train``."""
        return [self.train] if isinstance(self.train, str) else list(self.train)
