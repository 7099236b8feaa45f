"""The merge of a model on a CPU and of files, beside peft's in the same run."""

from __future__ import annotations

from collections.abc import Callable

import merge_files
from torch import nn

from lightning_lora import LoRAConfig, merge_lora
from speed_sections.adapters import adapted, adapted_by_peft
from speed_sections.bars import at_most
from speed_sections.comparison import heading, one_column
from speed_sections.settings import OURS, Settings
from speed_sections.timing import seconds, threads

LAYERS = 18
PEFT = "peft"


def merge(settings: Settings) -> list[str]:
    """Adapted linear layers in fp32 on the CPU; the best of three."""
    size = 32 if settings.tiny else 1024
    targets = [str(index) for index in range(LAYERS)]

    def base() -> nn.Module:
        return nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(LAYERS)))

    def ours(compute: str) -> float:
        model = adapted(base(), LoRAConfig(r=16, targets=targets), compute)
        return seconds(lambda: merge_lora(model))

    def by_peft() -> float:
        model = adapted_by_peft(base(), targets, 16)
        return seconds(model.merge_and_unload)

    actions = {PEFT: by_peft, **settings.ours(ours)}
    with threads(2):
        times = best_of_three(actions)
    title = f"Merge on a CPU, two threads, {LAYERS} layers of {size} x {size}, fp32, r = 16"
    lines = one_column(title, settings.tiny, "s", times)
    for name in settings.names():
        lines.append(at_most(f"{name}, time over that of peft's merge_and_unload", times[name] / times[PEFT], 6))
    return lines


def best_of_three(actions: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The least of the seconds that each action returns, in turns."""
    rounds = [{name: action() for name, action in actions.items()} for _ in range(3)]
    return {name: min(values[name] for values in rounds) for name in actions}


def files(settings: Settings) -> list[str]:
    """`lightning-lora merge` on two cores beside peft, each in a process of its own."""
    size = "tiny" if settings.tiny else settings.files_size
    comparison = merge_files.compare(size, cores=2)
    ours, peft = (comparison.ways[way] for way in merge_files.WAYS)
    lines = [*heading("Merge of files", size == "tiny"), *comparison.lines(), ""]
    lines.append(at_most(f"{OURS}, time over peft's", ours["seconds"] / peft["seconds"], 0.35))
    return [*lines, at_most(f"{OURS}, peak MiB", ours["mib"], 300)]
