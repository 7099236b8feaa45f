"""The part of a model that peft wraps, to which the names in a directory are relative."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_lora import names
from lightning_lora.layers.registry import original_class
from lightning_lora.peft_format.contents import attention_of, holders, other_state
from lightning_lora.peft_format.targets import inner_name


@dataclass(frozen=True)
class Belongings:
    """The names of what a directory holds of a model.

    Args:
        adapted: the modules that peft adapts.
        more: everything else: parameters that train in full, biases and changed buffers.
    """

    adapted: list[str]
    more: list[str]


def belongings_of(model: nn.Module) -> Belongings:
    """What a directory holds of the adapted ``model``."""
    modules, adapted = dict(names.named_modules(model)), list(holders(model))
    places = (attention_of(name, modules) for name, _, _ in adapted)
    peft_adapts = [name if place is None else place for place, (name, _, _) in zip(places, adapted, strict=True)]
    return Belongings(peft_adapts, list(other_state(model, adapted)))


def inner_of(model: nn.Module, inner: str | None, held: Belongings) -> tuple[str, nn.Module]:
    """The part that peft wraps and its name; all that is ``held`` must lie in it.

    Raises:
        ValueError: if there is no module ``inner``, or something does not lie in it.
    """
    modules, every = dict(names.named_modules(model)), [*held.adapted, *held.more]
    name = inner_name(model, inner, lambda head: _outside(every, head, modules) is None)
    outside = _outside(every, name, modules)
    if outside is not None:
        raise ValueError(
            f"`{outside}` belongs to the adapter and does not lie inside `{name}`, which peft would wrap. Name a "
            "module that holds both in `inner`; inner='' is the whole model."
        )
    return name, modules[name]


def wider_than_adapters(model: nn.Module, held: Belongings) -> str | None:
    """What to know where the part that peft wraps is chosen for something that is saved in addition to the adapters.

    The user may expect the names of a smaller part, which has all adapters: peft loads a directory with other names
    without an error, and without any effect.
    """
    modules = dict(names.named_modules(model))
    narrow = inner_name(model, None, lambda head: _outside(held.adapted, head, modules) is None)
    outside = _outside(held.more, narrow, modules)
    if outside is None:
        return None
    _, wide = inner_of(model, None, held)
    return (
        f"`{outside}` is saved with the adapters and lies outside of `{narrow}`, which holds these: the names in the "
        f"directory are relative to the {original_class(wide).__name__}, and peft has to wrap that, by "
        "PeftModel.from_pretrained(module, directory)."
    )


def _outside(keys: Iterable[str], head: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The first of ``keys`` that does not lie in the module ``head``, under any name of it."""
    heads = tuple(f"{alias}." if alias else "" for alias, module in modules.items() if module is modules[head])
    return next((key for key in keys if not key.startswith(heads)), None)
