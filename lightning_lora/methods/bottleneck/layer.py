"""A bottleneck and the classes of the modules that it is added to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.layers.adapted import Adapted, FullPrecision
from lightning_lora.layers.transformer import WithoutFastPath, WithoutNestedTensors

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Bottleneck(FullPrecision):
    """``y + scale * (W_up act(W_down norm(x) + b_down) + b_up)``; it computes in the dtype of the activations.

    Args:
        features: number of features of ``x`` and ``y``.
        size: number of features inside.
        activation: a key of :data:`ACTIVATIONS`.
        scale: factor on the update.
        norm: whether there is a LayerNorm before ``W_down``.
        channel_dim: the dimension of the features.
        init_std: standard deviation of the initial ``W_down``.
        seed: of a generator of its own.
        site: name of the module that it is added to, for errors.
        device: of the parameters.
    """

    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter
    norm: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        size: int,
        *,
        activation: str = "gelu",
        scale: float = 1.0,
        norm: bool = False,
        channel_dim: int = -1,
        init_std: float = 0.01,
        seed: int = 0,
        site: str = "",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.scale, self.channel_dim = activation, scale, channel_dim
        self.init_std, self.seed, self.site = init_std, seed, site
        self.passed: PassedInput | None = None
        for name, shape in _shapes(features, size, norm).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device)))
        if not norm:
            self.norm = self.norm_bias = None
        if not self.down.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize ``W_down`` from its generator and ``W_up`` with zeros, so that the update is zero."""
        generator = torch.Generator().manual_seed(self.seed)
        initial = torch.empty(self.down.shape, dtype=torch.float32, device="cpu")
        bound = 2 * self.init_std  # as Houlsby et al., section 3.1
        self.down.copy_(nn.init.trunc_normal_(initial, std=self.init_std, a=-bound, b=bound, generator=generator))
        for parameter in (self.up, self.down_bias, self.up_bias):
            parameter.zero_()
        if self.norm is not None and self.norm_bias is not None:
            self.norm.fill_(1)
            self.norm_bias.zero_()

    def forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """``y`` and the update for ``x``, which is ``y`` if there is no other input."""
        features = len(self.up)
        x = y if x is None else x
        if y.shape[self.channel_dim] != features or x.shape[self.channel_dim] != features:
            raise RuntimeError(
                f"The bottleneck of `{self.site}` acts on {features} features, but its input has shape "
                f"{tuple(x.shape)} and its output {tuple(y.shape)}. Leave the module out: exclude=[{self.site!r}]."
            )
        if self.channel_dim == -1:  # a mixture of experts may return (tokens, features)
            return y + self.update(x).to(y.dtype).view_as(y)
        update = self.update(x.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)
        return y + update.to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """The update for ``x`` of shape ``(..., features)``."""
        dtype = x.dtype
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
        return f"{features} -> {size} -> {features}, {self.activation}, scale={self.scale:g}{norm}"


def _shapes(features: int, size: int, norm: bool) -> dict[str, Sequence[int]]:
    shapes: dict[str, Sequence[int]] = {
        "down": (size, features),
        "down_bias": (size,),
        "up": (features, size),
        "up_bias": (features,),
    }
    return shapes | ({"norm": (features,), "norm_bias": (features,)} if norm else {})


class PassedInput:
    """The input of an MLP on its way to the bottleneck at the MLP's last layer, while the layers between run."""

    value: Tensor | None = None
    grad_enabled: bool = False

    def put(self, x: Tensor) -> None:
        """Keep ``x`` until it is taken."""
        self.value, self.grad_enabled = x, torch.is_grad_enabled()

    def take(self, site: str) -> Tensor:
        """The input that was put last, for the bottleneck of ``site``."""
        x, self.value = self.value, None
        if x is None:
            raise RuntimeError(
                f"`{site}` was called, but not the first layer of its MLP, whose input its bottleneck reads. Take "
                "placement='pfeiffer', which reads the output."
            )
        if self.grad_enabled != torch.is_grad_enabled():
            raise RuntimeError(
                f"A part of the MLP that ends in `{site}` is checkpointed without the rest, so gradients of its input "
                "would be lost. Checkpoint the whole block, or take placement='pfeiffer'."
            )
        return x

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no activations."""
        return {}


class Entry(nn.Module):
    """What is added to the first layer of an MLP: it has no parameters, and passes the input on.

    Args:
        passed: where the input goes.
    """

    def __init__(self, passed: PassedInput) -> None:
        super().__init__()
        self.passed = passed


class BottleneckLayer(Adapted):
    """A module with a bottleneck after it."""

    method_key: ClassVar[str] = "bottleneck"
    bottleneck: Bottleneck

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module, or its first element, through the bottleneck."""
        return on_first(super().forward(*args, **kwargs), self.bottleneck, self.bottleneck.site)


class ParallelLayer(BottleneckLayer):
    """The last module of an MLP, or all of it, with a bottleneck that reads the input of the MLP."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the MLP with the update for its input added."""
        output = super(BottleneckLayer, self).forward(*args, **kwargs)
        passed, site = self.bottleneck.passed, self.bottleneck.site
        x = first_argument(args, kwargs) if passed is None else passed.take(site)
        return on_first(output, lambda y: self.bottleneck(y, x), site)


class EntryLayer(Adapted):
    """The first layer of an MLP, whose last layer has the bottleneck."""

    method_key: ClassVar[str] = "bottleneck"
    bottleneck: Entry

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the layer; its input is passed on."""
        self.bottleneck.passed.put(first_argument(args, kwargs))
        return super().forward(*args, **kwargs)


class BottleneckEncoderLayer(WithoutFastPath):
    """An ``nn.TransformerEncoderLayer`` with bottlenecks inside."""

    method_key: ClassVar[str] = "bottleneck"


class BottleneckEncoder(WithoutNestedTensors):
    """An ``nn.TransformerEncoder`` with bottlenecks inside."""

    method_key: ClassVar[str] = "bottleneck"


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a call, by position or by name."""
    return cast(Tensor, args[0] if args else next(iter(kwargs.values())))


def on_first(output: Any, change: Callable[[Tensor], Tensor], site: str) -> Any:
    """``output`` with ``change`` applied to it, or to the first element of a tuple or list."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        changed = (change(output[0]), *output[1:])
        return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)
    raise TypeError(
        f"The output of `{site}` must be a tensor, or a tuple that starts with one, for a bottleneck, but got a "
        f"{type(output).__name__}. Leave the module out: exclude=[{site!r}]."
    )
