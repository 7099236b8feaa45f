"""LoRA for any existing LightningModule, by one callback."""

from lightning_lora.apply import apply_lora, disable_lora, remove_lora
from lightning_lora.callback import LoRACallback
from lightning_lora.config import LoRAConfig
from lightning_lora.merge import merge_lora, unmerge_lora
from lightning_lora.state import load_lora_state_dict, lora_parameters, lora_state_dict

__version__ = "0.1.0"
__all__ = [
    "LoRACallback",
    "LoRAConfig",
    "apply_lora",
    "disable_lora",
    "load_lora_state_dict",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "remove_lora",
    "unmerge_lora",
]
