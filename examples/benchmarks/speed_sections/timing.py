"""Times of steps: windows in turns that end in a synchronization, host time, and the GPU's busy time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from speed_sections.settings import CUDA, Windows

Step = Callable[[], object]


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def clear() -> None:
    """Free what nothing refers to, on the GPU too."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def seconds(action: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def window(step: Step, count: int) -> float:
    """Milliseconds of each of ``count`` steps."""

    def steps() -> None:
        for _ in range(count):
            step()

    return seconds(steps) / count * 1000


def in_turns(
    steps: Mapping[str, Step], windows: Windows, summary: Callable[[list[float]], float] = statistics.median
) -> dict[str, float]:
    """Milliseconds of a step of each row. A machine that slows down for a while then slows every row."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(windows.rounds):
        for name, step in steps.items():
            times[name].append(window(step, windows.steps))
    return {name: summary(values) for name, values in times.items()}


def host_time(step: Step, repeats: int = 3) -> float:
    """Milliseconds until a step returns, with an idle GPU at its start; near the step's time, the host is the limit."""
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1000)
    synchronize()
    return statistics.median(times)


def busy_time(step: Step) -> float:
    """Milliseconds in which kernels of one step run; steps are slower after a profile, so it comes last."""
    from torch.profiler import ProfilerActivity, profile

    synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        synchronize()
    kernels = [row for row in profiler.key_averages() if row.device_type == torch.autograd.DeviceType.CUDA]
    return sum(row.self_device_time_total for row in kernels) / 1000


@contextmanager
def threads(count: int) -> Iterator[None]:
    """``count`` threads for torch's operators."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
