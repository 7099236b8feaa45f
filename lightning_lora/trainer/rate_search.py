"""``lr_scale`` beside a LearningRateFinder: it searches for the module's rate, of which adapters take a multiple."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_lora.foreign import RATE_FINDER, is_a
from lightning_lora.methods.base import Method
from lightning_lora.trainer.patching import patch_method


def scale_search(stack: ExitStack, trainer: Any, method: Method, scale: float) -> None:
    """Apply ``scale`` in the search of each LearningRateFinder of the run, and to the rate that it finds.

    The finder, which ``Tuner.lr_find`` adds too, sets one rate in all groups. The search would then be of the adapters'
    own rate, but a later ``fit`` multiplies the found one; and where ``fit`` goes on, the factor would be lost.

    Args:
        stack: closed at the end of the run.
        trainer: the Trainer.
        method: what the module is adapted by.
        scale: the factor.
    """

    def search(original: Callable[..., None], trainer: Any, module: nn.Module) -> None:
        before = _rates(trainer.optimizers)
        added = {id(parameter) for _, parameter in method.main_parameters(module)}
        with _scaled_steps(trainer.optimizers, scale, added):
            original(trainer, module)
        if _rates(trainer.optimizers) != before:  # the same where it found none, or is to leave the rate alone
            for group in _groups_of(trainer.optimizers, added):
                group["lr"] = group["lr"] * scale

    for callback in trainer.callbacks if scale != 1 else ():
        if is_a(callback, RATE_FINDER):
            patch_method(stack, callback, "lr_find", search)


@contextmanager
def _scaled_steps(optimizers: Iterable[Optimizer], scale: float, added: Container[int]) -> Iterator[None]:
    """Multiply the rates of adapters while an optimizer steps: between steps the finder sets and reads them."""
    rates: list[tuple[dict[str, Any], Any]] = []

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        for group in _groups_of([optimizer], added):
            rates.append((group, group["lr"]))
            group["lr"] = group["lr"] * scale

    def after_step(*_: Any) -> None:
        while rates:
            group, rate = rates.pop()
            group["lr"] = rate

    with ExitStack() as hooks:
        for optimizer in optimizers:
            hooks.callback(optimizer.register_step_pre_hook(before_step).remove)
            hooks.callback(optimizer.register_step_post_hook(after_step).remove)
        hooks.callback(after_step)  # a step may have raised
        yield


def _groups_of(optimizers: Iterable[Optimizer], added: Container[int]) -> list[dict[str, Any]]:
    """The groups that hold adapters; loading a checkpoint makes new ones."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [group for group in groups if any(id(parameter) in added for parameter in group["params"])]


def _rates(optimizers: Iterable[Optimizer]) -> list[Any]:
    return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
