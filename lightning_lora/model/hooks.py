"""What a model has while its adapters are live: a frozen base, and hooks for base checkpoints and for checkpointing.

A base checkpoint loads into an adapted model as into a plain one. Reentrant activation checkpointing computes no
gradients where no input requires one, as after a frozen embedding. So in a model that uses it, the outputs of the first
frozen layers are made to require a gradient. ``use_reentrant=False`` needs nothing. Reversible layers, whose autograd
function runs them without gradients and again in its backward pass, are like reentrant checkpointing.
"""

from __future__ import annotations

import ast
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.config import MethodConfig
from lightning_lora.foreign import CHECKPOINT_FUNCTIONS, checkpoints_reentrantly
from lightning_lora.layers.adapted import Adapted, added_to
from lightning_lora.layers.source_code import computing_methods, functions_of, names_in
from lightning_lora.model.freeze import freeze, unfreeze
from lightning_lora.model.quantized.live import equip_quantized, strip_quantized
from lightning_lora.targets.survey import Survey, survey_of

RECOMPUTING = {"enable_grad", "set_grad_enabled", "backward_pass"}  # in the code of a backward pass that recomputes


class GraphStart:
    """A forward hook: the output of a frozen layer requires a gradient, as that of a trained layer does."""

    def __init__(self) -> None:
        self.anchor = torch.zeros((), requires_grad=True)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A copy of the output: autograd lets no code write into a leaf in place."""
        starts = isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad
        if not starts or not torch.is_grad_enabled():
            return output
        if torch.compiler.is_compiling():  # which traces no `requires_grad_`
            return _Anchored.apply(output, self.anchor)  # type: ignore[no-untyped-call]
        return output.detach().requires_grad_().clone()


class _Anchored(torch.autograd.Function):
    """A copy of a tensor that requires a gradient, because the ``anchor`` does."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None


def equip(model: nn.Module | Survey, *configs: MethodConfig) -> None:
    """Freeze the base of ``model``, whose adapters are live now, and put the hooks on that live adapters need."""
    survey = survey_of(model)
    freeze(survey, *configs)
    accept_base(survey.model)
    start_graphs(survey)
    equip_quantized(survey)


def strip(model: nn.Module) -> None:
    """The reverse of :func:`equip`, where the adapters of ``model`` were merged or removed."""
    unfreeze(model)
    be_strict(model)
    leave_graphs(model)
    strip_quantized(model)


def start_graphs(model: nn.Module | Survey) -> None:
    """Let adapters get gradients under reentrant checkpointing, if the code of ``model`` uses that."""
    modules = [module for _, module in survey_of(model).modules]
    if not any(is_reentrant(module) for module in modules):
        return
    for module in modules:
        parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
        frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
        first = frozen and not module._modules and not isinstance(module, Adapted)
        if first and not any(isinstance(hook, GraphStart) for hook in module._forward_hooks.values()):
            module.register_forward_hook(GraphStart())


def leave_graphs(model: nn.Module) -> None:
    """Remove the hooks of :func:`start_graphs`."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, GraphStart):
                del module._forward_hooks[key]


def is_reentrant(module: nn.Module) -> bool:
    """Whether ``module`` checkpoints the modules in it, and may do so with ``use_reentrant=True``."""
    by_flag = checkpoints_reentrantly(module)
    cls: Any = type(module)
    return _calls_checkpoint(cls) if by_flag is None else by_flag


@cache
def _calls_checkpoint(cls: Any) -> bool:
    if any(_calls_recomputing_function(function) for _, function in functions_of(cls)):
        return True
    return any(
        _reenters(node) for _, method in computing_methods(cls, CHECKPOINT_FUNCTIONS) for node in ast.walk(method)
    )


def _calls_recomputing_function(function: FunctionType) -> bool:
    """Whether ``function`` calls an autograd function whose backward pass runs modules again, with gradients."""
    used = names_in(function.__code__)
    values = (function.__globals__.get(name) for name in used if "apply" in used)
    return any(
        isinstance(value, type)
        and issubclass(value, torch.autograd.Function)
        and not RECOMPUTING.isdisjoint(names_in(value.backward.__code__))
        for value in values
    )


def _reenters(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    values = [keyword.value for keyword in node.keywords if keyword.arg == "use_reentrant"]
    return called in CHECKPOINT_FUNCTIONS and not any(isinstance(v, ast.Constant) and v.value is False for v in values)


class BaseCheckpoint:
    """A ``load_state_dict`` post-hook: a file with no adapter at all is the base's, and its adapters are not missing.

    A file with some of the adapters stays an error. Only a hook on the root can tell the two apart: torch gives each
    module only its own entries of the file.
    """

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        """Remove the adapters' names from the missing keys."""
        adapters = {
            names.join(name, f"{inner.method_key}.{key}")
            for name, inner in names.named_modules(module)
            if isinstance(inner, Adapted)
            for key, _ in added_to(inner).named_parameters()
        }
        missing = {key for key in incompatible.missing_keys if ends_in(key, adapters)}
        if missing and len(missing) == len(adapters) and len(incompatible.missing_keys) < len(module.state_dict()):
            incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in missing]


def ends_in(key: str, tails: set[str]) -> bool:
    """Whether ``key``, a name in a model that may hold this one as a part, ends in one of ``tails``."""
    parts = names.clean(key).split(".")
    return any(".".join(parts[start:]) in tails for start in range(len(parts)))


def accept_base(model: nn.Module) -> None:
    """Let base checkpoints load into ``model``, which has adapters now."""
    if not any(isinstance(hook, BaseCheckpoint) for hook in model._load_state_dict_post_hooks.values()):
        model.register_load_state_dict_post_hook(BaseCheckpoint())  # type: ignore[no-untyped-call]


def be_strict(model: nn.Module) -> None:
    """Remove the hook of :func:`accept_base`, where ``model`` has no adapters any more."""
    for module in model.modules():
        for key, hook in list(module._load_state_dict_post_hooks.items()):
            if isinstance(hook, BaseCheckpoint):
                del module._load_state_dict_post_hooks[key]
