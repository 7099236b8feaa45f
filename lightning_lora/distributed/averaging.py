"""Trained parameters that every rank has whole, while the frozen ones are sharded: their gradients averaged by us.

Adapters are megabytes, only the backbone is worth sharding: hundreds of tiny sharded parameters cost a step more than
the whole backbone does. So one flat bucket holds all of their gradients, and is averaged once for each backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from lightning_lora.torch_internals import backward_id, call_after_backward


class GradientAveraging:
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
        if parameters:
            self._make_bucket()
        self.handles = [p.register_post_accumulate_grad_hook(self.queue) for p in self.parameters]  # type: ignore[no-untyped-call]

    def _make_bucket(self) -> None:
        """All gradients in a row, and for each parameter whether it has one here."""
        wide = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        sizes = [*(parameter.numel() for parameter in self.parameters), len(self.parameters)]
        dtype, device = torch.float64 if wide else torch.float32, self.parameters[0].device
        self.bucket = torch.zeros(sum(sizes), dtype=dtype, device=device)
        *views, self.present = self.bucket.split(sizes)  # type: ignore[no-untyped-call]
        self.views = [view.view(p.shape) for view, p in zip(views, self.parameters, strict=True)]

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
        backward = backward_id()  # a flag would stay set after a backward that failed
        if backward != self.queued_in and not self.paused:
            self.queued_in = backward
            call_after_backward(self.average)

    @torch.no_grad()
    def average(self) -> None:
        """Average now; every rank must call it."""
        if not self.parameters:
            return
        absent = [index for index, parameter in enumerate(self.parameters) if parameter.grad is None]
        self._fill(absent)
        distributed.all_reduce(self.bucket)
        self.bucket /= distributed.get_world_size()
        elsewhere = self.present.tolist() if absent else []  # which waits for the device
        for index in absent:
            if elsewhere[index] > 0:
                self.parameters[index].grad = torch.empty_like(self.parameters[index])
        self._copy(back=True)

    def _fill(self, absent: list[int]) -> None:
        self.present.fill_(1)
        if absent:
            self.present[absent] = 0
            torch._foreach_zero_([self.views[index] for index in absent])
        self._copy(back=False)

    def _copy(self, back: bool) -> None:
        """All gradients into the bucket or out of it, by few kernels and calls: a step may wait for those."""
        pairs = [(v, p.grad) for v, p in zip(self.views, self.parameters, strict=True) if p.grad is not None]
        if pairs:
            views, gradients = map(list, zip(*pairs, strict=True))
            torch._foreach_copy_(*((gradients, views) if back else (views, gradients)))
