"""Where large sums are computed: on which device, in which threads, and in which memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")
WITHOUT_FP64 = ("mps", "xla", "hpu")  # types of devices


class _Kept(threading.local):
    """The memory of one thread."""

    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}  # bytes, and the last tensor in them


class Workspace:
    """A device, threads and memory for large sums.

    torch starts and joins its threads in every operation, and they wait for each other in a loop. Many short operations
    spend most of their time there, all the more where other processes use the same cores. So within ``with workspace:``
    torch uses one thread, and blocks are computed in as many threads of our own as torch had.

    Args:
        device: where to compute; ``None`` for the device of each tensor.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._threads, self._depth = torch.get_num_threads(), 0
        self._kept = _Kept()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workspace:
        try:
            self._depth += 1
            torch.set_num_threads(1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth <= 0:
            torch.set_num_threads(self._threads)

    def compute(self, function: Callable[[Workspace], Result]) -> Result:
        """The result of ``function`` in this workspace; if the device fails, on the tensors' own device.

        The device may have too little memory left, or an error of the user's code may have made it unusable.
        """
        if self.device is not None:
            try:
                return function(self)
            except RuntimeError:
                self.device, self._kept = None, _Kept()
        return function(self)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
        """The results of ``function`` for each of ``items``, in their order; gradients are never recorded.

        Args:
            function: it gets one item.
            items: such as blocks of rows.
            device: of the tensors that ``function`` works on; only on a CPU it is called in several threads.
        """
        inference, numbers = torch.is_inference_mode_enabled(), iter(range(len(items)))
        results: dict[int, Result] = {}

        def work() -> None:
            with torch.inference_mode(inference), torch.no_grad():
                for number in numbers:  # of the items that no thread has taken yet
                    results[number] = function(items[number])

        with self:
            helpers: list[Future[None]] = []
            if device.type == "cpu" and min(self._threads, len(items)) > 1:
                # A new thread of Python takes the number of torch's threads when it is first asked for.
                self._pool = self._pool or ThreadPoolExecutor(self._threads - 1, initializer=torch.get_num_threads)
                helpers = [self._pool.submit(work) for _ in range(min(self._threads, len(items)) - 1)]
            try:
                work()  # this thread helps, too: waking another one takes long for small items
            finally:
                list(numbers)  # after an error no thread takes another item
                wait(helpers)
            for helper in helpers:
                helper.result()
        return [results[number] for number in range(len(items))]

    def bring(self, tensor: Tensor) -> Tensor:
        """``tensor`` where it can be computed with: on the device, and on a CPU if that has no fp64 of IEEE 754."""
        device = self.device or tensor.device
        return tensor.to("cpu" if device.type in WITHOUT_FP64 else device)

    def memory(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of the shape and on the device of ``like``, with any values.

        It shares its memory with every tensor that had this name in this thread before. On a CPU the system clears
        fresh memory page by page, which takes longer than to compute what is written into it.
        """
        key, memory = (name, like.device), self._kept.memory
        raw, tensor = memory.get(key, (None, None))
        if tensor is not None and tensor.shape == like.shape and tensor.dtype == dtype:
            return tensor
        size = like.numel() * dtype.itemsize
        if raw is None or raw.numel() < size:
            raw = torch.empty(size, dtype=torch.uint8, device=like.device)
        tensor = raw[:size].view(dtype).view(like.shape)
        memory[key] = raw, tensor
        return tensor

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """``tensor`` itself if it has this dtype, else a copy in the memory of ``name``."""
        return tensor if tensor.dtype == dtype else self.memory(name, tensor, dtype).copy_(tensor)
