"""The gradients of adapters at an optimizer's step: none for what no sample used, and balanced shares.

An adapter with a gradient of zeros is moved by weight decay, and by Adam's averages. So what no sample of any rank used
since the last step has the gradient ``None``, which an optimizer skips.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

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

    Attributes:
        has_stepped: whether an optimizer has stepped in this run.
    """

    def __init__(self, names: Sequence[str], name_of: Mapping[int, str], balance: bool) -> None:
        self.names, self.name_of, self.balance = list(names), name_of, balance
        self.counts: dict[int, Counter[str]] = {}
        self.has_stepped = False

    def note_backward(self, chosen: str | Sequence[str], optimizers: Iterable[Optimizer]) -> None:
        """Count the samples of a batch, whose backward pass begins."""
        for optimizer in optimizers:
            self.counts.setdefault(id(optimizer), Counter()).update(counted(chosen))

    def before_step(self, optimizer: Optimizer, chosen: str | Sequence[str]) -> set[str]:
        """Correct the gradients in ``optimizer``, before they are clipped; every rank must call it.

        Args:
            optimizer: which will step.
            chosen: what the present batch chooses, in case its backward pass went past Lightning.

        Returns:
            The adapters that samples of any rank used since the last step.
        """
        self.has_stepped = True
        counts = self._over_ranks(self.counts.pop(id(optimizer), counted(chosen)), optimizer)
        used = {name for name in self.names if counts[name]}
        if len(used) == len(self.names) and not self.balance:
            return used
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            name = self.name_of.get(id(parameter))
            if name is None or parameter.grad is None:
                continue
            if not counts[name]:
                parameter.grad = None
            elif self.balance:
                local_shard(parameter.grad).mul_(counts[ALL] / counts[name])
        return used

    def _over_ranks(self, counts: Counter[str], optimizer: Optimizer) -> Counter[str]:
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return counts
        keys = [ALL, *self.names]
        device = next((local_shard(p).device for group in optimizer.param_groups for p in group["params"]), "cpu")
        total: Tensor = torch.tensor([counts[key] for key in keys], device=device)
        distributed.all_reduce(total)
        return Counter(dict(zip(keys, total.tolist(), strict=True)))


def counted(chosen: str | Sequence[str]) -> Counter[str]:
    """How many samples use each adapter; one adapter for the whole batch counts as one sample.

    Example:
        >>> sorted(counted(["fr", "de", "fr"]).items())
        [('', 3), ('de', 1), ('fr', 2)]
    """
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    return Counter({ALL: len(names), **Counter(names)})
