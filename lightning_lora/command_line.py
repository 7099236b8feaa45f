"""The command ``lightning-lora``: tools on files of adapters and models, without a model in memory."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from lightning_lora import reports
from lightning_lora.architecture import Transformer
from lightning_lora.config import PRESETS
from lightning_lora.diff_files import diff_files
from lightning_lora.extract import extract
from lightning_lora.inspect_files import inspect_files
from lightning_lora.merge_files import merge_files
from lightning_lora.plan_files import plan_files
from lightning_lora.tensor_file import StoredTensor
from lightning_lora.weights_on_disk import open_weights

LONG = 2_000_000_000  # bytes that take long enough for a progress bar
SIZES = ("hidden", "layers", "vocab", "intermediate", "heads", "kv_heads", "head_size", "positions")
Found = tuple[str, dict[str, Any]]  # as text and as plain data


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 1 after an error, which is one line on stderr; 2 is wrong usage."""
    if arguments is None:  # as a command: what stops a job cleans up as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = make_parser()
    given = parser.parse_args(arguments)
    name = str(given.command)
    options = given[name]
    if name == "plan" and _is_unclear(options):
        parser.error("plan needs SOURCE, or the sizes --hidden, --layers and --vocab, and not both")
    try:
        text, data = COMMANDS[name](options)
        print(json.dumps(reports.plain(data), indent=2) if options.json else text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _failed(name, "interrupted; nothing was written", 130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return _failed(name, " ".join(str(error).split()) or type(error).__name__, 1)
    return 0


def _failed(name: str, why: str, status: int) -> int:
    print(reports.printable(f"lightning-lora {name}: {why}"), file=sys.stderr)
    return status


def make_parser() -> ArgumentParser:
    """The parser of the whole command."""
    parser = ArgumentParser(
        prog="lightning-lora",
        description="Tools for LoRA adapters and the models they belong to, in safetensors files. No model is loaded: "
        "tensors are read one after the other, so that memory does not grow with the model.",
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (add, words, description) in PARSERS.items():
        own = ArgumentParser(description=f"{words}. {description}")
        add(own)
        own.add_argument("--json", action="store_true", help="Print the result as JSON, for programs.")
        commands.add_subcommand(name, own, help=f"{words}.")
    return parser


def _add_inspect(parser: ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="PEFT directory, .safetensors file of one, or .ckpt of LoRACallback."
    )


def _add_merge(parser: ArgumentParser) -> None:
    parser.add_argument(
        "base", metavar="BASE", help="Model: a .safetensors file, or a directory with one or with shards."
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="PEFT directory.")
    parser.add_argument("out", metavar="OUT", help="Where to write: a file if BASE is one, else a directory.")
    _add_overwrite(parser)


def _add_diff(parser: ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="PEFT directory or model.")
    parser.add_argument("second", metavar="B", help="The same kind of thing.")
    parser.add_argument("--top", type=PositiveInt, default=40, help="How many rows to show; --json gives all.")


def _add_extract(parser: ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="Model before fine-tuning: a .safetensors file or a directory.")
    parser.add_argument("tuned", metavar="FINETUNED", help="The same model after it.")
    parser.add_argument("out", metavar="OUT", help="PEFT directory to write.")
    parser.add_argument("--r", type=PositiveInt, default=16, help="Rank of every pair.")
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="PATTERN",
        help="Module names, globs or re:EXPRESSION; without, every linear map.",
    )
    _add_overwrite(parser)


def _add_plan(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="config.json, .safetensors file, or a directory.")
    parser.add_argument("--r", type=PositiveInt, default=8, help="Rank.")
    parser.add_argument(
        "--targets", nargs="+", default=["attn"], metavar="TARGET", help=f"One of {', '.join(PRESETS)}, or patterns."
    )
    for size in SIZES:
        parser.add_argument(f"--{size}", type=PositiveInt | None, default=None, help=f"{WORDS[size]}.")
    parser.add_argument("--gated", action="store_true", help="The MLP has a gate, a third matrix, as Llama's has.")
    parser.add_argument("--tied", action="store_true", help="The output head is the embedding's matrix.")


def _add_overwrite(parser: ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="Replace what is at OUT, once the result is whole.")


WORDS = {
    "hidden": "Length of the vectors between blocks",
    "layers": "Number of blocks",
    "vocab": "Number of tokens",
    "intermediate": "Width of the MLP; without, four times --hidden",
    "heads": "Attention heads; matters only beside --kv_heads or --head_size",
    "kv_heads": "Heads of keys and values; without, as many as --heads",
    "head_size": "Length of a head's vectors; without, --hidden / --heads",
    "positions": "Learned positions; without, none (rotary ones)",
}


def _inspect(options: Namespace) -> Found:
    found = inspect_files(Path(options.path))
    return reports.inspection_text(found), reports.inspection_data(found)


def _merge(options: Namespace) -> Found:
    base = Path(options.base)
    with _progress(base) as progress:
        found = merge_files(base, Path(options.adapter), Path(options.out), options.overwrite, progress)
    return reports.merge_text(found, options.out), reports.merge_data(found)


def _diff(options: Namespace) -> Found:
    one, other = Path(options.first), Path(options.second)
    with _progress(one, other) as progress:
        found = diff_files(one, other, progress)
    return reports.difference_text(found, options.top), reports.difference_data(found)


def _extract(options: Namespace) -> Found:
    base, out = Path(options.base), Path(options.out)
    with _progress(base) as progress:
        found = extract(base, Path(options.tuned), out, options.r, options.targets, options.overwrite, progress)
    return reports.extraction_text(found, options.out), reports.extraction_data(found)


def _plan(options: Namespace) -> Found:
    targets = options.targets[0] if len(options.targets) == 1 and options.targets[0] in PRESETS else options.targets
    found = plan_files(_source(options), options.r, targets)
    return reports.costs_text(found), reports.costs_data(found)


def _source(options: Namespace) -> Path | Transformer:
    if options.source is not None:
        return Path(options.source)
    sizes = _sizes(options)
    biases = "none" if options.gated else "all"
    return Transformer(**sizes, gated=options.gated, tied=options.tied, biases=biases)


def _sizes(options: Namespace) -> dict[str, Any]:
    return {size: options[size] for size in SIZES if options[size] is not None}


def _is_unclear(options: Namespace) -> bool:
    if options.source is not None:
        return bool(_sizes(options)) or options.gated or options.tied
    return not {"hidden", "layers", "vocab"} <= _sizes(options).keys()


@contextmanager
def _progress(*paths: Path) -> Iterator[Callable[[int], object]]:
    """A bar on stderr where somebody watches, there is much to do, and tqdm is installed."""
    size = _size(paths) if sys.stderr.isatty() else 0
    try:
        from tqdm import tqdm
    except ImportError:
        size = 0
    if size < LONG:
        yield lambda _: None
        return
    with tqdm(total=size, unit="B", unit_scale=True) as bar:
        yield bar.update


def _size(paths: Sequence[Path]) -> int:
    def length(tensor: StoredTensor) -> int:
        return tensor.stop - tensor.start

    try:
        return sum(length(tensor) for path in paths for tensor in open_weights(path).tensors.values())
    except (ValueError, OSError):  # the command itself says what is wrong
        return 0


COMMANDS: dict[str, Callable[[Namespace], Found]] = {
    "inspect": _inspect,
    "merge": _merge,
    "diff": _diff,
    "extract": _extract,
    "plan": _plan,
}
PARSERS: dict[str, tuple[Callable[[ArgumentParser], None], str, str]] = {
    "inspect": (
        _add_inspect,
        "Show what an adapter's files hold",
        "Ranks, scales, sizes and the norm of each layer's update, what base it belongs to, and where it comes from.",
    ),
    "merge": (
        _add_merge,
        "Add an adapter to a model's weights",
        "OUT gets the same files as BASE, with W + scale * B A for W, summed in fp32 and rounded once. It appears when "
        "it is whole; how much of the update rounding lost is reported.",
    ),
    "diff": (
        _add_diff,
        "Compare two adapters, or two models",
        "Of adapters the updates are compared, not the matrices that they are made of. What differs most comes first.",
    ),
    "extract": (
        _add_extract,
        "Make an adapter of a full fine-tune",
        "The pair of rank r nearest to what fine-tuning did to each linear map, by truncated SVD, and how much of it "
        "that keeps. Biases, norms and embeddings stay the base's, and are listed.",
    ),
    "plan": (
        _add_plan,
        "Tell what LoRA costs on a model",
        "Trainable parameters, sizes of checkpoints and memory in training, from shapes alone: a transformers "
        "config.json, a safetensors file, or --hidden 4096 --layers 32 --vocab 32000.",
    ),
}
