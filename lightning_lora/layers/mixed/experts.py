"""Experts in one parameter, in a batch whose samples use different adapters.

The tokens of all samples are the rows of one matrix: those of a sample come one after the other, if the block around
the experts has flattened ``(batch, length, features)``. The experts' own code is then called once for each choice, with
the tokens of the samples that made it. Where this is not known, reading the parameter refuses a mixed batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer, parameter_of
from lightning_lora.layers.choice import Choice
from lightning_lora.layers.parameter import LoRAParameterHolder
from lightning_lora.layers.restoring import Undo
from lightning_lora.ops.stacked import StackedSum

Arguments = tuple[Sequence[Any], Mapping[str, Any]]


class LoRAExperts(LoRAParameterHolder):
    """Mixin for the class of a module that holds the stacks of experts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward; in a mixed batch once for each choice of the samples, if their tokens are known."""
        forward = super().forward
        if self.lora.acting is None or not self.lora.enabled or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        choice = self.lora.acting.now()
        if choice is None or choice.is_uniform or not choice.names & self.lora._modules.keys():
            return forward(*args, **kwargs)
        count = _tokens((args, kwargs), choice, self)
        return _by_choice(self, forward, choice, count, (args, kwargs)) if count else forward(*args, **kwargs)


def watch_batch(layer: LoRAExperts, block: nn.Module, choice: Choice, undo: Undo) -> None:
    """Note the shapes of the inputs of ``block``, which contains ``layer``, as long as ``choice`` holds.

    Args:
        layer: the experts.
        block: the module that has ``layer`` as its child.
        choice: gets the shapes.
        undo: gets the function that ends it.
    """
    shapes = choice.blocks.setdefault(id(layer.lora), set())
    undo.append(block.register_forward_pre_hook(partial(_note, shapes), with_kwargs=True).remove)


def _note(shapes: set[torch.Size], block: nn.Module, args: Any, kwargs: Any) -> None:
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if x is not None:
        shapes.add(x.shape)


def _tokens(arguments: Arguments, choice: Choice, layer: LoRALayer) -> int:
    """The number of tokens if they are in the order of the samples, else 0.

    The block got ``(samples, length, features)``, each tensor has one row for each token, and one of integers says
    which experts it goes to: there are no copies of tokens, and none is left out.
    """
    args, kwargs = arguments
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    counts = {len(x) if x.dim() else 0 for x in tensors}
    routes = any(x.dim() == 2 and not x.is_floating_point() for x in tensors)
    if len(counts) != 1 or not routes or choice.is_ambiguous:
        return 0
    (count,) = counts
    shapes = choice.blocks.get(id(layer.lora), ())
    known = any(len(shape) == 3 and shape[0] == choice.size and shape[0] * shape[1] == count for shape in shapes)
    return count if known else 0


def _by_choice(
    layer: LoRALayer, forward: Callable[..., Any], choice: Choice, count: int, arguments: Arguments
) -> Tensor:
    """The outputs of the experts for all tokens; names that must be present get gradients of zeros."""
    acting, outputs, order = layer.lora.acting, [], []
    assert acting is not None
    device = next(x.device for x in (*arguments[0], *arguments[1].values()) if isinstance(x, Tensor))
    for weights, samples in choice.groups(tuple(layer.lora._modules)).items():
        rows = _rows(samples, count // len(choice.samples), device)
        args, kwargs = _selected(arguments, rows)
        with acting.only(Choice([dict(weights)])):
            outputs.append(forward(*args, **kwargs))
        order.append(rows)
    if not all(isinstance(y, Tensor) and len(y) == len(rows) for y, rows in zip(outputs, order, strict=True)):
        choice.check_uniform(layer.lora)
    total: Tensor = torch.cat(outputs).index_select(0, torch.cat(order).argsort())
    for nothing in _unused(layer, choice):
        total = total + nothing
    return total


def _unused(layer: LoRALayer, choice: Choice) -> Iterator[Tensor]:
    """Zeros in a graph with every name that must be present and that no sample uses."""
    used = {name for sample in choice.samples for name, weight in sample.items() if weight}
    for name in layer.lora._modules:
        if name in choice.names and name not in used:
            for pair in layer.lora.pairs_of(name):
                value = pair(parameter_of(layer, pair.part.key))
                for factor in (value.left, value.right) if isinstance(value, StackedSum) else (value,):
                    yield factor.flatten()[:0].sum()


def _rows(samples: Sequence[int], length: int, device: torch.device) -> Tensor:
    """The rows of the tokens of ``samples``."""
    first = torch.tensor(samples).mul(length).unsqueeze(1)
    return (first + torch.arange(length)).flatten().to(device)


def _selected(arguments: Arguments, rows: Tensor) -> Arguments:
    args, kwargs = arguments

    def select(value: Any) -> Any:
        return value.index_select(0, rows) if isinstance(value, Tensor) else value

    return [select(value) for value in args], {key: select(value) for key, value in kwargs.items()}
