"""Check that every adapter is alive: it runs, it gets a gradient, and an optimizer holds it.

A dead adapter is named at the first step and after the first evaluation, with its likely cause. Nothing is left on the
adapters afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import checkpoint

from lightning_lora.foreign import is_compiled
from lightning_lora.methods.base import Watched
from lightning_lora.names import folded
from lightning_lora.trainer.imports import MisconfigurationException, rank_zero_warn
from lightning_lora.trainer.patching import patch_method
from lightning_lora.trainer.watching.nothing_trains import all_zero, zero_gradients

RAN, WITHOUT_GRADIENTS, CHECKPOINTED = 1, 2, 3
CHECKPOINTING = checkpoint.__file__
PATIENCE = 8  # steps in which parts that train in turn may run for the first time


class Liveness:
    """Watches the adapters of ``module`` in the first steps of a run.

    Args:
        module: the module that trains.
        watched: its adapters by the name of their site.
        named: adapted layers that a warning named before; a layer is named once.

    Attributes:
        used: where a batch chooses among several adapters, those that the samples of this step chose.
        evaluated_adapters: those that evaluation chose so far.
    """

    def __init__(self, module: nn.Module, watched: Mapping[str, Watched], named: Collection[str] = ()) -> None:
        self.module, self.adapters = module, dict(watched)
        self.named = {name for name, adapter in watched.items() if adapter.weight.rpartition(".")[0] in named}
        self.trained: dict[int, int] = {}
        self.evaluated: dict[int, int] | None = None
        self.evaluation_checked = self.stepped = False
        self.checked: set[tuple[int, str]] = set()  # optimizers with the adapters in them
        self.used: Collection[str] | None = None
        self.evaluated_adapters: Collection[str] | None = None
        self.waiting: dict[str, Watched] = {}
        self.patience = PATIENCE
        self.stack = ExitStack()
        self.watches = not any(map(is_compiled, module.modules()))
        self.what = "adapter" if any(each.calls for each in watched.values()) else "trained parameter"
        self.watch(self.trained)

    def watch(self, ran: dict[int, int]) -> None:
        """Record in ``ran`` which adapters run from now on. Compiled code is not patched; gradients alone tell."""
        self.close()
        checked = {name for _, name in self.checked} if ran is self.trained and self.used is not None else set()
        due = {name: each for name, each in self.adapters.items() if each.adapter not in checked}
        for adapter in (due | self.waiting).values() if self.watches else ():
            for method in adapter.calls:
                if hasattr(adapter.module, method):
                    patch_method(self.stack, adapter.module, method, _noting(adapter.module, ran))

    def check_held(self, optimizers: list[Optimizer]) -> None:
        """Raise if an adapter is in no optimizer.

        Raises:
            MisconfigurationException: naming them.
        """
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, adapter in self.adapters.items() if id(adapter.parameter) not in held]
        if missing and held:
            raise MisconfigurationException(
                f"No optimizer holds the {self.what} of {listed(missing)}, so it would never train. A callback or a "
                f"hook took it out of the groups after `configure_optimizers`. Leave the parameters of adapters in "
                "them, or leave the layer out with `exclude`."
            )

    def check_step(self, optimizer: Optimizer, optimizers: list[Optimizer]) -> None:
        """At the first step of ``optimizer`` that has any gradient: name the adapters in it that got none.

        Where batches choose, an adapter is checked at the first step in which a sample used it.

        Raises:
            MisconfigurationException: if no adapter in it got one.
        """
        if self.stepped and not self.waiting:
            return
        self._check_waiting()
        inside, unchecked = self._inside(optimizer), self._unchecked(optimizer)
        now = unchecked if self.used is None else {name for name in unchecked if not name or name in self.used}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not now or all(parameter.grad is None for parameter in parameters):
            return
        if not any(key == id(optimizer) for key, _ in self.checked):
            self._check_dropout()
            if all_zero(parameters):
                rank_zero_warn(zero_gradients(self.module))
        self.checked |= {(id(optimizer), name) for name in now}
        self._check_gradients({name: adapter for name, adapter in inside.items() if adapter.adapter in now})
        self.stepped = not any(map(self._unchecked, optimizers))
        self._close_if_done()
        if self.used is not None and not self.stepped:
            self.watch(self.trained)  # those alone that no sample has used

    def _inside(self, optimizer: Optimizer) -> dict[str, Watched]:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {name: adapter for name, adapter in self.adapters.items() if id(adapter.parameter) in held}

    def _unchecked(self, optimizer: Optimizer) -> set[str]:
        """The adapters in ``optimizer`` that are not checked yet; one without a name where there are no several."""
        names = {adapter.adapter for adapter in self._inside(optimizer).values()} or {""}
        return {name for name in names if (id(optimizer), name) not in self.checked}

    def _check_gradients(self, adapters: dict[str, Watched]) -> None:
        dead = {name: adapter for name, adapter in adapters.items() if self._is_dead(adapter)}
        if dead and len(dead) == len(adapters):
            raise MisconfigurationException(f"No {self.what} got a gradient at the first step. " + self._causes(dead))
        idle = {name: adapter for name, adapter in dead.items() if self.watches and self._state(adapter) is None}
        self.waiting |= {name: adapter for name, adapter in idle.items() if name not in self.named}
        self._warn({name: dead[name] for name in dead if name not in idle}, len(adapters), "at the first step")

    def _is_dead(self, adapter: Watched) -> bool:
        """Whether it has no gradient; of a parameter that others give one too, whether it did not run."""
        did_not_run = adapter.shared and self.watches and self._state(adapter) != RAN
        return did_not_run or adapter.parameter.grad is None

    def _check_waiting(self) -> None:
        """Some modules train their parts in turn, so that a part does not run in the first step but in a later one."""
        if self.waiting:
            self.patience -= 1
            self.waiting = self._not_run_yet()
            if self.patience <= 0:
                self.report_waiting()
            self._close_if_done()

    def _not_run_yet(self) -> dict[str, Watched]:
        return {
            name: adapter
            for name, adapter in self.waiting.items()
            if self._state(adapter) != RAN and (adapter.shared or adapter.parameter.grad is None)
        }

    def report_waiting(self) -> None:
        """Name the adapters that did not run in any of the first steps."""
        waiting, self.waiting = self._not_run_yet(), {}
        self._warn(waiting, len(self.adapters), "in the first steps")

    def _warn(self, dead: dict[str, Watched], count: int, when: str) -> None:
        dead = {name: adapter for name, adapter in dead.items() if name not in self.named}
        self.named.update(dead)
        if dead:
            rank_zero_warn(f"{len(dead)} of {count} {self.what}s got no gradient {when}. {self._causes(dead)}")

    def _close_if_done(self) -> None:
        if self.stepped and not self.waiting:
            self.close()

    def _state(self, adapter: Watched) -> int | None:
        """How the adapter ran in training, or ``None`` if it did not."""
        return self.trained.get(id(adapter.module))

    def _check_dropout(self) -> None:
        modules = {name: adapter.module for name, adapter in self.adapters.items() if adapter.calls}
        idle = [name for name, module in modules.items() if getattr(module, "dropout", 0) and not module.training]
        if idle:
            rank_zero_warn(
                f"{listed(idle)} train without `dropout`: their layers are in eval mode, as models of transformers are "
                "after `from_pretrained`, and Lightning leaves them so. Call `.train()` on the model in the module's "
                "`__init__` if that is not meant."
            )

    def begin_evaluation(self) -> None:
        """Watch the first evaluation."""
        if self.evaluated is None:
            self.report_waiting()
            self.evaluated = {}
            self.watch(self.evaluated)

    def check_evaluation(self) -> None:
        """After the first evaluation: name the adapters that ran in training and not in it.

        Where none ran the evaluation does not use the model, and there is nothing to say.
        """
        if self.evaluated is None or self.evaluation_checked:
            return
        used = {name: adapter for name, adapter in self.adapters.items() if self._state(adapter) is not None}
        if self.evaluated_adapters is not None:
            used = {name: adapter for name, adapter in used.items() if adapter.adapter in self.evaluated_adapters}
        idle = [n for n, adapter in used.items() if id(adapter.module) not in self.evaluated and n not in self.named]
        self.evaluation_checked = True
        self.close()
        if not self.stepped:
            self.watch(self.trained)
        if idle and self.evaluated and self.watches:
            named = any(self.adapters[name].weight for name in idle)
            remedy = f": name the weight itself, {self._advice(idle)}" if named else ""
            rank_zero_warn(
                f"{listed(idle)} ran in training and did not run in the first evaluation. If evaluation takes another "
                "branch, as a GAN's does, this is as it should be; if code reads the weight and not the layer, the "
                f"base is measured{remedy}."
            )

    def close(self) -> None:
        """Take every patch off the adapters."""
        self.stack.close()

    def causes(self) -> str:
        """Why no adapter would get a gradient from the last forward pass."""
        return self._causes(self.adapters)

    def _advice(self, names: list[str]) -> str:
        weights = list(dict.fromkeys(self.adapters[name].weight for name in names))  # one for query, key and value
        listed_weights = ", ".join(map(repr, weights[:4])) + (", ..." if len(weights) > 4 else "")
        return f"in addition to the other targets, targets=[..., {listed_weights}]"

    def _excluding(self, names: list[str]) -> list[str]:
        """The shortest names of modules that hold adapters of ``names`` alone."""
        others = [name for name in self.adapters if name not in names]
        patterns = []
        for name in names:
            parts = name.split(".")
            around = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
            free = (module for module in around if not any(f"{other}.".startswith(f"{module}.") for other in others))
            patterns.append(next(free, name.partition(" (")[0]))
        return list(dict.fromkeys(patterns))

    def _why_idle(self, idle: list[str]) -> str:
        if any(self.adapters[name].weight for name in idle):
            return (
                f"{listed(idle)} did not run: this batch took another branch, or code reads the weight and not the "
                f"layer. Name the weight itself, {self._advice(idle)}, or leave the layer out with `exclude`."
            )
        return (
            f"{listed(idle)} did not run, or not into the loss: this batch took another branch, or code bypasses the "
            f"module. If that is meant, leave it out: exclude={self._excluding(idle)!r}."
        )

    def _causes(self, dead: dict[str, Watched]) -> str:
        if not self.watches:
            return f"{listed(list(dead))} did not run, or not into the loss: compiled code hides which."
        idle, hidden, checkpointed, cut = (
            [name for name, adapter in dead.items() if self._state(adapter) == state]
            for state in (None, WITHOUT_GRADIENTS, CHECKPOINTED, RAN)
        )
        causes = []
        if idle:
            causes.append(self._why_idle(idle))
        if hidden:
            causes.append(
                f"{listed(hidden)} ran where gradients are off, under `torch.no_grad`, as a teacher does. Leave a "
                f"teacher out, exclude={self._excluding(hidden)!r}; call what trains outside of `torch.no_grad`."
            )
        if checkpointed:
            causes.append(
                f"{listed(checkpointed)} ran in reentrant activation checkpointing whose inputs require no gradient. "
                "Use checkpoint(..., use_reentrant=False)."
            )
        if cut:
            causes.append(f"{listed(cut)} ran, but not into the loss: the output is unused or detached.")
        return " ".join(causes)


def _noting(adapter: nn.Module, ran: dict[int, int]) -> Callable[..., Any]:
    def note(original: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            ran[id(adapter)] = RAN
        elif ran.get(id(adapter)) != RAN:
            ran[id(adapter)] = CHECKPOINTED if _in_checkpoint() else WITHOUT_GRADIENTS
        return original(*args, **kwargs)

    return note


def _in_checkpoint() -> bool:
    """Whether torch's reentrant activation checkpointing called this code: it switches gradients off, too."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename != CHECKPOINTING:
        frame = frame.f_back
    return frame.f_code.co_filename == CHECKPOINTING


def listed(names: list[str]) -> str:
    """The first of ``names``, and how many there are."""
    more = list(dict.fromkeys(map(folded, names)))
    shown = ", ".join(f"`{name}`" for name in (names if len(names) < 4 else more)[:4])
    return shown if len(names) < 4 else f"{shown} ({len(names)} in all)"
