"""A run whose base is quantized: what its adapters are merged into is checked before the first step.

After the merge its layers are plain ones, and a plug-in that quantizes layers must leave them so.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from lightning_lora.config import RunConfig
from lightning_lora.foreign import QUANTIZING_PRECISION, SHARDING_STRATEGIES, is_a
from lightning_lora.methods.base import Method
from lightning_lora.model.mergeable import check_has_quantized
from lightning_lora.model.quantized.base_file import check_samples, differences_elsewhere, open_base
from lightning_lora.model.quantized.merge import plain_dtype, why_not_plain
from lightning_lora.trainer.imports import MisconfigurationException, rank_zero_warn
from lightning_lora.trainer.patching import patch_method


def check_quantized_base(trainer: Any, module: nn.Module, run_config: RunConfig) -> None:
    """Raise before the first step if ``dequantize`` or ``merge_base`` asks for a merge that would fail after the last.

    Raises:
        FileNotFoundError: if there is nothing at ``merge_base``.
        ValueError: if the base is not quantized, or ``merge_base`` is another model.
        MisconfigurationException: if the strategy shards the base.
    """
    path = run_config.merge_base
    if path is None and not run_config.dequantize:
        return
    argument = "dequantize=True" if path is None else f"merge_base={path!r}"
    check_has_quantized(module, argument)
    if is_a(trainer.strategy, *SHARDING_STRATEGIES):
        raise MisconfigurationException(
            f"`{argument}` makes quantized layers plain ones, which {type(trainer.strategy).__name__} holds in pieces. "
            "Leave it out, and merge on one device: load_from_checkpoint, then merge_lora with the same argument."
        )
    reason = why_not_plain(module)
    if reason is not None:
        raise ValueError(f"`{argument}`: {reason}")
    if path is not None:
        base = open_base(path, module)
        check_samples(base, module)
        differences = differences_elsewhere(base, module, plain_dtype(module))
        if differences is not None:
            rank_zero_warn(differences)


def keep_plain(stack: ExitStack, trainer: Any, method: Method) -> None:
    """Until ``stack`` closes, keep a plug-in that quantizes linear layers from those of a merged module."""

    def convert(original: Any, module: nn.Module) -> nn.Module:
        converted: nn.Module = module if method.is_merged(module) else original(module)
        return converted

    if is_a(trainer.precision_plugin, QUANTIZING_PRECISION):
        patch_method(stack, trainer.precision_plugin, "convert_module", convert)
