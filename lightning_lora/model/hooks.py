"""The two kinds of hooks on an adapted model: for base checkpoints, and for reentrant activation checkpointing.

A base checkpoint loads into an adapted model as into a plain one. Reentrant activation checkpointing gives no gradients
where its inputs ask for none, as after a frozen embedding. So where a model uses it, the outputs of its first frozen
layers are made to ask for a gradient; ``use_reentrant=False`` needs nothing.
"""

from __future__ import annotations

import ast
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.source_code import computing_methods

CHECKPOINTS = {"checkpoint", "checkpoint_sequential", "checkpoint_seq"}


class GraphStart:
    """A forward hook: the output of a frozen layer asks for a gradient, as that of a trained one would."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A copy, as code that goes on in place may not do that to the start of a graph."""
        starts = isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad
        return output.detach().requires_grad_().clone() if starts and torch.is_grad_enabled() else output


def start_graphs(model: nn.Module) -> None:
    """Mend reentrant checkpointing in ``model``, if its code has any."""
    if not any(is_reentrant(module) for module in model.modules()):
        return
    for module in model.modules():
        parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
        frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
        first = frozen and not module._modules and not isinstance(module, LoRALayer)
        if first and not any(isinstance(hook, GraphStart) for hook in module._forward_hooks.values()):
            module.register_forward_hook(GraphStart())


def leave_graphs(model: nn.Module) -> None:
    """Take those hooks off."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, GraphStart):
                del module._forward_hooks[key]


def is_reentrant(module: nn.Module) -> bool:
    """Whether ``module`` checkpoints what lies in it, and may do so by reentering."""
    if getattr(module, "gradient_checkpointing", False) is True:  # Hugging Face
        keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        return keywords.get("use_reentrant", True) is not False
    if hasattr(module, "checkpoint_impl"):  # torch's CheckpointWrapper
        return str(module.checkpoint_impl).endswith(".REENTRANT")
    cls: Any = type(module)
    return _calls_checkpoint(cls)


@cache
def _calls_checkpoint(cls: Any) -> bool:
    return any(_reenters(node) for method in computing_methods(cls, CHECKPOINTS) for node in ast.walk(method))


def _reenters(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    said = [word.value for word in node.keywords if word.arg == "use_reentrant"]
    return called in CHECKPOINTS and not any(isinstance(v, ast.Constant) and v.value is False for v in said)


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
