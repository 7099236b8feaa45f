"""Which modules peft would adapt, how to name exact targets, and which part of a model peft wraps.

Its rules: ``check_target_module_exists`` and ``_maybe_include_all_linear_layers`` in ``tuners/tuners_utils.py``,
``_set_trainable`` in ``utils/other.py`` (peft 0.21).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from lightning_lora import names
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.registry import is_linear, is_own_linear
from lightning_lora.names import nearest
from lightning_lora.patterns.expression import expression
from lightning_lora.peft_format.config import ALL_LINEAR, PeftConfig

HEADS = ("score", "classifier")


def module_names(model: nn.Module, aliases: bool = False) -> list[str]:
    """The names of the modules in ``model`` without our adapters; with ``aliases`` under all names."""
    hidden = {id(inner) for layer in model.modules() if isinstance(layer, LoRALayer) for inner in layer.lora.modules()}
    aliases_of: dict[int, list[str]] = {}
    for name, module in names.named_modules(model):
        if name and id(module) not in hidden:
            aliases_of.setdefault(id(module), []).append(name)
    return [name for every in aliases_of.values() for name in (every if aliases else every[:1])]


def targeted(asked: PeftConfig, model: nn.Module) -> list[str]:
    """The modules of ``model`` that peft would adapt."""
    names_there = _all_linear(asked, model) if asked.targets == ALL_LINEAR else module_names(model)
    return [name for name in names_there if is_targeted(name, asked)]


def is_targeted(name: str, asked: PeftConfig) -> bool:
    """Whether peft would adapt a linear layer, embedding or convolution of this name."""
    if _left_out(name, asked):
        return False
    return asked.targets == ALL_LINEAR or _is_target(name, asked.targets, asked.layers, asked.layers_pattern)


def saved(modules_to_save: Sequence[str], model: nn.Module) -> list[str]:
    """The modules of ``model`` that peft would train in full: it compares the end of a name, not whole words."""
    return [name for name in module_names(model, aliases=True) if name.endswith(tuple(modules_to_save))]


def _left_out(name: str, asked: PeftConfig) -> bool:
    exclude = asked.exclude or []
    excluded = expression(exclude).fullmatch(name) if isinstance(exclude, str) else _ends_with(name, exclude)
    return excluded or lies_in(name, asked.modules_to_save)


def lies_in(name: str, modules_to_save: Iterable[str]) -> bool:
    """Whether peft finds ``name`` inside one of ``modules_to_save``, which it uses as regular expressions."""
    return any(expression(rf"(^|.*\.){saved}($|\..*)").match(name) for saved in modules_to_save)


def _ends_with(name: str, tails: Iterable[str]) -> bool:
    return any(name == tail or name.endswith(f".{tail}") for tail in tails)


def _is_target(name: str, targets: list[str] | str, layers: list[int] | None, patterns: list[str]) -> bool:
    if isinstance(targets, str):
        return expression(targets).fullmatch(name)
    if name in targets:
        return True
    return _ends_with(name, targets) and (layers is None or _number(name, patterns) in layers)


def _number(name: str, patterns: list[str]) -> int | None:
    """The number of the layer that ``name`` lies in."""
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\." for pattern in patterns]
    for pattern in expressions or [r".*?\.[^.]*\.(?P<number>\d+)\."]:
        match = re.match(pattern, name)
        if match is not None:
            return int(match["number"])
    return None


def _all_linear(asked: PeftConfig, model: nn.Module) -> list[str]:
    """The linear layers of ``model`` without the output head, which only a transformers model names."""
    modules = dict(names.named_modules(model))
    linear = [name for name in module_names(model) if is_linear(modules[name]) and not is_own_linear(modules[name])]
    if not is_pretrained(model):
        return linear
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None and asked.classifies:
        head = next((module for name in HEADS if (module := getattr(model, name, None)) is not None), None)
    return [name for name in linear if modules[name] is not head]


def exact_targets(wanted: Sequence[str], model: nn.Module) -> list[str] | str:
    """``target_modules`` that match the modules ``wanted`` and no others: names, or an expression if one is a tail."""
    others, tails = set(module_names(model)) - set(wanted), tuple(f".{name}" for name in wanted)
    if any(name.endswith(tails) for name in others):
        return "|".join(re.escape(name) for name in wanted)
    return list(wanted)


def exact_pattern(name: str, among: Sequence[str]) -> str:
    """The pattern in our syntax that matches ``name`` and no other of the names in ``among``."""
    plain = not set("*?[:") & set(name) and not any(longer.endswith(f".{name}") for longer in among)
    return name if plain and "." in name else f"re:{re.escape(name)}"


def is_pretrained(module: nn.Module) -> bool:
    """Whether ``module`` is a model of transformers, which is not imported."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def inner_name(model: nn.Module, inner: str | None, holds: Callable[[str], bool]) -> str:
    """The name of the part of ``model`` that peft wraps, empty for all of it.

    Args:
        model: any module.
        inner: the name, if the user gave it.
        holds: whether the module of this name has everything that the adapter needs.

    Raises:
        ValueError: if there is no module ``inner``.
    """
    modules = dict(names.named_modules(model))
    if inner is not None:
        if inner not in modules:
            close = ", ".join(f"`{name}`" for name in nearest(inner, [name for name in modules if name]))
            raise ValueError(f"`inner` must name a module, but got {inner!r}. The nearest names are {close or 'none'}.")
        return inner
    pretrained = [name for name, module in modules.items() if is_pretrained(module) and holds(name)]
    if pretrained:
        return min(pretrained, key=len)  # the whole model, not the backbone in it
    if any(cls.__name__ == "LightningModule" for cls in type(model).__mro__):
        children = [name for name in modules if name and "." not in name and holds(name)]
        return children[0] if len(children) == 1 else ""
    return ""
