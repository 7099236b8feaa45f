"""Reentrant activation checkpointing gives no gradients where its inputs ask for none, as behind a frozen embedding.

So where a model uses it, what its first frozen layers give is made to ask for a gradient. The other kind
(``use_reentrant=False``) needs nothing.
"""

from __future__ import annotations

import ast
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

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
