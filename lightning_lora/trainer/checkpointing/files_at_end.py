"""Before the first step: whether every file that a run is asked for can be written at its end."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.config import RunConfig
from lightning_lora.methods.base import Method
from lightning_lora.trainer.checkpointing.init_and_export import check_export
from lightning_lora.trainer.checkpointing.merged_file import check_merged_file
from lightning_lora.trainer.checkpointing.merged_saves import check_merged_saves
from lightning_lora.trainer.checkpointing.quantized_base import check_quantized_base


def check_files(trainer: Any, module: nn.Module, method: Method, run_config: RunConfig) -> None:
    """Raise if ``export``, ``save`` or ``merged`` asks for what cannot be written, or merged; every rank must call it.

    Raises:
        ValueError: for ``export``, ``merged``, ``merge_base`` or ``dequantize``, saying why.
        FileNotFoundError: for ``merge_base``.
        MisconfigurationException: for ``save``, or a strategy, saying why.
    """
    check_quantized_base(trainer, module, run_config)
    if run_config.export is not None:
        check_export(trainer, module, run_config.export)
    if run_config.save == "merged":
        check_merged_saves(method, module)
    if run_config.merged is not None and not trainer.fast_dev_run:
        check_merged_file(trainer, method, module, run_config.merged)
