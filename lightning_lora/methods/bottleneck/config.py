"""The arguments of bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from lightning_lora.arguments import check_choice, check_positive
from lightning_lora.methods.added_config import AddedConfig

PLACEMENTS = ("houlsby", "pfeiffer", "parallel", "block")
ACTIVATIONS = ("gelu", "relu", "silu", "tanh")


@dataclass(frozen=True)
class BottleneckConfig(AddedConfig):
    """The arguments of bottleneck adapters: ``y + scale * (W_up act(W_down x + b_down) + b_up)``.

    Args:
        size: rows of ``W_down``; a bottleneck on ``d`` features has ``2 * size * d + size + d`` parameters.
        placement: ``"houlsby"`` (Houlsby et al. 2019, arXiv 1902.00751): after each attention and each MLP, ``x = y``.
            ``"pfeiffer"`` (Pfeiffer et al. 2021, arXiv 2005.00247): after each MLP. ``"parallel"`` (He et al. 2022,
            arXiv 2110.04366): ``x`` is the input of the MLP's first layer (after the norm of a pre-norm block) and
            ``y`` the output of its last one. ``"block"`` (Lin et al. 2020, arXiv 2004.03829): after each block, with a
            LayerNorm before ``W_down``, which has ``2 * d`` more parameters.
        activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.
        init_std: standard deviation of the initial ``W_down``, a normal distribution truncated at two of it. ``W_up``
            and the biases are zero, so the model starts as the base.
        scale: factor on the update. He et al. take 4 for ``"parallel"``.
        segments: with ``"block"`` the entry of a batch that says to which segment each token or sample belongs, such as
            its task or speaker: a key, attribute or index. By the verbs :func:`lightning_lora.use_segments` says it.
        segment_count: how many segments there are: each has an embedding of ``d`` parameters in each bottleneck, which
            is added to its input (Lin et al.'s task embedding) and starts at zero. 0 adds none.

    The other arguments are those of :class:`~lightning_lora.methods.added_config.AddedConfig`: ``exclude``,
    ``also_train``, ``bias``, ``seed`` (of ``W_down``) and ``name``.

    Raises:
        ValueError: if a value is out of its range.
        TypeError: if a value has the wrong type.

    Example:
        >>> BottleneckConfig(size=16, placement="pfeiffer").to_dict()["size"]
        16
    """

    FREE: ClassVar[frozenset[str]] = frozenset({"seed", "init_std", "segments"})

    size: int = 64
    placement: str = "houlsby"
    activation: str = "gelu"
    init_std: float = 0.01
    scale: float = 1.0
    segments: str | int | None = None
    segment_count: int = 0

    @override
    def __post_init__(self) -> None:
        """Make every argument plain data and check it."""
        super().__post_init__()
        if not isinstance(self.size, int) or isinstance(self.size, bool):
            raise TypeError(f"`size` must be an integer, but got {self.size!r}.")
        if self.size < 1:
            raise ValueError(
                f"`size` must be at least 1, but got {self.size}. To add no adapter, leave the callback out."
            )
        check_choice("placement", self.placement, PLACEMENTS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_positive("init_std", self.init_std)
        check_positive("scale", self.scale)
        self._check_segments()

    def _check_segments(self) -> None:
        if not isinstance(self.segment_count, int) or isinstance(self.segment_count, bool):
            raise TypeError(f"`segment_count` must be an integer, but got {self.segment_count!r}.")
        if self.segment_count < 0:
            raise ValueError(f"`segment_count` must be at least 0, but got {self.segment_count}.")
        if self.segments is not None and (not isinstance(self.segments, (str, int)) or isinstance(self.segments, bool)):
            raise TypeError(f"`segments` must be a key of the batch or an index in it, but got {self.segments!r}.")
        if self.segments is not None and not self.segment_count:
            raise ValueError(
                f"`segments={self.segments!r}` needs the number of segments, which a batch does not tell. Give "
                "`segment_count`."
            )
        if self.segment_count and self.placement != "block":
            raise ValueError(
                f"`segment_count={self.segment_count}` adds task embeddings with placement='block' alone, but got "
                f"placement={self.placement!r}. Leave `segments` and `segment_count` out, or take placement='block'."
            )
