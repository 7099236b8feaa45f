"""Which of a model's adapters act: the context manager that chooses them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from numbers import Real
from typing import Any

from torch import nn

from lightning_lora.layers.adapters import Adapters as LayerAdapters
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.choice import Choice, Weights
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.mixed.experts import LoRAExperts, watch_batch
from lightning_lora.layers.quantized.linear import LoRAQuantizedLinear
from lightning_lora.layers.restoring import Restoring, Undo
from lightning_lora.model.journal import complete_undo
from lightning_lora.model.record import is_merged_layer
from lightning_lora.names import nearest

Adapters = str | Mapping[str, float] | Sequence[str | Mapping[str, float] | None] | None

WITH_COPIES = (LoRALinear, LoRAQuantizedLinear)  # whose A and B are copied for several layers together


def use_adapters(model: nn.Module, adapters: Adapters) -> AbstractContextManager[None]:
    """Inside the ``with`` block only these adapters of ``model`` act: one, several with weights, or none.

    Blocks nest, and hold for the thread that entered them. Backward may run outside: under activation checkpointing
    the second forward acts as the first. What no sample used gets no gradient. Trained biases and ``also_train``
    modules are the same for all adapters; :func:`disable_lora` takes these off too. With a list, and with factors
    other than 1, layers compute on the activations' side (see ``compute`` of :func:`apply_lora`), which gives the
    weight's side's result to rounding.

    A list chooses for each sample of the batch; where a decoder alone generates by beams, for each beam. Then layers
    that compute with their weight alone (recurrent layers, parameters that are adapted by name) are refused, as are
    layers whose first dimension is not the batch, as far as its size or ``batch_first=False`` shows it. Experts in one
    parameter are called once for each choice.

    Under ``torch.compile`` one graph serves every choice, and what is refused in eager mode gives NaN. An activation
    checkpoint around compiled code repeats it with the choice of the moment: compile the code around the checkpoint.

    Args:
        model: a module with live adapters, or any part of one.
        adapters: the name of the one that acts; or names with the factors of their updates, such as
            ``{"fr": 0.7, "de": 0.3}``; or a list with one of these for each sample of the batch; or ``None``, also in
            the list, for the base.

    Raises:
        ValueError: if a name is no adapter of ``model``, a factor is not finite, there are no adapters, or they are
            merged; and in the forward pass, if a list is not as long as the batch, or a layer cannot choose by sample.
        TypeError: if ``adapters`` is none of these.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> for name in ("fr", "de"):
        ...     _ = apply_lora(model, LoRAConfig(r=1, targets="all", name=name))
        >>> with use_adapters(model, ["fr", "de", None]):
        ...     y = model(torch.ones(3, 4))
        >>> with use_adapters(model, {"fr": 0.5}):
        ...     y = model(torch.ones(3, 4))
    """
    return Restoring(partial(_choose, model, adapters))


def _choose(model: nn.Module, adapters: Adapters, undo: Undo) -> None:
    choose(model, adapters, undo)


def choose(model: nn.Module, adapters: Adapters, undo: Undo, present: Iterable[str] = ()) -> None:
    """As on entry of :func:`use_adapters`.

    Args:
        model: a module with live adapters.
        adapters: what acts.
        undo: gets the functions that undo it.
        present: names that take part in the graph also where no sample uses them, with gradients of zeros.
    """
    modules = _modules(model)
    complete_undo(model, modules.values())
    if any(map(is_merged_layer, modules.values())):
        raise ValueError("The adapters are merged into the model: call `unmerge_lora(model)` before `use_adapters`.")
    layers = {name: module for name, module in modules.items() if isinstance(module, LoRALayer)}
    names: dict[str, object] = {}
    for layer in layers.values():
        names.update(layer.lora._modules)
    if not names:
        raise ValueError("The model has no adapters to choose from: call `apply_lora` first.")
    by_sample = isinstance(adapters, Sequence) and not isinstance(adapters, str)
    samples = _samples(adapters if by_sample else [adapters], names)  # type: ignore[arg-type]
    if not samples:
        raise ValueError("`adapters` must have one entry for each sample of the batch, but got an empty list.")
    choice = Choice(
        samples,
        size=len(samples) if by_sample else None,
        present=frozenset(present),
        layers={id(layer.lora): name for name, layer in layers.items()} if by_sample else {},
        is_ambiguous=by_sample and any(vars(module).get("batch_first") is False for module in modules.values()),
        linear_layers=[layer.lora for layer in layers.values() if isinstance(layer, WITH_COPIES)] if by_sample else [],
    )
    for name, layer in layers.items():
        if layer.lora._modules:
            undo.append(partial(layer.lora.end, choice))
            layer.lora.begin(choice)
            if by_sample and isinstance(layer, LoRAExperts) and name:
                watch_batch(layer, modules[name.rpartition(".")[0]], choice, undo)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its first name, without those of adapters: one short walk, as a run chooses in every step."""
    modules: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        seen.add(id(module))
        modules[name] = module
        for key, child in module._modules.items():
            if child is not None and id(child) not in seen and not isinstance(child, LayerAdapters):
                visit(f"{name}.{key}" if name else key, child)

    visit("", model)
    return modules


def _samples(entries: Sequence[Any], names: Collection[str]) -> list[Weights]:
    """The coefficients that each entry means."""
    entries_by_name = [each for each in entries if isinstance(each, str)]
    known = {name: _weights(name, names) for name in dict.fromkeys(entries_by_name)}
    return [known[each] if isinstance(each, str) else _weights(each, names) for each in entries]


def _weights(adapters: Any, names: Collection[str]) -> Weights:
    """The coefficients that one entry means.

    Raises:
        ValueError: if a name is unknown, or a coefficient is not finite.
        TypeError: if the entry has another type.
    """
    if adapters is None:
        return {}
    weights = {adapters: 1.0} if isinstance(adapters, str) else adapters
    if not isinstance(weights, Mapping) or not all(isinstance(weight, Real) for weight in weights.values()):
        raise TypeError(
            "`adapters` must be a name, a dict from names to numbers, None, or a list of these, one for each sample, "
            f"but got {adapters!r}."
        )
    for name in weights:
        if name not in names:
            close = ", ".join(f"`{each}`" for each in nearest(str(name), list(names)))
            raise ValueError(f"`adapters` has {name!r}, which is no adapter of the model. It has {close}.")
        if not math.isfinite(weights[name]):
            raise ValueError(f"`adapters[{name!r}]` must be finite, but got {weights[name]}.")
    return {name: float(weight) for name, weight in weights.items() if weight}
