"""Models for the tests of subspaces, and their oracle: the parameters as sums, written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_lora.layers.adapter import seed_of
from lightning_lora.methods.subspace.config import SubspaceConfig
from lightning_lora.methods.subspace.method import SubspaceMethod
from lightning_lora.methods.subspace.projections import PROJECTIONS
from tests.helpers.models import EveryKind, OwnLinear, net

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def method(**arguments: object) -> SubspaceMethod:
    return SubspaceMethod(SubspaceConfig(**{"dimension": 10, "seed": 3, **arguments}))


def every_kind() -> EveryKind:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EveryKind()


def transformer() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "blocks": (net, X),
    "every kind": (every_kind, torch.tensor([[0, 1, 5], [2, 2, 3]])),
    "transformer": (transformer, X[None]),
    "gru": (lambda: nn.GRU(16, 4, 2), X[None]),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4)), X[None]),
    "a layer of the user's": (lambda: OwnLinear(16, 3), X),
    "parameters in a list": (lambda: Listed(), X),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 3)), X),
}


class Listed(nn.Module):
    """Parameters in containers, and one of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(16, 16) / 4 for _ in range(2))
        self.named = nn.ParameterDict({"shift": torch.zeros(16)})
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.matrices:
            x = torch.tanh(x @ matrix)
        return self.factor * x + self.named["shift"]


def moved(model: nn.Module, by: SubspaceMethod, size: float = 1.0) -> nn.Module:
    """`model`, adapted and with random z."""
    by.complete(model)
    with torch.no_grad():
        for _, parameter in by.added_parameters(model):
            parameter += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    return model


def written_out(base: nn.Module, z: Tensor, kind: str = "fastfood", seed: int = 3) -> dict[str, Tensor]:
    """`theta_0 + P z` of every parameter of a plain model, tied ones once."""
    z, parameters = z.detach(), dict(base.named_parameters())
    rows = sum(parameter.numel() for parameter in parameters.values())
    return {
        name: p.detach()
        + PROJECTIONS[kind].rows(z, seed_of(seed, name, "subspace"), p.numel()).view(p.shape) / rows**0.5
        for name, p in parameters.items()
    }


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = model(x)
    flat = out if isinstance(out, tuple) else (out,)
    return [each for each in flat if isinstance(each, Tensor)]


def z_of(model: nn.Module) -> nn.Parameter:
    [z] = [parameter for name, parameter in model.named_parameters() if name.endswith("subspace.z")]
    return z
