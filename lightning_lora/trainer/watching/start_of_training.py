"""The base is as of the first batch: what hooks set between ``setup`` and then belongs to it, and is named.

A module may load pretrained weights, or draw all of its matrices, in ``on_fit_start`` or ``on_train_start``. Adapters
that such a hook overwrites get their values again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.distributed.sharded import local_shard
from lightning_lora.foreign import FRAMEWORKS
from lightning_lora.model.fingerprint import shape_alone, sums_of
from lightning_lora.model.frozen_values import is_in_pieces
from lightning_lora.names import it_or_them
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.trainer.imports import MisconfigurationException, rank_zero_warn
from lightning_lora.trainer.watching.frozen_watch import FrozenWatch, in_full

START_HOOKS = ("on_fit_start", "on_sanity_check_start", "on_sanity_check_end", "on_train_start", "on_train_epoch_start")


class StartOfTraining:
    """The adapters and the frozen parameters between the strategy's set-up and the first batch.

    Args:
        watch: of the frozen parameters.
        has_hooks: whether code of the user's runs in between.
    """

    def __init__(self, watch: FrozenWatch, has_hooks: bool) -> None:
        self.watch, self.module, self.method, self.has_hooks = watch, watch.module, watch.method, has_hooks
        self.adapters = [
            (name, p, local_shard(p).clone()) for name, p in self.method.added_parameters(self.module) if not p.is_meta
        ]
        self.adapted = {id(weight) for _, weight in self.method.adapted_weights(self.module).values()}
        self.loads = {id(p): count for p, count in self._loads()}

    def _loads(self) -> list[tuple[nn.Parameter, int]]:
        modules = [watched.module for watched in self.method.watched(self.module).values()]
        return [(p, getattr(module, "loads", 0)) for module in modules for p in module.parameters()]

    def settle(self) -> list[str]:
        """Before the first batch: take the present values of the frozen parameters as the base.

        Returns:
            The parameters that were set after ``setup``.
        """
        self._restore_adapters()
        values, base = self.watch.values, self.watch.base
        changed = values.changed_exactly(base) if self.has_hooks else values.changed(base)
        late = [name for name in dict.fromkeys([*changed, *self._replaced()]) if name in self.watch.frozen]
        for name in late:
            parameter = self.watch.frozen[name]
            base[name] = shape_alone(parameter) if is_in_pieces(parameter) else sums_of(parameter)
        if late:
            self.watch.mark()
            rank_zero_warn(
                f"Set after `setup`, by a hook such as `on_fit_start` or by a callback: {in_full(late)}. The base of "
                "the adapters is as of the first batch. `test`, `predict` and `load_from_checkpoint` call no such "
                f"hook: for these set {it_or_them(late)} in `__init__`, `setup` or `configure_model`."
            )
        return late

    def _replaced(self) -> list[str]:
        """The names whose parameter is another object than at the end of the set-up; what is new is frozen, too.

        Raises:
            MisconfigurationException: if an adapted weight was tied or parametrized meanwhile.
        """
        before = self.watch.frozen
        if any(map(is_in_pieces, before.values())):  # FSDP exchanges them
            return []
        now = self.watch.survey()
        if now.keys() == before.keys() and all(now[name] is parameter for name, parameter in before.items()):
            return []
        self.watch.frozen = now
        self.watch.mark()
        gone = before.keys() - self.watch.frozen.keys()
        self._check_adapted({name: before[name] for name in gone})
        for name in gone:
            self.watch.base.pop(name, None)
        replaced = [name for name, parameter in self.watch.frozen.items() if before.get(name) is not parameter]
        if replaced:
            self.method.freeze(self.module)
        return replaced

    def _check_adapted(self, gone: Mapping[str, nn.Parameter]) -> None:
        aliases = {names.clean(name): p for name, p in self.module.named_parameters(remove_duplicate=False)}
        for name, parameter in gone.items():
            if name in aliases and {id(parameter), id(aliases[name])} & self.adapted:
                raise MisconfigurationException(
                    f"`{name}` or what it is tied to is adapted, and was tied after `setup`, by a hook such as "
                    "`on_fit_start`. Tie it in `__init__`, `setup` or `configure_model`."
                )
            if id(parameter) in self.adapted and name not in aliases:
                raise MisconfigurationException(
                    f"`{name}` is adapted, and was removed or parametrized after `setup`, by a hook such as "
                    f"`on_fit_start`. Leave it out: exclude=[{name.rpartition('.')[0]!r}]."
                )

    @torch.no_grad()
    def _restore_adapters(self) -> None:
        loaded = {id(p) for p, count in self._loads() if count != self.loads.get(id(p))}
        kept = [adapter for adapter in self.adapters if id(adapter[1]) not in loaded]
        if _all_the_same([local_shard(parameter) for _, parameter, _ in kept], [value for _, _, value in kept]):
            return
        changed = [adapter for adapter in kept if not same_bits(local_shard(adapter[1]), adapter[2])]
        for _, parameter, value in changed:
            local_shard(parameter).copy_(value)
        if changed:
            rank_zero_warn(
                "Written after `setup`, by a hook that initializes weights or by a callback: "
                f"{in_full([name for name, _, _ in changed])}. Adapters have the values again that the run started "
                "with (a fresh B is zero). To start from given adapters use `init_from`, or load them by "
                "`load_lora_state_dict`."
            )


def _all_the_same(tensors: list[Tensor], values: list[Tensor]) -> bool:
    """Whether all ``tensors`` are bit-equal to ``values``; one synchronization for each dtype and device."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for tensor, value in zip(tensors, values, strict=True):
        if tensor.shape != value.shape or (tensor.device, tensor.dtype) != (value.device, value.dtype):
            return False
        groups.setdefault((tensor.device, tensor.dtype), []).append((tensor, value))
    joined = ([torch.cat([t.reshape(-1) for t in part]) for part in zip(*g, strict=True)] for g in groups.values())
    return all(same_bits(first, second) for first, second in joined)


def has_start_hooks(module: nn.Module, callbacks: Iterable[Any]) -> bool:
    """Whether the user's code runs between ``setup`` and the first batch, and may set weights there."""
    return any(_is_foreign(owner, hook) for owner in (module, *callbacks) for hook in START_HOOKS)


def _is_foreign(owner: object, hook: str) -> bool:
    cls = next((base for base in type(owner).__mro__ if hook in vars(base)), None)
    by_class = cls is not None and cls.__module__.partition(".")[0] not in FRAMEWORKS
    return by_class or hook in vars(owner)
