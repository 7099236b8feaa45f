"""Average the gradients of trained parameters that are replicated while the frozen parameters are sharded.

Adapters take megabytes: only the backbone is worth sharding, and hundreds of tiny sharded parameters slow a step more
than the backbone does. All gradients share one flat bucket, which is averaged once per backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from lightning_lora.torch_internals import backward_id, call_after_backward


class GradientAveraging:
    """Averages the gradients of ``parameters`` over all ranks after every backward pass, until it is closed.

    Averaging twice changes nothing, so gradients may accumulate over several passes, whether all or only the last of
    them are averaged; reentrant checkpointing runs one pass per segment. A parameter that has no gradient on any rank
    keeps ``None``. Every rank must finish the same passes: if a rank may have no gradient for any of ``parameters``,
    call :meth:`queue` there too.

    Args:
        parameters: the same parameters in the same order on every rank.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.paused, self.queued_in = False, -1
        if parameters:
            self._make_bucket()
        self.handles = [p.register_post_accumulate_grad_hook(self.queue) for p in self.parameters]  # type: ignore[no-untyped-call]

    def _make_bucket(self) -> None:
        """Allocate a flat tensor for all gradients, and a flag per parameter: whether this rank has its gradient."""
        has_fp64 = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        sizes = [*(parameter.numel() for parameter in self.parameters), len(self.parameters)]
        dtype, device = torch.float64 if has_fp64 else torch.float32, self.parameters[0].device
        self.bucket = torch.zeros(sum(sizes), dtype=dtype, device=device)
        *views, self.present = self.bucket.split(sizes)  # type: ignore[no-untyped-call]
        self.views = [view.view(p.shape) for view, p in zip(views, self.parameters, strict=True)]

    @torch.no_grad()
    def align(self) -> None:
        """Broadcast the values of rank 0, as DDP does: a new head may have other random values on each rank."""
        for parameter in self.parameters:
            distributed.broadcast(parameter.data, 0)

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager that skips averaging; a later backward pass before the step does it."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def queue(self, gradient: Tensor) -> None:
        """Called for each new gradient: average once, when this backward pass has ended."""
        backward = backward_id()  # a flag would stay set after a backward that failed
        if backward != self.queued_in and not self.paused:
            self.queued_in = backward
            call_after_backward(self.average)

    @torch.no_grad()
    def average(self) -> None:
        """Average now; every rank must call this."""
        if not self.parameters:
            return
        absent = [index for index, parameter in enumerate(self.parameters) if parameter.grad is None]
        self._fill(absent)
        distributed.all_reduce(self.bucket)
        self.bucket /= distributed.get_world_size()
        counts = self.present.tolist() if absent else []  # this waits for the device
        for index in absent:
            if counts[index] > 0:
                self.parameters[index].grad = torch.empty_like(self.parameters[index])
        self._copy(from_bucket=True)

    def _fill(self, absent: list[int]) -> None:
        self.present.fill_(1)
        if absent:
            self.present[absent] = 0
            torch._foreach_zero_([self.views[index] for index in absent])
        self._copy(from_bucket=False)

    def _copy(self, from_bucket: bool) -> None:
        """Copy all gradients into the bucket or out of it, in few kernels: their number limits the speed of a step."""
        pairs = [(v, p.grad) for v, p in zip(self.views, self.parameters, strict=True) if p.grad is not None]
        if pairs:
            views, gradients = map(list, zip(*pairs, strict=True))
            torch._foreach_copy_(*((gradients, views) if from_bucket else (views, gradients)))
