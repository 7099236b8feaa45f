"""Module and parameter names as the user wrote them, whatever wraps the modules now."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def clean(name: str) -> str:
    """``name`` without what torch.compile, FSDP and checkpoint wrappers put between.

    Example:
        >>> clean("net._orig_mod.fc.weight")
        'net.fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def join(module: str, key: str) -> str:
    """The name of what a module holds under ``key``; the model itself has the empty name."""
    return f"{module}.{key}" if module else key


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under its clean name; one that is used under two names comes twice, a wrapper not at all."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not WRAPPERS & module._modules.keys():
            yield clean(name), module


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under its first clean name."""
    for name, parameter in model.named_parameters():
        yield clean(name), parameter
