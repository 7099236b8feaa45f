"""Small models as people train them with Lightning: an encoder, an LSTM, and a small temporal fusion transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Encoder(nn.Module):
    """A transformer encoder over feature vectors, whose attention is ``nn.MultiheadAttention``; one value a sample."""

    def __init__(self, features: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    """Layers of LSTM; the last state gives one value a sample."""

    def __init__(self, features: int, width: int, depth: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, width, depth, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class GatedResidual(nn.Module):
    """``norm(skip(x) + gate * value)`` of a two-layer network, equations 2 to 4 of the paper."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(inputs, width), nn.Linear(width, width)
        self.gate = nn.Linear(width, 2 * outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.skip(x) + F.glu(self.gate(self.outer(F.elu(self.inner(x))))))


class VariableSelection(nn.Module):
    """A weighted sum of the embedded variables; a network on all of them gives the weights (equations 6 to 8)."""

    def __init__(self, variables: int, width: int) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Linear(1, width) for _ in range(variables))
        self.values = nn.ModuleList(GatedResidual(width, width, width) for _ in range(variables))
        self.weights = GatedResidual(variables * width, width, variables)

    def forward(self, x: Tensor) -> Tensor:
        embedded = [embed(part) for embed, part in zip(self.embed, x.split(1, -1), strict=True)]
        weights = self.weights(torch.cat(embedded, -1)).softmax(-1)
        values = torch.stack([layer(part) for layer, part in zip(self.values, embedded, strict=True)], -1)
        return (values * weights.unsqueeze(-2)).sum(-1)


class FusionTransformer(nn.Module):
    """Variable selection, an LSTM and attention with gated skips: Lim et al. 2021 (arXiv 1912.09363), small.

    It forecasts the last ``horizon`` of the given steps; static variables and quantiles are left out.
    """

    def __init__(self, variables: int, width: int, heads: int, horizon: int) -> None:
        super().__init__()
        self.horizon = horizon
        self.select = VariableSelection(variables, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.local_gate, self.local_norm = nn.Linear(width, 2 * width), nn.LayerNorm(width)
        self.enrich = GatedResidual(width, width, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.attention_gate, self.attention_norm = nn.Linear(width, 2 * width), nn.LayerNorm(width)
        self.feed_forward = GatedResidual(width, width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.select(x)
        local = self.local_norm(chosen + F.glu(self.local_gate(self.lstm(chosen)[0])))
        enriched = self.enrich(local)
        length = x.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        attended, _ = self.attention(enriched, enriched, enriched, attn_mask=future, need_weights=False)
        fused = self.attention_norm(enriched + F.glu(self.attention_gate(attended)))
        return self.head(self.feed_forward(fused)[:, -self.horizon :])
