"""Real signals at random moments of ``merge_lora`` and ``unmerge_lora``: ``python real_signals.py``.

A process of its own takes them: Python drops an interrupt that comes in a callback of the garbage collector, and torch
leaves gradients off after one that comes in the exit of its ``no_grad``. Other tests would then fail.
"""

from __future__ import annotations

import random
import signal
import time

import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unmerge_lora
from tests.helpers import oracles
from tests.helpers.interrupts import state_of

VERBS = {"merge": (merge_lora, unmerge_lora), "unmerge": (unmerge_lora, merge_lora)}


def many_layers() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    apply_lora(model, LoRAConfig(r=4, targets="all"))
    oracles.train_by_hand(model, 0.3)
    return model


def main(name: str) -> None:
    """Send 60 signals, and compare the model after each with what it was before and after the whole verb."""
    verb, back = VERBS[name]
    model, draw = many_layers(), random.Random(0)
    merge_lora(model)
    unmerge_lora(model)
    if verb is unmerge_lora:
        merge_lora(model)
    before = state_of(model)
    start = time.perf_counter()
    verb(model)
    length, after = time.perf_counter() - start, state_of(model)
    back(model)
    interrupted = 0
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for _ in range(60):
        try:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.05, 1) * length)
            verb(model)
            time.sleep(length)  # so that the signal does not come later
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert state_of(model) in (before, after)
        if state_of(model) == after:
            back(model)
    assert interrupted > 10, interrupted


if __name__ == "__main__":
    for verb_name in VERBS:
        main(verb_name)
