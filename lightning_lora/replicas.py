"""Trained parameters that every rank has whole, while the frozen ones are sharded: their gradients averaged by us.

Adapters are megabytes, only the backbone is worth sharding: hundreds of tiny sharded parameters cost a step more than
the whole backbone does. So one flat bucket holds all of their gradients, and is averaged once for each backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn


class Replicas:
    """Averages the gradients of ``parameters`` over the ranks at the end of every backward, until it is closed.

    An average of averages is itself, so gradients may accumulate over several backwards, all or only the last of them
    averaged; reentrant checkpointing makes one of each of its segments. A parameter without a gradient on any rank
    keeps none. Every rank has to come to the end of the same backwards: where one of them may have no gradient for any
    of ``parameters``, :meth:`queue` is to be called as well.

    Args:
        parameters: the same on every rank, in the same order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.paused, self.queued_in = False, -1
        self.handles = [p.register_post_accumulate_grad_hook(self.queue) for p in self.parameters]  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def align(self) -> None:
        """Give every rank the values of the first, as DDP does: a new head may have been drawn apart on each."""
        for parameter in self.parameters:
            distributed.broadcast(parameter.data, 0)

    def close(self) -> None:
        """Leave the parameters as they were."""
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Average nothing while it lasts: a later backward before the step will."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def queue(self, gradient: Tensor) -> None:
        """At any gradient: average when this backward has ended, as FSDP ends its own."""
        backward = torch._C._current_graph_task_id()  # one that failed never came to its end
        if backward != self.queued_in and not self.paused:
            self.queued_in = backward
            torch.autograd.Variable._execution_engine.queue_callback(self.average)

    @torch.no_grad()
    def average(self) -> None:
        """Average now; every rank must call it."""
        if not self.parameters:
            return
        absent = [index for index, parameter in enumerate(self.parameters) if parameter.grad is None]
        bucket = self._bucket(absent)
        distributed.all_reduce(bucket)
        bucket /= distributed.get_world_size()
        *averages, present = bucket.split([*(p.numel() for p in self.parameters), len(self.parameters)])  # type: ignore[no-untyped-call]
        elsewhere = present.tolist() if absent else []  # which waits for the device
        for index in absent:
            if elsewhere[index] > 0:
                self.parameters[index].grad = torch.empty_like(self.parameters[index])
        pairs = [(p.grad, average.view_as(p)) for p, average in zip(self.parameters, averages, strict=True)]
        known = [(gradient, average) for gradient, average in pairs if gradient is not None]
        if known:
            torch._foreach_copy_([gradient for gradient, _ in known], [average for _, average in known])

    def _bucket(self, absent: list[int]) -> Tensor:
        """All gradients in a row, and for each parameter whether it has one here."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        dtype = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
        present = torch.ones(len(gradients), dtype=dtype, device=gradients[0].device)
        present[absent] = 0
        return torch.cat([*(gradient.reshape(-1).to(dtype) for gradient in gradients), present])
