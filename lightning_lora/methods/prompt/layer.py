"""A prompt, and blocks that put it before the tokens, pass it on, or take it off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import shape_of
from lightning_lora.layers.adapted import Adapted, FullPrecision
from lightning_lora.layers.transformer import WithoutNestedTensors
from lightning_lora.methods.prompt.arguments import Sizes, extended

STD = 0.02


class Passage(FullPrecision):
    """What is added to a block that the prompt passes: how to go on with it.

    Args:
        site: the name of the block, for errors.
        length: of the prompt.
        names: the names of the arguments that the forward of the block takes by position.
        first: whether the prompt begins here.
        last: whether the prompt ends here.
        causal: whether an attention in the block says that it is causal.
        visible: the value with which its boolean masks show a key; ``None`` where that is not known.
        dim: the dimension of the sequence.
        limit: the longest sequence that tables in the block have room for; ``None`` without such tables.
        cache_layer: the number by which the block finds its part of a cache, if it is the first one of its stack.
    """

    def __init__(
        self,
        site: str,
        *,
        length: int,
        names: Sequence[str],
        first: bool,
        last: bool,
        causal: bool = False,
        visible: bool | None = True,
        dim: int = 1,
        limit: int | None = None,
        cache_layer: int | None = None,
    ) -> None:
        super().__init__()
        self.site, self.stack = site, site.rpartition(".")[0] or site
        self.length, self.names = length, tuple(names)
        self.first, self.last, self.causal, self.visible = first, last, causal, visible
        self.dim, self.limit, self.cache_layer = dim, limit, cache_layer

    def forward(self, x: Tensor) -> Tensor:
        """The input of the block with the prompt before the tokens, where it is not yet."""
        return x

    def begin(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any], int]:
        """The arguments of the block for a sequence with the prompt, and the length of that."""
        by_position = dict(zip(self.names, args, strict=False))
        given = {**by_position, **kwargs}
        if not given or len(by_position) != len(args):
            raise RuntimeError(f"`{self.site}` must get its input by name or position, but got {len(args)} arguments.")
        (first, x), *others = given.items()
        self._check_input(x)
        tokens = x.shape[self.dim] - (0 if self.first else self.length)
        self._check_length(tokens)
        self._check_caches(dict(others))
        causal = self.causal or any(value is True for name, value in others if name.endswith("is_causal"))
        sizes = Sizes(self.site, self.stack, tokens, self.length, causal, self.visible)
        longer = {first: self(x), **{name: extended(name, value, sizes) for name, value in others}}
        positional = [longer.pop(name) for name in by_position]
        return positional, longer, tokens + self.length

    def _check_input(self, x: Any) -> None:
        if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3:
            got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) and not x.is_nested else type(x)
            raise RuntimeError(
                f"`{self.site}` must get a sequence of shape (batch, length, features) for a prompt, but got {got}. "
                f"If the model has other blocks, leave these out: exclude=[{self.stack!r}]."
            )

    def _check_length(self, tokens: int) -> None:
        if self.limit is not None and tokens + self.length > self.limit:
            raise RuntimeError(
                f"`{self.site}` has a table for sequences of at most {self.limit}, but {tokens} tokens and a prompt of "
                f"{self.length} came. Take shorter sequences or a smaller `length`."
            )

    def _check_caches(self, others: dict[str, Any]) -> None:
        for name, value in others.items() if self.cache_layer is not None else ():
            seen = getattr(value, "get_seq_length", None)
            if seen is not None and seen(self.cache_layer) > 0:
                raise RuntimeError(
                    f"`{self.site}` gets a cache with earlier tokens as `{name}`, where a prompt would come after them "
                    "and shift positions. Generate with use_cache=False, or take PrefixCallback."
                )

    def end(self, output: Any, length: int) -> Any:
        """The output of the block without that of the prompt, where the prompt ends here."""
        if not self.last:
            return output
        hidden = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[self.dim] != length:
            got = f"shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else f"a {type(hidden).__name__}"
            raise RuntimeError(
                f"The output of `{self.site}` must be a sequence of length {length}, or a tuple that starts with one, "
                f"but has {got}. If the model has other blocks, leave these out: exclude=[{self.stack!r}]."
            )
        tokens = hidden.narrow(self.dim, self.length, length - self.length)
        if hidden is output:
            return tokens
        changed = (tokens, *output[1:])
        return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)


class Prompt(Passage):
    """A prompt that begins at a block.

    Its vectors start as small random numbers: zeros would get equal gradients and stay equal at every position.

    Args:
        features: of each vector.
        seed: of the first values, by a generator of their own.
        device: of the vectors.
        arguments: as of :class:`Passage`.
    """

    vectors: nn.Parameter

    def __init__(
        self, site: str, *, features: int, seed: int, device: torch.device | str | None = None, **arguments: Any
    ) -> None:
        super().__init__(site, **arguments)
        self.seed = seed
        self.vectors = nn.Parameter(torch.empty(self.length, features, dtype=torch.float32, device=device))
        if not self.vectors.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the vectors from a normal distribution with standard deviation 0.02."""
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.empty(self.vectors.shape, device="cpu", dtype=torch.float32)
        self.vectors.copy_(values.normal_(0, STD, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """The vectors before the tokens of ``x``."""
        batch = x.shape[1 - self.dim]
        if x.shape[-1] != self.vectors.shape[-1]:
            raise RuntimeError(
                f"`{self.site}` has a prompt of {self.vectors.shape[-1]} features, but its input has shape "
                f"{tuple(x.shape)}. If the model has other blocks, leave these out: exclude=[{self.stack!r}]."
            )
        vectors = self.vectors.to(x.dtype).unsqueeze(1 - self.dim)
        return torch.cat([vectors.expand(*((batch, -1, -1) if self.dim else (-1, batch, -1))), x], self.dim)

    def extra_repr(self) -> str:
        """Shape, for ``print(model)``."""
        length, features = shape_of(self.vectors)
        return f"length={length}, features={features}"


class PromptBlock(Adapted):
    """A block that a prompt passes."""

    method_key: ClassVar[str] = "prompt"
    prompt: Passage

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain block, with the prompt before the tokens."""
        positional, named, length = self.prompt.begin(args, kwargs)
        try:
            output = super().forward(*positional, **named)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # code that needs the number of tokens, such as windows
            raise RuntimeError(
                f"`{self.prompt.site}` fails with a prompt before its tokens, though it may run without one ({error}). "
                f"If the model has other blocks, leave these out: exclude=[{self.prompt.stack!r}]."
            ) from error
        return self.prompt.end(output, length)


class PromptEncoder(WithoutNestedTensors):
    """An ``nn.TransformerEncoder`` with a prompt in its layers."""

    method_key: ClassVar[str] = "prompt"
