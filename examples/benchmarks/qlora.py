"""What a base in four bits costs a LoRA step of a 7 B model: time and memory, compared with a bf16 base and with peft.

The base has the shapes of Llama-2-7B, random weights, and its linear layers but the head in NF4 with double
quantization. The bound is the same step of the frozen bf16 model without adapters, with the gradient flowing through.
Needs peft, transformers and bitsandbytes; a row of torchao's NF4 is added where torchao is installed.

    python examples/benchmarks/qlora.py                      # all of it; small shapes where there is no GPU
    python examples/benchmarks/qlora.py --targets qv         # r = 8 on q and v alone
    python examples/benchmarks/qlora.py --out qlora          # appends to qlora_<date>.md
    python examples/benchmarks/qlora.py --tiny               # to try the script

Rows follow each other, as the models do not fit into memory together; each model is made on the GPU, quantized there,
and measured with both sizes of a batch. The results of one choice of targets are written as soon as they are there.
Weights are what the model with its adapters takes before the first step, the peak of memory includes them.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from speed import versions, write
from speed_sections.adapters import adapted, adapted_by_peft, frozen_but
from speed_sections.bars import at_least, at_most
from speed_sections.comparison import against, table
from speed_sections.decoders import EVERY, QV, first_norm, llama, step_of
from speed_sections.four_bits import has_torchao, in_nf4, in_nf4_of_torchao
from speed_sections.rows import BOUND, PEFT_BF16, PEFT_FP32, Row, Rows, describe, measure
from speed_sections.settings import CUDA, OURS, Settings, Windows
from speed_sections.timing import clear
from torch import nn

from lightning_lora import LoRAConfig

NF4 = ", NF4"
OURS_NF4, PEFT_FP32_NF4, PEFT_BF16_NF4 = OURS + NF4, PEFT_FP32 + NF4, PEFT_BF16 + NF4
TORCHAO_NF4 = "peft, bf16 adapters, NF4 of torchao"
CASES = {"qv": (QV, 8, "r = 8 on q and v"), "all": (EVERY, 16, "r = 16 on all projections")}
LONG, SHORT = (4, 1024), (1, 512)
WINDOWS = {LONG: Windows(3, 3), SHORT: Windows(3, 5)}
SMALL = {LONG: (2, 32), SHORT: (1, 16)}
MOST_TIME, MOST_MEMORY = 1.08, 22.5

Make = Callable[[], nn.Module]


def models(targets: list[str], r: int, size: str) -> dict[str, Make]:
    """How the model of each row is made."""
    base, config = partial(llama, size), LoRAConfig(r=r, targets=targets)
    rows: dict[str, Make] = {
        BOUND: lambda: frozen_but(base(), first_norm),
        OURS: lambda: adapted(base(), config, "auto"),
        PEFT_BF16: lambda: adapted_by_peft(base(), targets, r),
        PEFT_FP32: lambda: adapted_by_peft(base(), targets, r, fp32=True),
        OURS_NF4: lambda: adapted(in_nf4(base()), config, "auto"),
        PEFT_FP32_NF4: lambda: adapted_by_peft(in_nf4(base()), targets, r, fp32=True),
        PEFT_BF16_NF4: lambda: adapted_by_peft(in_nf4(base()), targets, r),
    }
    if has_torchao():
        rows[TORCHAO_NF4] = lambda: adapted_by_peft(in_nf4_of_torchao(base()), targets, r)
    return rows


def gibibytes() -> float:
    return torch.cuda.memory_allocated() / 2**30 if CUDA else math.nan


def rows_of(makes: Mapping[str, Make], settings: Settings) -> dict[tuple[int, int], Rows]:
    """What was measured with each size of a batch: batch and length."""
    results: dict[tuple[int, int], Rows] = {LONG: {}, SHORT: {}}
    for name, make in makes.items():
        clear()
        before = gibibytes()
        try:
            model = make()
        except Exception as error:  # the other rows are worth their time
            for rows in results.values():
                rows[name] = Row(failure=describe(error))
            continue
        clear()
        weights = gibibytes() - before
        for size, rows in results.items():
            shape = SMALL[size] if settings.small else size
            windows = settings.windows(WINDOWS[size].rounds, WINDOWS[size].steps)
            rows[name] = measure({name: partial(step_of, shape, model)}, windows, settings)[name]
            rows[name].weights, rows[name].peak = weights, rows[name].peak + weights
            print(name, shape, rows[name], flush=True)  # a run may be interrupted before its tables
        del model
    return results


def bars(rows: Rows, size: tuple[int, int], targets: str) -> list[str]:
    """Against our own bf16 at the long batch on q and v, and against peft on bitsandbytes in every cell."""
    lines = []
    if size == LONG and targets == "qv":
        lines.append(at_most(f"{OURS_NF4}, time over that in bf16", 1 / against(rows, OURS, OURS_NF4), MOST_TIME))
        lines.append(at_most(f"{OURS_NF4}, peak GiB", rows[OURS_NF4].peak, MOST_MEMORY))
    for rival in (PEFT_FP32_NF4, PEFT_BF16_NF4):
        lines.append(at_least(f"{OURS_NF4}, speed over that of {rival}", against(rows, rival, OURS_NF4), 1.0))
        lines.append(at_most(f"{OURS_NF4}, peak GiB, as {rival}", rows[OURS_NF4].peak, rows[rival].peak))
    return lines


def section(targets: str, settings: Settings) -> list[str]:
    """The tables of one choice of targets, one for each size of a batch, with their bars."""
    names, r, words = CASES[targets]
    size, lines = "tiny" if settings.small else "7 B", []
    for shape, rows in rows_of(models(names, r, size), settings).items():
        batch, length = SMALL[shape] if settings.small else shape
        lines += [*table(f"Shapes of Llama-2, {size}, {batch} x {length} tokens, {words}", rows, settings)]
        lines += [*bars(rows, shape, targets), ""]
    return lines


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=CASES, default=list(CASES), help="which; both of them")
    parser.add_argument("--out", help="where to append the result, without the date and .md")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps, to try the script")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Measure what the words of the command line ask for; 1 if a section failed."""
    arguments = parsed(sys.argv[1:] if words is None else words)
    settings = Settings(arguments.tiny)
    out = Path(f"{arguments.out}_{datetime.date.today()}.md") if arguments.out else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        command = " ".join(["python examples/benchmarks/qlora.py --targets", *arguments.targets])
        write([versions("bitsandbytes", "torchao"), "", f"`{command}{' --tiny' if arguments.tiny else ''}`"], out)
        failed = False
        for targets in arguments.targets:
            start = time.perf_counter()
            try:
                lines = section(targets, settings)
            except Exception as error:  # the other section is worth its time
                lines, failed = [f"## {targets}", "", f"FAILED: {describe(error)}"], True
            write([*lines, f"({targets}: {time.perf_counter() - start:.0f} s)"], out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
