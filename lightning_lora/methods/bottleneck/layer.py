"""A bottleneck and the classes of the modules that it is added to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.layers.adapted import FullPrecision
from lightning_lora.layers.transformer import WithoutFastPath, WithoutNestedTensors
from lightning_lora.methods.bottleneck.config import BottleneckConfig
from lightning_lora.methods.bottleneck.places import AfterMLP, AfterModule, AtSite, MLPEntry
from lightning_lora.methods.bottleneck.segments import ActingSegments
from lightning_lora.targets.blocks import Sublayer

BottleneckType = TypeVar("BottleneckType", bound="Bottleneck")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Bottleneck(AtSite, FullPrecision):
    """``y + scale * (W_up act(W_down norm(x) + b_down) + b_up)``; it computes in the dtype of the activations.

    Args:
        features: number of features of ``x`` and ``y``.
        size: number of features inside.
        activation: a key of :data:`ACTIVATIONS`.
        scale: factor on the update.
        norm: whether there is a LayerNorm before ``W_down``.
        segments: the number of task embeddings, one of which is added to ``x`` before the norm.
        channel_dim: the dimension of the features.
        init_std: standard deviation of the initial ``W_down``.
        seed: of a generator of its own.
        site: name of the module that it is added to, for errors.
        device: of the parameters.

    Attributes:
        acting: the segments that hold now, if there are task embeddings.
    """

    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter
    norm: nn.Parameter | None
    norm_bias: nn.Parameter | None
    segment_embedding: nn.Parameter | None
    acting: ActingSegments | None = None

    def __init__(
        self,
        features: int,
        size: int,
        *,
        activation: str = "gelu",
        scale: float = 1.0,
        norm: bool = False,
        segments: int = 0,
        channel_dim: int = -1,
        init_std: float = 0.01,
        seed: int = 0,
        site: str = "",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.scale = activation, scale
        self.init_std, self.seed = init_std, seed
        self.site, self.features, self.channel_dim = site, features, channel_dim
        for name, shape in _shapes(features, size, norm, segments).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device)))
        if not norm:
            self.norm = self.norm_bias = None
        if not segments:
            self.segment_embedding = None
        if not self.down.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize ``W_down`` from its generator and ``W_up`` with zeros, so that the update is zero.

        Task embeddings are zero too.
        """
        generator = torch.Generator().manual_seed(self.seed)
        initial = torch.empty(self.down.shape, dtype=torch.float32, device="cpu")
        bound = 2 * self.init_std  # as Houlsby et al., section 3.1
        self.down.copy_(nn.init.trunc_normal_(initial, std=self.init_std, a=-bound, b=bound, generator=generator))
        for parameter in (self.up, self.down_bias, self.up_bias):
            parameter.zero_()
        if self.norm is not None and self.norm_bias is not None:
            self.norm.fill_(1)
            self.norm_bias.zero_()
        if self.segment_embedding is not None:
            self.segment_embedding.zero_()

    def forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """``y`` and the update for ``x``, which is ``y`` if there is no other input."""
        return self.add(y, y if x is None else x, lambda _, x: self.update(x))

    def update(self, x: Tensor) -> Tensor:
        """The update for ``x`` of shape ``(..., features)``."""
        dtype = x.dtype
        if self.segment_embedding is not None and self.acting is not None:
            x = self.acting.embedded(self.segment_embedding, x, self.site)
        if self.norm is not None and self.norm_bias is not None:
            x = F.layer_norm(x, self.norm.shape, self.norm.to(dtype), self.norm_bias.to(dtype))
        hidden = F.linear(x, self.down.to(x.dtype), self.down_bias.to(x.dtype))
        hidden = ACTIVATIONS[self.activation](hidden)
        update = F.linear(hidden, self.up.to(hidden.dtype), self.up_bias.to(hidden.dtype))
        return update if self.scale == 1 else self.scale * update

    def extra_repr(self) -> str:
        """Shape and formula, for ``print(model)``."""
        size, features = self.down.shape
        norm = ", norm" if self.norm is not None else ""
        segments = f", segments={len(self.segment_embedding)}" if self.segment_embedding is not None else ""
        return f"{features} -> {size} -> {features}, {self.activation}, scale={self.scale:g}{norm}{segments}"


def new_bottleneck(
    cls: type[BottleneckType], config: BottleneckConfig, sublayer: Sublayer, device: torch.device, seed: int = 0
) -> BottleneckType:
    """The bottleneck that ``config`` means for ``sublayer``."""
    return cls(
        sublayer.features,
        config.size,
        activation=config.activation,
        scale=config.scale,
        norm=config.placement == "block",
        segments=config.segment_count,
        channel_dim=sublayer.channel_dim,
        init_std=config.init_std,
        seed=seed,
        site=sublayer.output,
        device=device,
    )


def _shapes(features: int, size: int, norm: bool, segments: int) -> dict[str, Sequence[int]]:
    shapes: dict[str, Sequence[int]] = {
        "down": (size, features),
        "down_bias": (size,),
        "up": (features, size),
        "up_bias": (features,),
    }
    shapes |= {"norm": (features,), "norm_bias": (features,)} if norm else {}
    return shapes | ({"segment_embedding": (segments, features)} if segments else {})


class BottleneckLayer(AfterModule):
    """A module with a bottleneck after it."""

    method_key: ClassVar[str] = "bottleneck"


class ParallelLayer(AfterMLP):
    """The last module of an MLP, or all of it, with a bottleneck that reads the input of the MLP."""

    method_key: ClassVar[str] = "bottleneck"


class EntryLayer(MLPEntry):
    """The first layer of an MLP, whose last layer has the bottleneck."""

    method_key: ClassVar[str] = "bottleneck"


class BottleneckEncoderLayer(WithoutFastPath):
    """An ``nn.TransformerEncoderLayer`` with bottlenecks inside."""

    method_key: ClassVar[str] = "bottleneck"


class BottleneckEncoder(WithoutNestedTensors):
    """An ``nn.TransformerEncoder`` with bottlenecks inside."""

    method_key: ClassVar[str] = "bottleneck"
