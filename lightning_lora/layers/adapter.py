"""An adapter: the pair (A, B) of one layer as a module, and the initial values of A."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.distributed.sharded import shape_of
from lightning_lora.foreign import SEED_VARIABLE
from lightning_lora.layers.adapted import keep_dtype
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.ops.linear import Coefficient, weighed
from lightning_lora.torch_internals import has_module_hooks


def default_seed() -> int:
    """The seed that Lightning's ``seed_everything`` stores in the environment, else 0."""
    value = os.environ.get(SEED_VARIABLE, "")
    return int(value) if value.lstrip("-").isdigit() else 0


def seed_of(seed: int | None, layer: str, adapter: str) -> int:
    """A seed for one adapter of one layer; it depends neither on the process nor on the order of injection."""
    text = f"{default_seed() if seed is None else seed}/{layer}/{adapter}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def initial_A(shape: Sequence[int], init: str, seed: int) -> Tensor:
    """The initial A, in fp32 on the CPU.

    Args:
        shape: ``(r, in_features)``, or ``(experts, r, in_features)``.
        init: ``"kaiming"``: uniform in +-1/sqrt(in_features), as the weight of ``nn.Linear``; ``"gaussian"``: normal
            with standard deviation 1/r. The paper (section 4.1) says only "random Gaussian".
        seed: of a separate generator; the global random stream is neither read nor advanced.
    """
    generator = torch.Generator().manual_seed(seed)
    r, in_features = shape[-2:]
    if init == "gaussian":
        return torch.empty(*shape, device="cpu", dtype=torch.float32).normal_(0, 1 / r, generator=generator)
    bound = 1 / math.sqrt(max(1, in_features))
    return torch.empty(*shape, device="cpu", dtype=torch.float32).uniform_(-bound, bound, generator=generator)


class Adapter(nn.Module):
    """A and B of one weight matrix; subclasses define how they act in one kind of layer.

    A and B stay fp32 when the model is cast (``model.half()``, Lightning's ``precision="bf16-true"``): in bf16 an
    update of 1e-3 to a value of 1 is lost.

    Args:
        in_features: number of columns of A.
        out_features: number of rows of B.
        r: rank.
        alpha: as configured; stored in files.
        scale: factor of ``B A``, such as ``alpha / r``.
        dropout: probability of dropping an element of the input of A, in training.
        init: ``"kaiming"`` or ``"gaussian"``, see :func:`initial_A`.
        seed: of the initial A.
        padding_idx: the column of A that stays zero, for an embedding.
        part: the matrix of the layer that the pair adapts.
        stack: ``(experts,)`` for one pair per expert: A is ``(experts, r, in_features)``, B
            ``(experts, out_features, r)``.
        device: of A and B.
    """

    A: nn.Parameter
    B: nn.Parameter
    loads: int = 0  # how often a state dict gave B its values: what is loaded is meant, what an init wrote is not

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        alpha: float,
        scale: float,
        dropout: float = 0.0,
        init: str = "kaiming",
        seed: int = 0,
        padding_idx: int | None = None,
        part: WeightPart = WeightPart(),  # noqa: B008 - frozen
        stack: tuple[int, ...] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.r, self.alpha, self.scale = r, alpha, scale
        self.dropout, self.init, self.seed, self.padding_idx = dropout, init, seed, padding_idx
        self.part = part
        self.A = nn.Parameter(torch.empty(*stack, r, in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.empty(*stack, out_features, r, dtype=torch.float32, device=device))
        if not self.A.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize A from its generator and B with zeros: the output of the layer equals the base output."""
        self.A.copy_(initial_A(self.A.shape, self.init, self.seed))
        if self.padding_idx is not None:
            self.A[:, self.padding_idx] = 0
        self.B.zero_()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.loads += f"{prefix}B" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    def note_read(self) -> None:
        """Called when a layer reads a sum with this pair in it: what watches the pair is told that it acts."""

    def apply_dropout(self, x: Tensor) -> Tensor:
        """Dropout on ``x``, the input of A."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def operands(self) -> tuple[Tensor, Tensor] | None:
        """A and B for an op that does not call this module.

        ``None`` if a hook expects calls, or only some rows of W0 are adapted.
        """
        if self.part.rows is not None or has_module_hooks(self):
            return None
        parameters = self._parameters  # reading attributes of a module takes longer
        A, B = parameters.get("A"), parameters.get("B")
        return (self.A, self.B) if A is None or B is None else (A, B)

    def factors(self, weight: Tensor, coefficient: Coefficient = None) -> tuple[Tensor, Tensor]:
        """Two matrices, or stacks of them, whose product is c * delta with the rows of ``weight``; differentiable."""
        A: Tensor = self.A
        if self.padding_idx is not None:  # the padding index gets no gradient, as in the plain layer
            A = A * (torch.arange(A.shape[1], device=A.device) != self.padding_idx)
        return self.part.factors(A, weighed(self.scale * self.B, coefficient), weight)

    def add_to_weight(self, weight: Tensor, coefficient: Coefficient = None) -> Tensor:
        """``weight + c * scale * B A``, of the shape and dtype of ``weight``; differentiable by A and B.

        The sum requires a gradient in inference too: otherwise torch may compute another product with it (see
        :func:`lightning_lora.ops.linear.base_linear`).
        """
        if torch.compiler.is_compiling():
            return self._sum(weight, coefficient)
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            total = self._sum(weight, coefficient)
            return total if grad else total.requires_grad_()

    def _sum(self, weight: Tensor, coefficient: Coefficient) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        left, right = (matrix.to(dtype) for matrix in self.factors(weight, coefficient))
        return (weight + (left @ right).view(weight.shape)).to(weight.dtype)

    def extra_repr(self) -> str:
        """Shape and scale, for ``print(model)``."""
        (*stack, r, in_features), (*_, out_features, _) = shape_of(self.A), shape_of(self.B)
        experts = f"{stack[0]} x " if stack else ""
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return f"{experts}{in_features} -> {out_features}, r={r}, scale={self.scale:g}{dropout}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        apply = super()._apply
        keep_dtype((self.A, self.B), lambda: apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self


class Pairs(nn.Module):
    """The pairs of one adapter in a layer with several matrices, by the names of the matrices."""

    def __init__(self, pairs: Mapping[str, Adapter]) -> None:
        super().__init__()
        self._modules.update(pairs)  # not add_module: a parameter may have the name of a method of nn.Module

    def __getitem__(self, name: str) -> Adapter:
        """The pair that adapts the matrix ``name``."""
        pair = self._modules[name]
        assert isinstance(pair, Adapter)
        return pair

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def items(self) -> Iterator[tuple[str, Adapter]]:
        """The names of the matrices and their pairs."""
        return ((name, self[name]) for name in self)
