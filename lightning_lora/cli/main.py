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

from jsonargparse import Namespace

from lightning_lora.cli import reports
from lightning_lora.cli.convert import export_checkpoint, import_directory
from lightning_lora.cli.diff import diff_files
from lightning_lora.cli.extract import extract
from lightning_lora.cli.inspect import inspect_files
from lightning_lora.cli.merge import merge_files
from lightning_lora.cli.options import SIZES, make_parser
from lightning_lora.cli.plan import plan_files
from lightning_lora.cli.shapes import Transformer
from lightning_lora.config import PRESETS
from lightning_lora.files.weights import open_weights

LONG = 2_000_000_000  # bytes that take long enough for a progress bar
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
        print(json.dumps(reports.plain(data), indent=2, default=str) if options.json else text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _failed(name, "interrupted; nothing was written", 130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return _failed(name, " ".join(str(error).split()) or type(error).__name__, 1)
    except Exception as error:  # files come from strangers
        return _failed(name, f"the files are not what they should be ({type(error).__name__}: {error!s:.200})", 1)
    return 0


def _failed(name: str, why: str, status: int) -> int:
    print(reports.printable(f"lightning-lora {name}: {why}"), file=sys.stderr)
    return status


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


def _export(options: Namespace) -> Found:
    found = export_checkpoint(Path(options.checkpoint), Path(options.directory), options.inner, options.overwrite)
    return reports.exported_text(found), reports.exported_data(found)


def _import(options: Namespace) -> Found:
    found = import_directory(Path(options.directory), Path(options.checkpoint), options.inner, options.overwrite)
    return reports.exported_text(found), reports.exported_data(found)


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
    try:
        return sum(tensor.nbytes for path in paths for tensor in open_weights(path).tensors.values())
    except (ValueError, OSError):  # the command itself says what is wrong
        return 0


COMMANDS: dict[str, Callable[[Namespace], Found]] = {
    "inspect": _inspect,
    "merge": _merge,
    "diff": _diff,
    "extract": _extract,
    "plan": _plan,
    "export": _export,
    "import": _import,
}
