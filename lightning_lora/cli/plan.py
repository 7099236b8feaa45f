"""The plan of a model that is not in memory, with what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightning_lora.cli.config_model import model_of
from lightning_lora.cli.costs import Costs
from lightning_lora.cli.dequantized_base import open_dequantized
from lightning_lora.cli.meta_model import skeleton
from lightning_lora.config import LoRAConfig
from lightning_lora.files.weights import all_transposed
from lightning_lora.model.report.plan import Plan, plan_lora


@dataclass(frozen=True)
class PlannedCosts:
    """A plan with what it costs.

    Args:
        source: the file or directory that the shapes are from.
        model: the class of the model; empty for a safetensors file, which does not name it.
        plan: what would be adapted.
        costs: parameters and bytes.
    """

    source: str
    model: str
    plan: Plan
    costs: Costs


def plan_files(source: Path, r: int = 8, targets: str | Sequence[str] = "attn") -> PlannedCosts:
    """What LoRA would cost on a model of which only a configuration or a safetensors file is there.

    Args:
        source: a ``config.json`` of transformers, a safetensors file, or a directory with one of them.
        r: rank.
        targets: a preset or patterns, as of :func:`lightning_lora.plan_lora`.

    Returns:
        Of a configuration the numbers of ``plan_lora`` on that model. A safetensors file has names and shapes alone, so
        there every matrix counts as a linear layer, unless its name is an embedding's. A weight that bitsandbytes
        quantized counts as the matrix in full precision.

    Raises:
        FileNotFoundError: if there is nothing to read.
        ImportError: if a configuration is given and transformers is not installed.
        ValueError: if no model can be built from the file, or ``targets`` matches nothing.

    Example:
        >>> import json, tempfile
        >>> path = Path(tempfile.mkdtemp(), "config.json")
        >>> _ = path.write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
        >>> plan_files(path, r=1, targets="qv").costs
        Costs(base=124439808, trainable=36864)
    """
    model, name = _model(source)
    plan = plan_lora(model, LoRAConfig(r=r, targets=targets), compute="auto")
    trainable = sum(row.parameters for row in plan.rows)
    return PlannedCosts(str(source), name, plan, Costs(plan.base, trainable))


def _model(source: Path) -> tuple[nn.Module, str]:
    """The model on the meta device, and the name of its class."""
    config = source / "config.json" if source.is_dir() else source
    if config.suffix == ".json" and (source.is_file() or not any(source.glob("*.safetensors"))):
        if not config.is_file():
            raise FileNotFoundError(f"`{source}` has neither a config.json nor a safetensors file.")
        model = model_of(config)
        return model, type(model).__name__
    weights = open_dequantized(source)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    return skeleton(shapes, all_transposed(weights)), ""
