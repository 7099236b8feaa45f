"""What LoRA would cost for a model that is not there: from its configuration, its files' headers, or its sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_lora.cli.costs import Costs
from lightning_lora.cli.meta_model import skeleton
from lightning_lora.cli.shapes import Shapes, Transformer, transformer_of
from lightning_lora.config import LoRAConfig
from lightning_lora.files.json_files import read_object
from lightning_lora.files.weights import all_transposed, open_weights
from lightning_lora.model.plan import Plan, plan_lora


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
