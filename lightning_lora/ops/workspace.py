"""Where large sums are computed: on which device, in which threads, and in which memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")
WITHOUT_FP64 = ("mps", "xla", "hpu")  # types of devices


class Buffers:
    """Memory by name, which grows to the largest size that is asked for.

    On a CPU the system clears fresh memory page by page, which takes longer than to compute what is written into it.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.device], Tensor] = {}
        self._tensors: dict[tuple[object, ...], Tensor] = {}

    def like(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of the shape and on the device of ``tensor``, with any values.

        It shares its memory with every tensor that had this name before.
        """
        key = (name, tensor.device, tensor.shape, dtype)
        if key not in self._tensors:
            size, memory = tensor.numel() * dtype.itemsize, self._memory.get(key[:2])
            if memory is None or memory.numel() < size:
                memory = self._memory[key[:2]] = torch.empty(size, dtype=torch.uint8, device=tensor.device)
                self._tensors = {other: kept for other, kept in self._tensors.items() if other[:2] != key[:2]}
            self._tensors[key] = memory[:size].view(dtype).view(tensor.shape)
        return self._tensors[key]

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """``tensor`` itself if it has this dtype, else a copy."""
        return tensor if tensor.dtype == dtype else self.like(name, tensor, dtype).copy_(tensor)


class Workspace:
    """A device, threads and buffers for large sums.

    torch starts and joins its threads in every operation, and they wait for each other in a loop. Many short operations
    spend most of their time there, all the more where other processes use the same cores. So within ``with workspace:``
    torch uses one thread, and blocks are computed in as many threads of our own as torch had.

    Args:
        device: where to compute; ``None`` for the device of each tensor.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.buffers = Buffers()
        self._threads, self._depth = torch.get_num_threads(), 0
        self._buffers_of_threads = [Buffers() for _ in range(self._threads)]
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
            self._depth = 0
            torch.set_num_threads(self._threads)

    def compute(self, function: Callable[[Workspace], Result]) -> Result:
        """The result of ``function`` in this workspace; if the device fails, on the tensors' own device.

        The device may have too little memory left, or an error of the user's code may have made it unusable.
        """
        if self.device is not None:
            try:
                return function(self)
            except RuntimeError:
                self.device, self.buffers = None, Buffers()
        return function(self)

    def map(
        self, function: Callable[[Item, Buffers], Result], items: Sequence[Item], device: torch.device
    ) -> list[Result]:
        """The results of ``function`` for each of ``items``, in their order; gradients are never recorded.

        Args:
            function: it gets an item and buffers that nobody else uses meanwhile.
            items: such as blocks of rows.
            device: of the tensors that ``function`` works on; only on a CPU it is called in several threads.
        """
        waiting: SimpleQueue[int] = SimpleQueue()
        for index in range(len(items)):
            waiting.put(index)
        results: dict[int, Result] = {}
        inference = torch.is_inference_mode_enabled()

        def work(buffers: Buffers) -> None:
            with torch.inference_mode(inference), torch.no_grad():
                while True:
                    try:
                        index = waiting.get_nowait()
                    except Empty:
                        return
                    results[index] = function(items[index], buffers)

        threads = min(self._threads, len(items)) if device.type == "cpu" else 1
        with self:
            if threads <= 1:
                work(self.buffers)
            else:
                # A new thread of Python takes the number of torch's threads when it is first asked for.
                self._pool = self._pool or ThreadPoolExecutor(self._threads, initializer=torch.get_num_threads)
                deque(self._pool.map(work, self._buffers_of_threads[:threads]), maxlen=0)  # raises the first error
        return [results[index] for index in range(len(items))]

    def bring(self, tensor: Tensor) -> Tensor:
        """``tensor`` where it can be computed with: on the device, and on a CPU if that has no fp64 of IEEE 754."""
        device = self.device or tensor.device
        return tensor.to("cpu" if device.type in WITHOUT_FP64 else device)
