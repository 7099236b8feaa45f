"""Updates written out: delta and its weight as dense matrices in fp64, and what an SVD of delta says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora
from tests.helpers.layer_cases import Subject
from tests.helpers.oracles import SCALE, train_by_hand


@dataclass(frozen=True)
class Dense:
    """`delta` and `weight`, both of shape (..., out, in)."""

    delta: Tensor
    weight: Tensor

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, S and V, without the directions that have no singular value."""
        U, S, Vh = torch.linalg.svd(self.delta, full_matrices=False)
        count = int((S / S[..., :1] > 1e-6).sum(-1).max())
        return U[..., :count], S[..., :count], Vh.mT[..., :count]

    def projected(self) -> Tensor:
        U, _, V = self.svd()
        return norm(U.mT @ self.weight @ V)


def norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix)


def dense(subject: Subject) -> dict[str, Dense]:
    """Of each matrix of a trained layer of the table, by the name that its update has."""
    return {
        update_name(key): Dense(
            SCALE * B.detach().double() @ A.detach().double(), adapted_part(subject, key, A.shape, B.shape)
        )
        for key, (A, B) in subject.pairs().items()
    }


def update_name(key: str) -> str:
    """`layer.q` for the key `lora.default.q`."""
    return ".".join(["layer", *(part for part in key.split(".") if part not in ("lora", "default"))])


def adapted_part(subject: Subject, key: str, A: torch.Size, B: torch.Size) -> Tensor:
    """The part of the weight that a pair adapts: the derivative of `<place(X), W>` by X, as `place` is linear."""
    matrix = subject.matrices[key]
    X = torch.zeros(*A[:-2], B[-2], A[-1], dtype=torch.float64, requires_grad=True)
    weight = subject.plain.get_parameter(matrix.parameter).detach().double()
    (part,) = torch.autograd.grad((matrix.place(X) * weight).sum(), X)
    return part


def two_layers(seed: int = 0, r: int = 3, **config: object) -> nn.Sequential:
    """A model of two adapted layers, trained by hand; `seed` is that of the adapters."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    apply_lora(model, LoRAConfig(**{"r": r, "alpha": r * SCALE, "targets": ["0", "1"], "seed": seed} | config))
    train_by_hand(model, seed=seed + 1)
    return model
