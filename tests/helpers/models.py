"""Modules and data that the tests train; none of them knows of LoRA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, d: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.mlp = (nn.Linear(d, d) for _ in range(5))
        self.ln = nn.LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln(x)
        x = x + self.o(torch.tanh(self.q(h) * self.k(h)) + self.v(h))
        return x + self.dropout(torch.relu(self.mlp(h)))


class Attention(nn.Module):
    """Query, key and value of one input, or key and value of another; named as in Llama."""

    def __init__(self, features: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.q_proj = nn.Linear(features, features, bias=bias)
        self.k_proj = nn.Linear(features, features, bias=bias)
        self.v_proj = nn.Linear(features, features, bias=bias)
        self.o_proj = nn.Linear(features, features, bias=bias)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        q, k, v = self.q_proj(x), self.k_proj(other), self.v_proj(other)
        return self.o_proj(torch.softmax(q @ k.mT, -1) @ v)


class Net(nn.Module):
    def __init__(self, batch_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(Block(dropout=dropout), Block(dropout=dropout))
        self.bn = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.layers(x)))


def net(**kwargs: object) -> Net:
    """The same network at every call, and no trace of it in the global random stream."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` writes down the call stack for each other device
        return Net(**kwargs)


class Lit(LightningModule):
    """A classifier as people write it."""

    def __init__(self, lr: float = 1e-2, **kwargs: object) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = net(**kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)]


class BuiltInSetup(Lit):
    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.lr, self.net = 1e-2, None

    def setup(self, stage: str) -> None:
        if self.net is None:
            self.net = net()


class BuiltInConfigureModel(Lit):
    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.lr, self.net = 1e-2, None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = net()


def data(seed: int = 0, n: int = 64, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 16, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle)


def trainer(*callbacks: object, **kwargs: object) -> Trainer:
    settings: dict = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "callbacks": list(callbacks),
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    return Trainer(**{**settings, **kwargs})


def checkpoints(folder: object, **kwargs: object) -> ModelCheckpoint:
    settings: dict = {"monitor": "val_loss", "save_last": True, "save_top_k": -1, "filename": "{epoch}"}
    return ModelCheckpoint(dirpath=folder, **{**settings, **kwargs})


class OwnLinear(nn.Module):
    """A linear layer that is no ``nn.Linear``, as libraries for graphs have it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        return nn.functional.linear(x, self.weight, self.bias)


class EveryKind(nn.Module):
    """Most kinds of layers: a tied head, an embedding with ``max_norm``, a recurrent layer, statistics, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.positions = nn.Embedding(3, 4, max_norm=1.0)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.extra = nn.Linear(4, 2)
        self.fc.bias.requires_grad_(False)

    def forward(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(index) + self.positions(torch.arange(index.shape[1]))
        x = self.norm(self.conv(x.mT)).mT
        x, _ = self.rnn(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        x = self.fc(x)
        return self.head(x), self.extra(x)


class Tower(nn.Module):
    """Linear layers of one shape, called in any order, with activation checkpointing of each or without."""

    def __init__(self, layers: int = 3, features: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(features, features) for _ in range(layers))

    def forward(self, x: Tensor, order: Sequence[int] | None = None, use_reentrant: bool | None = None) -> Tensor:
        for index in range(len(self.layers)) if order is None else order:
            if use_reentrant is None:
                x = torch.tanh(self.layers[index](x))
            else:
                x = checkpoint(self._call, x, index, use_reentrant=use_reentrant)
        return x

    def _call(self, x: Tensor, index: int) -> Tensor:
        return torch.tanh(self.layers[index](x))


class FusedBlocks(nn.Module):
    """Attention of one head, with query, key and value in one linear layer; each block is checkpointed, or none is."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FusedBlock(features) for _ in range(2))

    def forward(self, x: Tensor, use_reentrant: bool | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x) if use_reentrant is None else checkpoint(block, x, use_reentrant=use_reentrant)
        return x


class FusedBlock(nn.Module):
    """A block of :class:`FusedBlocks`."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(features, 3 * features), nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class SelfAttention(nn.Module):
    """Two heads, computed by torch's kernel for attention."""

    def __init__(self, d: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d) for _ in range(4))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        dropout = self.dropout if self.training else 0.0
        y = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class EncoderBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, d: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(d), SelfAttention(d, dropout)
        self.norm2, self.mlp = nn.LayerNorm(d), FeedForward(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """A classifier of sequences of four vectors with all that methods act on: attention, MLPs, norms and a head.

    Args:
        dropout: in attention and after it, and after MLPs.
        checkpointed: ``use_reentrant`` of activation checkpointing; ``None`` for none.
        skipped: the number of a block that does not run.
    """

    def __init__(self, dropout: float = 0.0, checkpointed: bool | None = None, skipped: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.layers = nn.ModuleList(EncoderBlock(dropout=dropout) for _ in range(2))
        self.bn, self.head = nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.checkpointed, self.skipped = checkpointed, skipped

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.view(-1, 4, 4))
        for number, layer in enumerate(self.layers):
            if number == self.skipped:
                continue
            x = layer(x) if self.checkpointed is None else checkpoint(layer, x, use_reentrant=self.checkpointed)
        return self.head(self.bn(x.mean(1)))


class LitEncoder(Lit):
    """`Lit` over an `Encoder`."""

    def __init__(self, lr: float = 1e-2, **kwargs: object) -> None:
        LightningModule.__init__(self)
        self.save_hyperparameters()
        self.lr = lr
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(0)
            self.net = Encoder(**kwargs)


class LitEncoderLate(LitEncoder):
    """`LitEncoder` that is built in `configure_model`."""

    def __init__(self, lr: float = 1e-2, **kwargs: object) -> None:
        super().__init__(lr, **kwargs)
        self.made, self.net = self.net, None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.made
            del self.made


class GroupedAttention(nn.Module):
    """Attention by torch's kernel: four query heads, two heads of keys and values, which are repeated or are not."""

    def __init__(self, features: int = 16, repeat: bool = False) -> None:
        super().__init__()
        self.repeat = repeat
        self.q_proj, self.o_proj = nn.Linear(features, features), nn.Linear(features, features)
        self.k_proj, self.v_proj = nn.Linear(features, features // 2), nn.Linear(features, features // 2)

    def forward(
        self, x: Tensor, states: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        states = x if states is None else states
        q, k, v = (
            layer(source).unflatten(-1, (-1, self.q_proj.out_features // 4)).transpose(1, 2)
            for layer, source in ((self.q_proj, x), (self.k_proj, states), (self.v_proj, states))
        )
        if self.repeat:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=not self.repeat)
        return self.o_proj(y.transpose(1, 2).flatten(2))
