"""The gradients of adapters at an optimizer's step: none for what did not run, and balanced shares.

An adapter with a gradient of zeros is moved by weight decay, and by Adam's averages. So an adapter that no sample of
any rank used since the last step, and whose gradient is zero, gets the gradient ``None``, which an optimizer skips. A
gradient that is not zero stays: a ``use_adapters`` block in the step, or a backward pass that was not counted, made it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from lightning_lora.distributed.sharded import local_shard

ALL = ""  # the key of all samples


class AdapterGradients:
    """Counts the samples of each adapter between two steps of an optimizer, and corrects the gradients for them.

    Args:
        names: of the adapters that train.
        name_of: the name of each of their parameters, by ``id``.
        balance: whether to divide each gradient by the adapter's share of the samples.
        sees_backward: whether Lightning runs every backward pass, as in automatic optimization.

    Attributes:
        has_stepped: whether an optimizer has stepped in this run.
    """

    def __init__(self, names: Sequence[str], name_of: Mapping[int, str], balance: bool, sees_backward: bool) -> None:
        self.names, self.name_of, self.balance = list(names), name_of, balance
        self.sees_backward = sees_backward
        self.counts: dict[int, Counter[str]] = {}
        self.batch = counted([])
        self.has_stepped = False

    def begin_batch(self, chosen: str | Sequence[str], optimizers: Iterable[Optimizer]) -> None:
        """Count the samples of a batch now, if Lightning may not see its backward pass."""
        self.batch = counted(chosen)
        if not self.sees_backward:
            self._count(optimizers)

    def note_backward(self, optimizers: Iterable[Optimizer]) -> None:
        """Count the samples of the batch, whose backward pass begins."""
        if not self.sees_backward:
            self.sees_backward = True
            self.counts.clear()  # from here on a batch counts by its backward passes
        self._count(optimizers)

    def _count(self, optimizers: Iterable[Optimizer]) -> None:
        """Add the samples of the batch to those whose gradients each optimizer has."""
        for optimizer in optimizers:
            if id(optimizer) in self.counts and all(each.grad is None for each in _parameters(optimizer)):
                del self.counts[id(optimizer)]  # the gradients were dropped without a step
            self.counts.setdefault(id(optimizer), Counter()).update(self.batch)

    def before_step(self, optimizer: Optimizer) -> set[str]:
        """Correct the gradients in ``optimizer``, before they are clipped; every rank must call it.

        Returns:
            The adapters that samples of any rank used since the last step, or that have a gradient otherwise.
        """
        self.has_stepped = True
        counts = self.counts.pop(id(optimizer), self.batch)
        unused = [name for name in self.names if not counts[name]]
        held = self._held(optimizer) if unused or self.balance else {}
        sizes = {name: _size([each.grad for each in held[name]]) for name in unused if name in held}
        counts, not_zero = self._over_ranks(counts, sizes, optimizer)
        used = {name for name in self.names if counts[name] or name in not_zero}
        for name, parameters in held.items():
            for parameter in parameters:
                if name not in used:
                    parameter.grad = None
                elif self.balance and counts[name] and parameter.grad is not None:
                    local_shard(parameter.grad).mul_(counts[ALL] / counts[name])
        return used

    def _held(self, optimizer: Optimizer) -> dict[str, list[Tensor]]:
        """The parameters in ``optimizer`` that have a gradient, by the name of their adapter."""
        held: dict[str, list[Tensor]] = {}
        for parameter in _parameters(optimizer):
            name = self.name_of.get(id(parameter))
            if name is not None and parameter.grad is not None:
                held.setdefault(name, []).append(parameter)
        return held

    def _over_ranks(
        self, counts: Counter[str], sizes: Mapping[str, Tensor], optimizer: Optimizer
    ) -> tuple[Counter[str], set[str]]:
        """The counts of all ranks together, and the names whose gradient is not zero on any of them."""
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return counts, {name for name, size in sizes.items() if size != 0}
        keys = [ALL, *self.names]
        device = next((local_shard(parameter).device for parameter in _parameters(optimizer)), torch.device("cpu"))
        total = torch.tensor([counts[key] for key in keys] + [0] * len(keys), device=device)
        for name, size in sizes.items():
            total[len(keys) + keys.index(name)] = size != 0
        distributed.all_reduce(total)
        summed, not_zero = total.view(2, -1).tolist()
        names = {key for key, ranks in zip(keys, not_zero, strict=True) if ranks}
        return Counter(dict(zip(keys, summed, strict=True))), names


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _size(gradients: Iterable[Tensor | None]) -> Tensor:
    """The sum of absolute values on this rank, which is zero only where all are, as squares may underflow."""
    shards = [local_shard(gradient) for gradient in gradients if gradient is not None]
    norms = torch._foreach_norm(shards, 1)
    return torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).sum()


def counted(chosen: str | Sequence[str]) -> Counter[str]:
    """How many samples use each adapter; one adapter for the whole batch counts as one sample.

    Example:
        >>> sorted(counted(["fr", "de", "fr"]).items())
        [('', 3), ('de', 1), ('fr', 2)]
    """
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    return Counter({ALL: len(names), **Counter(names)})
