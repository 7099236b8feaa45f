"""What LoRA would cost for a model that is not in memory: trained parameters, bytes of a checkpoint, bytes in training.

Memory is that of weights, gradients and Adam's two moments, without activations. LoRA holds only the weights of the
base, and everything for its adapters. The bytes of one trained parameter depend on how it is kept:

    16-bit, gradients freed as they are used   2 weight +              2 x 2 moments                =  6 bytes
    16-bit, gradients held                     2 weight + 2 gradient + 2 x 2 moments                =  8 bytes
    16-bit with fp32 copies (mixed precision)  2 weight + 2 gradient + 2 x 4 moments + 4 copy       = 16 bytes
    fp32                                       4 weight + 4 gradient + 2 x 4 moments                = 16 bytes

An adapter's parameter is kept in fp32 in every case, 16 bytes, as this package does. Hu et al. (2021, section 4.2)
report 1.2 TB for all of GPT-3 175B and 350 GB with LoRA: the second is its weights in 16 bits; the first, 6.9 bytes for
each parameter, lies between the first two rows (1.05 and 1.40 TB).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_lora.cli.meta_model import skeleton
from lightning_lora.cli.shapes import Shapes, Transformer, transformer_of
from lightning_lora.config import LoRAConfig
from lightning_lora.files.json_files import read_object
from lightning_lora.files.weights import all_transposed, open_weights
from lightning_lora.model.plan import Plan, plan_lora

ADAPTER = 16  # bytes for each parameter that LoRA trains


@dataclass(frozen=True)
class Accounting:
    """How many bytes a parameter takes: its ``weight``, and in all where it is ``trained``."""

    name: str
    weight: int
    trained: int


ACCOUNTINGS = (
    Accounting("16-bit, gradients freed as used", 2, 2 + 2 * 2),
    Accounting("16-bit, gradients held", 2, 2 + 2 + 2 * 2),
    Accounting("16-bit with fp32 copies", 2, 2 + 2 + 2 * 4 + 4),
    Accounting("fp32", 4, 4 + 4 + 2 * 4),
)


@dataclass(frozen=True)
class Costs:
    """Bytes of a checkpoint, and bytes of memory in training by accounting.

    Args:
        base: number of parameters of the model.
        trainable: number of parameters that LoRA trains.
    """

    base: int
    trainable: int

    def checkpoint(self, width: int) -> tuple[int, int]:
        """Bytes of a full checkpoint and of an adapter's, at ``width`` bytes for each number.

        Example:
            >>> Costs(base=6_738_415_616, trainable=4_194_304).checkpoint(2)
            (13476831232, 8388608)
        """
        return width * self.base, width * self.trainable

    def memory(self, how: Accounting) -> tuple[int, int]:
        """Bytes of memory in full fine-tuning and with LoRA, activations not counted."""
        return how.trained * self.base, how.weight * self.base + ADAPTER * self.trainable


@dataclass(frozen=True)
class PlannedCosts:
    """A plan with what it costs.

    Args:
        source: where the shapes are from.
        plan: what would be adapted.
        costs: parameters and bytes.
    """

    source: str
    plan: Plan
    costs: Costs


def plan_files(source: Path | Transformer, r: int = 8, targets: str | Sequence[str] = "attn") -> PlannedCosts:
    """What LoRA would cost on a model of which only the shapes are known.

    Args:
        source: a ``config.json``, a safetensors file, a directory with one of them, or the sizes themselves.
        r: rank.
        targets: a preset or patterns, as of :func:`lightning_lora.plan_lora`.

    Raises:
        FileNotFoundError: if there is nothing to read.
        ValueError: if the file does not give the shapes, or nothing is meant by ``targets``.

    Example:
        >>> gpt3 = Transformer(hidden=12288, layers=96, vocab=50257, positions=2048, biases="all", tied=False)
        >>> plan_files(gpt3, r=1, targets="qv").costs
        Costs(base=175221817344, trainable=4718592)
    """
    config = LoRAConfig(r=r, targets=targets)
    shapes, transposed = _shapes(source, targets)
    plan = plan_lora(skeleton(shapes, transposed), config)
    trainable = sum(row.parameters for row in plan.rows)
    named = "sizes" if isinstance(source, Transformer) else str(source)
    return PlannedCosts(named, plan, Costs(plan.base, trainable))


def _shapes(source: Path | Transformer, targets: str | Sequence[str]) -> tuple[Shapes, bool]:
    if isinstance(source, Transformer):
        return _apart(source, targets).shapes(), False
    configuration = source / "config.json" if source.is_dir() else source
    if configuration.suffix == ".json" and (source.is_file() or not any(source.glob("*.safetensors"))):
        if not configuration.is_file():
            raise FileNotFoundError(f"`{source}` has neither a config.json nor a safetensors file.")
        return _apart(transformer_of(read_object(configuration)), targets).shapes(), False
    weights = open_weights(source)
    return {name: tensor.shape for name, tensor in weights.tensors.items()}, all_transposed(weights)


def _apart(transformer: Transformer, targets: str | Sequence[str]) -> Transformer:
    # Of a fused map "qv" adapts two slices, each by a pair of its own: as many numbers as with separate maps.
    return replace(transformer, fused=False) if targets == "qv" else transformer
