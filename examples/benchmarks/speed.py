"""What an adapter costs: this package, peft, full fine-tuning and the bound, side by side in one run.

The bound is the same step with the backbone frozen and no adapter, and the gradient flowing through: nothing that
trains through the backbone can be faster. Models have random weights. A section needs peft and what it trains
(transformers, timm, or Lightning alone), no network and no weights.

    python examples/benchmarks/speed.py                                 # all of it; small shapes where there is no GPU
    python examples/benchmarks/speed.py --sections bert qwen            # some sections
    python examples/benchmarks/speed.py --sections bert --out speed     # appends them to speed_<date>.md
    python examples/benchmarks/speed.py --sections host merge           # what needs no GPU
    python examples/benchmarks/speed.py --compute activations weights   # a row for each side of the equation
    python examples/benchmarks/speed.py --tiny                          # to try the script

Each section is written as soon as it ends, with its bars and whether they are met; a call may be interrupted, and the
next one appends. The rows of a section are measured in turns, in windows of several steps that end in a
synchronization; a time is their median. Where the models do not fit into memory together, one row follows the other. A
peak of memory is what a row's own model and steps take. The host's time is what passes until a step returns: where it
is near the step's own time, the host is the limit and not the GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import platform
import sys
import time
import traceback
import warnings
from pathlib import Path

import merge_files
import torch
from speed_sections.rows import describe
from speed_sections.settings import COMPUTES, CUDA, Settings, compute_argument

SECTIONS = {  # name: module and function, imported when the section runs, as not every machine has all packages
    "bert": "language.bert",
    "qwen": "language.qwen_shapes",
    "checkpointing": "language.checkpointing",
    "resnet": "images.resnet",
    "vit": "images.vit",
    "vit-compiled": "images.vit_compiled",
    "dropout": "language.dropout",
    "ranks": "language.ranks",
    "seven_b": "language.seven_b",
    "embedding": "layers.embedding",
    "llama": "language.llama_eager",
    "llama-compiled": "language.llama_compiled",
    "mixed": "language.mixed",
    "layers": "layers.layers",
    "several": "several.several",
    "several-long": "several.several_long",
    "several-inference": "several.several_inference",
    "several-host": "several.several_host",
    "several-paths": "several_paths.several_paths",
    "small": "small.small",
    "fit": "fit.fixed_cost",
    "fit-7b": "fit.fixed_cost_7b",
    "injection": "before_and_after.injection",
    "inference": "before_and_after.inference",
    "host": "host.host",
    "merge": "merging.merge",
    "files": "merging.files",
}
PACKAGES = ("torch", "lightning", "transformers", "timm", "peft")


def versions(*others: str) -> str:
    hardware = torch.cuda.get_device_name() if CUDA else "no GPU"
    listed = []
    for package in (*PACKAGES, *others):
        try:
            listed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            listed.append(f"no {package}")
    threads = f"{torch.get_num_threads()} CPU threads"
    return f"{hardware}, {threads}, Python {platform.python_version()}, {', '.join(listed)}, {datetime.date.today()}"


def command(arguments: argparse.Namespace) -> str:
    """The call without paths, as a line of the result file."""
    words = ["python examples/benchmarks/speed.py --sections", *arguments.sections]
    words += ["--compute", *arguments.compute] if arguments.compute != ["auto"] else []
    words += [f"--{flag}" for flag in ("busy", "tiny") if getattr(arguments, flag)]
    return " ".join(words)


def lines_of(section: str, settings: Settings) -> list[str]:
    """What the section measured, or why it did not."""
    module, function = SECTIONS[section].split(".")
    try:
        measure = getattr(importlib.import_module(f"speed_sections.{module}"), function)
    except ModuleNotFoundError as error:
        return [f"## {section}", "", f"Not run: {error.name} is not installed."]
    try:
        return measure(settings)
    except Exception as error:  # the other sections are worth their time
        traceback.print_exc()
        return [f"## {section}", "", f"FAILED: {describe(error)}"]


def write(lines: list[str], out: Path | None) -> None:
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(text + "\n")


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="which; all of them")
    parser.add_argument("--compute", nargs="+", choices=COMPUTES, default=["auto"], help="a row of ours for each")
    parser.add_argument("--out", help="where to append the result, without the date and .md")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps, to try the script")
    parser.add_argument(
        "--busy", action="store_true", help="profile a step of each row; steps after a profile are slower"
    )
    parser.add_argument("--files-size", choices=merge_files.SIZES, default="7b", help='of the section "files"')
    arguments = parser.parse_args(words)
    try:
        for compute in arguments.compute:
            compute_argument(compute)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(words: list[str] | None = None) -> int:
    """Measure what the words of the command line ask for; 1 if a section failed."""
    arguments = parsed(sys.argv[1:] if words is None else words)
    settings = Settings(arguments.tiny, tuple(arguments.compute), arguments.busy, arguments.files_size)
    out = Path(f"{arguments.out}_{datetime.date.today()}.md") if arguments.out else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write([versions(), "", f"`{command(arguments)}`"], out)
        failed = False
        for section in arguments.sections:
            start = time.perf_counter()
            lines = lines_of(section, settings)
            failed |= any(line.startswith("FAILED") for line in lines)
            write([*lines, "", f"({section}: {time.perf_counter() - start:.0f} s)"], out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
