"""The arguments of prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from lightning_lora.arguments import check_flag, check_length
from lightning_lora.methods.added_config import AddedConfig


@dataclass(frozen=True)
class PromptConfig(AddedConfig):
    """The arguments of prompt tuning: ``length`` trained vectors before the tokens.

    Args:
        length: number of vectors of a prompt.
        deep: ``False``: one prompt for each stack of blocks, before the input of its first block; it passes all blocks
            and is cut off after the last one. ``True``: a prompt for every block, cut off after that block (PreLayer of
            Hu et al. 2021, VPT-deep of Jia et al. 2022).
        exclude: as of :class:`AddedConfig`, as the next four.
        also_train: modules or parameters of the base that train.
        bias: biases of the base that train.
        seed: of the initial values.
        name: a word for the run.

    Raises:
        ValueError: if a value is out of its range.
        TypeError: if a value has the wrong type.

    Example:
        >>> PromptConfig(length=4, deep=True).to_dict()["deep"]
        True
    """

    length: int = 16
    deep: bool = False

    @override
    def __post_init__(self) -> None:
        """Make every argument plain data and check it."""
        super().__post_init__()
        check_length("length", self.length, "prompt")
        check_flag("deep", self.deep)
