"""Adapters into a run and out of it: from other runs and other tools, and for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lora import checkpoints
from lightning_lora.config import LoRAConfig
from lightning_lora.fingerprint import Fingerprint
from lightning_lora.names import clean
from lightning_lora.peft_files import load_adapter, save_adapter
from lightning_lora.state import load_lora_state_dict, lora_parameters


def start_from(module: nn.Module, path: str, config: LoRAConfig, base: Fingerprint) -> None:
    """Give the adapters of ``module`` the values in a PEFT directory, or in the checkpoint of another run.

    Raises:
        ValueError: if they are of another configuration or base, damaged, or the adapters have no place yet.
    """
    empty = next((name for name, parameter in lora_parameters(module) if parameter.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"`init_from={path!r}` comes before `{empty}` has memory: the model is on the meta device. Load the base "
            "in `configure_model`, or resume with `ckpt_path`."
        )
    if Path(path).is_dir():
        load_adapter(module, path)
        return
    checkpoint = checkpoints.read(_load, path, None)
    written, trained_on = checkpoints.facts_in(checkpoint, path)
    checkpoints.check_config(written, path, config)
    checkpoints.check_base(trained_on, base, path)
    load_lora_state_dict(module, {clean(key): value for key, value in checkpoint["state_dict"].items()})


def _load(path: Any, weights_only: bool | None) -> Any:
    return torch.load(path, map_location="cpu", weights_only=weights_only)


def export(trainer: Any, module: nn.Module, directory: str) -> None:
    """Write the adapters of ``module`` as a PEFT directory that tells of the run; every rank must call it."""
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if value.numel() == 1}
    facts = {"epoch": str(trainer.current_epoch), "step": str(trainer.global_step), "metrics": json.dumps(metrics)}
    save_adapter(module, directory, metadata=facts)
