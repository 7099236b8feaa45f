"""Modules with a quantized base, and a Trainer that quantizes one; none of them knows of LoRA.

Only a test file that skips without bitsandbytes imports this module.
"""

from __future__ import annotations

import bitsandbytes
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import BitsandbytesPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.models import Block, Lit, trainer


class WideNet(nn.Module):
    """Layers of the sizes that bitsandbytes quantizes on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(16, 64), nn.Linear(64, 3)
        self.layers = nn.Sequential(Block(64), Block(64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.up(x)))


class Wide(Lit):
    """A base in fp32, for a plug-in that quantizes it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = WideNet()


class Words(Lit):
    """Reads integers, so that no plug-in casts its input."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = WideNet()
            self.net.up = nn.Embedding(32, 64)


def words(seed: int = 0) -> DataLoader:
    """Data of :class:`Words`."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, 32, (32,), generator=generator), torch.randint(0, 3, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


class FourBits(Wide):
    """A base that comes quantized, as transformers loads one; on a CPU bitsandbytes packs it anew in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.net.layers:
            block.q = four_bits(block.q)


def four_bits(layer: nn.Linear, **kwargs: object) -> nn.Module:
    """``layer`` in NF4, on the CPU."""
    settings = {"compute_dtype": torch.float32, "quant_type": "nf4", **kwargs}
    quantized = bitsandbytes.nn.Linear4bit(*layer.weight.T.shape, bias=layer.bias is not None, **settings)
    quantized.load_state_dict(layer.state_dict())
    return quantized.to("cpu")


def eight_bits(layer: nn.Linear) -> nn.Module:
    """``layer`` in 8-bit codes, on the CPU."""
    quantized = bitsandbytes.nn.Linear8bitLt(*layer.weight.T.shape, bias=layer.bias is not None, has_fp16_weights=False)
    quantized.load_state_dict(layer.state_dict())
    return quantized.to("cpu")


def quantizing_trainer(
    *callbacks: object, mode: str = "nf4", dtype: torch.dtype = torch.float32, **kwargs: object
) -> Trainer:
    """A Trainer on the CPU whose plug-in quantizes the blocks of :class:`WideNet`.

    Lightning refuses the plug-in on a CPU, when a Trainer is made; the plug-in and bitsandbytes do not.
    """
    runner = trainer(*callbacks, **kwargs)
    runner.strategy.precision_plugin = BitsandbytesPrecision(mode, dtype, {"net.head", "net.up"})
    return runner
