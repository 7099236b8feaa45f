"""Adapted layers that the user's own run would not train: a teacher or a reference among them would move.

A preset chooses by names and structure, and so it also means a frozen copy of the network.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from lightning_lora.config import RunConfig
from lightning_lora.layers.quantized.formats import codes_in
from lightning_lora.methods.base import Method
from lightning_lora.names import covers, it_or_them
from lightning_lora.trainer.imports import rank_zero_warn
from lightning_lora.trainer.watching.liveness import listed


def untrained_targets(optimizers: list[Optimizer], model: nn.Module, method: Method) -> tuple[list[str], list[str]]:
    """The adapted layers whose weights the user's run leaves alone, and those that it trains.

    Args:
        optimizers: as the user's ``configure_optimizers`` made them.
        model: with the ``requires_grad`` that the user gave its parameters.
        method: what it is adapted by.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trains = {id(parameter) for _, parameter in method.trained_parameters(model)}
    adapted = dict(weight for key, weight in method.adapted_weights(model).items() if key in trains)
    if not adapted:
        return _untrained_twins(held, model, method)
    codes = codes_in(model)  # which no run trains
    weights = {name: p for name, p in adapted.items() if p.is_floating_point() and id(p) not in codes}
    trained = {name.rpartition(".")[0] for name, p in weights.items() if p.requires_grad and id(p) in held}
    every = dict.fromkeys(name.rpartition(".")[0] for name in weights)
    return [name for name in every if name not in trained], [name for name in every if name in trained]


def _untrained_twins(held: set[int], model: nn.Module, method: Method) -> tuple[list[str], list[str]]:
    """Of the base's own parameters that the method trains: modules that the user's run leaves alone, and their twins.

    That some of them would not train is what such a method is for. But a module with the parameters of another one,
    which the run trains, may be a teacher.
    """
    own = dict(method.main_parameters(model))
    trained = [name for name, p in own.items() if p.requires_grad and id(p) in held]
    among_trained = {key: head for name in trained for key, head in _without_one_word(name, own[name])}
    twins = {
        head: among_trained[key]
        for name in own.keys() - set(trained)
        for key, head in _without_one_word(name, own[name])
        if key in among_trained
    }
    whole = [head for head in sorted(twins) if not any(covers(name, [head]) for name in trained)]
    return whole, list(dict.fromkeys(twins[head] for head in whole))


def _without_one_word(name: str, parameter: nn.Parameter) -> Iterator[tuple[tuple[object, ...], str]]:
    """For each module around the parameter ``name``: what a twin with another name has in common, and the module."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-2]):
        if not part.isdigit():
            rest = (place, *parts[:place], None, *parts[place + 1 :], tuple(parameter.shape))
            yield rest, ".".join(parts[: place + 1])


def warn_of_untrained(
    untrained: list[str], trained: list[str], method: Method, model: nn.Module, run_config: RunConfig
) -> set[str]:
    """Name the layers that train only because of the adapters.

    Where all do, a frozen backbone is meant, and what it was copied to is named. Nothing is left out without a word: a
    momentum teacher follows its student parameter by parameter, so the two must be adapted alike.

    Args:
        untrained: names of layers.
        trained: names of the other adapted layers.
        method: what ``model`` is adapted by.
        model: the module that trains.
        run_config: what the run does with it.

    Returns:
        What was named.
    """
    copies = {} if trained else method.copies(model)
    named = untrained if trained else list(copies)
    if not named:
        return set()
    others = trained or [name for name in (*copies.values(), *untrained) if name not in copies]
    given = getattr(method.config, "exclude", None) or ()
    exclude = [*given, *dict.fromkeys(_shortest(name, others) for name in named)]
    them = it_or_them(named)
    why = (
        f"{listed(named)} would not train without adapters: the module froze {them}, or no optimizer holds {them}."
        if trained
        else f"{listed(named)}, copied from {listed(list(copies.values()))}, would not train without adapters, nor "
        "would these."
    )
    if not method.adapted_weights(model):
        rank_zero_warn(
            f"{listed(named)} has the parameters of {listed(trained)}, and would not train without this callback: the "
            f"module froze {them}, or no optimizer holds {them}. `train` means {them} too. To leave {them} alone, as a "
            f"fixed teacher or a reference must be, give exclude={exclude!r}."
        )
        return set(named)
    rank_zero_warn(
        f"{why} `targets` means {them}, so adapters are there, and train where they get a gradient. To leave {them} "
        f"alone, as a fixed teacher or a reference must be, give exclude={exclude!r}."
        + (f" With `export` no other code may move {them}, as that of a momentum teacher." if run_config.export else "")
    )
    return set(named)


def _shortest(name: str, trained: list[str]) -> str:
    """The outermost module around ``name`` in which none of the layers ``trained`` lies; ``name`` if there is none."""
    parts = name.split(".")
    around = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next((head for head in around if not any(covers(other, [head]) for other in trained)), name)
