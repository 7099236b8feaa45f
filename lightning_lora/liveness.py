"""Whether every adapter is alive: it runs, it gets a gradient, and an optimizer holds it.

What is dead is told at the first step and after the first evaluation, with its likely cause. Nothing is left on the
adapters afterwards.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lora.adapter import Adapter
from lightning_lora.layer import adapted_layers
from lightning_lora.lightnings import MisconfigurationException, rank_zero_warn
from lightning_lora.names import join
from lightning_lora.patterns import folded
from lightning_lora.wraps import wrap

RAN, WITHOUT_GRADIENTS = 1, 2


class Liveness:
    """Watches the adapters of ``module`` in the first steps of a run.

    Args:
        module: the module that trains.
    """

    def __init__(self, module: nn.Module) -> None:
        self.adapters: dict[str, Adapter] = {}
        for name, layer in adapted_layers(module):
            for adapter in layer.lora.every():
                self.adapters[join(name, adapter.part.name) if adapter.part.name else name] = adapter
        self.ran: dict[int, int] = {}
        self.checked: set[int] = set()
        self.stack = ExitStack()
        self.watches = not any(map(_is_compiled, module.modules()))
        self.evaluated = False
        self.watch()

    def watch(self) -> None:
        """Note from now on which adapters run; compiled code is left alone, where only gradients tell."""
        self.close()
        self.ran = {}
        if self.watches:
            for adapter in self.adapters.values():
                for method in ("forward", "added_to"):
                    wrap(self.stack, adapter, method, self._noting(adapter))

    def _noting(self, adapter: Adapter) -> Any:
        def note(original: Any, *args: Any, **kwargs: Any) -> Any:
            self.ran[id(adapter)] = RAN if torch.is_grad_enabled() else self.ran.get(id(adapter), WITHOUT_GRADIENTS)
            return original(*args, **kwargs)

        return note

    def check_held(self, optimizers: list[Optimizer]) -> None:
        """Raise if an adapter is in no optimizer.

        Raises:
            MisconfigurationException: naming them.
        """
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, adapter in self.adapters.items() if id(adapter.B) not in held]
        if missing and held:
            raise MisconfigurationException(
                f"{listed(missing)} no optimizer holds, so it would never train. Something took it out of the groups "
                "after `configure_optimizers`: let LoRACallback come after that callback, or name it in `exclude`."
            )

    def check_step(self, optimizer: Optimizer, optimizers: list[Optimizer]) -> None:
        """At the first step of ``optimizer``, one of ``optimizers``: name the adapters in it that got no gradient.

        Raises:
            MisconfigurationException: if no adapter in it got one.
        """
        if id(optimizer) in self.checked:
            return
        self.checked.add(id(optimizer))
        self._check_dropout()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        inside = {name: adapter for name, adapter in self.adapters.items() if id(adapter.B) in held}
        dead = {name: adapter for name, adapter in inside.items() if adapter.B.grad is None}
        if dead and len(dead) == len(inside):
            raise MisconfigurationException("No adapter got a gradient at the first step. " + self._causes(dead))
        if dead:
            rank_zero_warn(
                f"{len(dead)} of {len(inside)} adapters got no gradient at the first step. {self._causes(dead)}"
            )
        if self.checked >= set(map(id, optimizers)):
            self.close()

    def _check_dropout(self) -> None:
        idle = [name for name, adapter in self.adapters.items() if adapter.dropout and not adapter.training]
        if idle:
            rank_zero_warn(
                f"{listed(idle)} train without `dropout`: their layers are in eval mode, as models of transformers are "
                "after `from_pretrained`, and Lightning leaves them so. Call `.train()` on the model in the module's "
                "`__init__` if that is not meant."
            )

    def check_evaluation(self) -> None:
        """After the first evaluation: name the adapters that ran in training and not in it."""
        idle = [name for name, adapter in self.adapters.items() if id(adapter) not in self.ran]
        self.evaluated = True
        self.close()
        if self.watches and idle and len(idle) < len(self.adapters):
            rank_zero_warn(
                f"{listed(idle)} did not run in the first evaluation, while other adapters did: what is measured there "
                "may be the base. Either evaluation takes another branch, or code reads the weight and not the layer; "
                f"for that name the weight itself, as in targets=[{join(idle[0], 'weight')!r}]."
            )

    def close(self) -> None:
        """Leave the adapters as they were."""
        self.stack.close()

    def _causes(self, dead: dict[str, Adapter]) -> str:
        idle = [name for name, adapter in dead.items() if id(adapter) not in self.ran and self.watches]
        hidden = [name for name, adapter in dead.items() if self.ran.get(id(adapter)) == WITHOUT_GRADIENTS]
        cut = [name for name in dead if name not in idle and name not in hidden]
        found = []
        if idle:
            found.append(
                f"{listed(idle)} did not run: it lies in a branch that this batch did not take, or code reads its "
                f"weight and not the layer. Name the weight itself, targets=[{join(idle[0], 'weight')!r}], or leave it "
                "out with `exclude`."
            )
        if hidden:
            found.append(
                f"{listed(hidden)} ran where gradients are off: under `torch.no_grad`, or in reentrant activation "
                "checkpointing whose inputs ask for no gradient. Use checkpoint(..., use_reentrant=False)."
            )
        if cut:
            found.append(f"{listed(cut)} ran, but the loss does not depend on it: its output is unused or detached.")
        return " ".join(found)


def _is_compiled(module: nn.Module) -> bool:
    in_place = getattr(module, "_compiled_call_impl", None) or getattr(module, "_compiler_ctx", None)
    return hasattr(module, "_orig_mod") or in_place is not None


def listed(names: list[str]) -> str:
    """The first name, and how many like it."""
    more = list(dict.fromkeys(map(folded, names)))
    shown = ", ".join(f"`{name}`" for name in (names if len(names) < 4 else more)[:4])
    return shown if len(names) < 4 else f"{shown} ({len(names)} in all)"
