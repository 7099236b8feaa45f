"""Base checkpoints load into an adapted model as into a plain one."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora import names
from lightning_lora.layers.base import LoRALayer


class BaseCheckpoint:
    """A ``load_state_dict`` post-hook: a file without any adapter is a base's, and lacks none of them.

    A file that has some adapters and lacks others stays as wrong as it was. It has to be told at the top of the model:
    torch shows each module only its own part of the file.
    """

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        """Drop the adapters' names from the missing keys."""
        own = {
            names.join(name, f"lora.{key}")
            for name, layer in names.named_modules(module)
            if isinstance(layer, LoRALayer)
            for key, _ in layer.lora.named_parameters()
        }
        missing = {key for key in incompatible.missing_keys if ends_in(key, own)}
        if len(missing) == len(own) and len(incompatible.missing_keys) < len(module.state_dict()):
            incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in missing]


def ends_in(key: str, own: set[str]) -> bool:
    """Whether ``key``, the name of something in a model that may hold this one, is one of this one's names."""
    parts = names.clean(key).split(".")
    return any(".".join(parts[start:]) in own for start in range(len(parts)))


def accept_base(model: nn.Module) -> None:
    """Let base checkpoints load into ``model``, which has adapters now."""
    if not any(isinstance(hook, BaseCheckpoint) for hook in model._load_state_dict_post_hooks.values()):
        model.register_load_state_dict_post_hook(BaseCheckpoint())  # type: ignore[no-untyped-call]


def be_strict(model: nn.Module) -> None:
    """The reverse, where ``model`` has no adapters any more."""
    for module in model.modules():
        for key, hook in list(module._load_state_dict_post_hooks.items()):
            if isinstance(hook, BaseCheckpoint):
                del module._load_state_dict_post_hooks[key]
