"""What is measured of each row of a section."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch._dynamo.utils import counters

from speed_sections.settings import CUDA, Settings, Windows
from speed_sections.timing import Step, busy_time, clear, host_time, in_turns, synchronize

BOUND, FULL = "bound", "full fine-tuning"
PEFT_BF16, PEFT_FP32 = "peft, bf16 adapters", "peft, fp32 adapters"
Start = Callable[[], Step]


@dataclass
class Row:
    """What was measured of one row; NaN is what was not.

    Args:
        ms: milliseconds of a step.
        peak: GiB that its model and its steps add.
        host: milliseconds until a step returns.
        busy: milliseconds in which kernels run.
        graphs: how many graphs the compiler made of it.
        weights: GiB that its model takes before the first step.
        failure: why there are no numbers.
    """

    ms: float = math.nan
    peak: float = math.nan
    host: float = math.nan
    busy: float = math.nan
    graphs: float = math.nan
    weights: float = math.nan
    failure: str = ""


Rows = dict[str, Row]


def measure(starts: Mapping[str, Start], windows: Windows, settings: Settings) -> Rows:
    """Every row in turns; one after the other where their models do not fit into memory together."""
    torch._dynamo.reset()
    try:
        return _together(starts, windows, settings)
    except torch.cuda.OutOfMemoryError:
        if len(starts) == 1:
            raise
    return {name: _alone(name, start, windows, settings) for name, start in starts.items()}


def _alone(name: str, start: Start, windows: Windows, settings: Settings) -> Row:
    try:
        return measure({name: start}, windows, settings)[name]
    except torch.cuda.OutOfMemoryError as error:
        return Row(failure=describe(error))


def _together(starts: Mapping[str, Start], windows: Windows, settings: Settings) -> Rows:
    steps: dict[str, Step] = {}
    rows: Rows = {}
    for name, start in starts.items():
        try:
            steps[name], rows[name] = _started(start)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # the other rows are worth their time
            rows[name] = Row(failure=describe(error))
    for name, ms in in_turns(steps, windows).items():
        rows[name].ms = ms
    if CUDA:
        for name, step in steps.items():
            rows[name].host = host_time(step)
    if CUDA and settings.busy:
        for name, step in steps.items():
            rows[name].busy = busy_time(step)
    return rows


def _started(start: Start) -> tuple[Step, Row]:
    """A warm step, with its graphs and its peak of memory above what the rows before hold."""
    clear()
    counters.clear()
    before = torch.cuda.memory_allocated() if CUDA else 0
    step = start()
    for _ in range(2):
        step()
    synchronize()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if CUDA else math.nan
    return step, Row(peak=peak, graphs=counters["stats"]["unique_graphs"] or math.nan)


def describe(error: Exception) -> str:
    """One short line of an error."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].replace("|", "/")
