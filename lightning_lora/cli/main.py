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
from lightning_lora.cli.options import make_parser
from lightning_lora.config import PRESETS

ZIP = b"PK\x03\x04"  # how torch.save begins
LONG = 2_000_000_000  # bytes that take long enough for a progress bar
Result = tuple[str, dict[str, Any]]  # as text and as plain data


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 1 after an error, which is one line on stderr; 2 is wrong usage."""
    if arguments is None:  # as a command: what stops a job cleans up as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = make_parser()
    given = parser.parse_args(arguments)
    name = str(given.command)
    options = given[name]
    try:
        text, data = COMMANDS[name](options)
        print(json.dumps(reports.plain(data), indent=2, default=str) if options.json else text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _failed(name, "interrupted; nothing was written", 130)
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        return _failed(name, " ".join(str(error).split()) or type(error).__name__, 1)
    except Exception as error:  # files come from strangers
        return _failed(name, f"the files are not what they should be ({type(error).__name__}: {error!s:.200})", 1)
    return 0


def _failed(name: str, why: str, status: int) -> int:
    print(reports.printable(f"lightning-lora {name}: {why}"), file=sys.stderr)
    return status


def _safetensors(name: str) -> Path:
    """The path ``name``, for a command that reads safetensors files and no checkpoints."""
    path = Path(name)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == ZIP:
                raise ValueError(
                    f"`{path}` is a checkpoint of PyTorch or Lightning (a pickle in a zip archive), and this command "
                    "reads safetensors files. Of a run with LoRACallback `lightning-lora export CKPT DIR` makes a PEFT "
                    "directory, and `lightning-lora inspect CKPT` shows the checkpoint."
                )
    return path


# Each command imports what it needs: the others, and Lightning, stay out of its start.


def _inspect(options: Namespace) -> Result:
    from lightning_lora.cli.inspect import inspect_files

    inspection = inspect_files(Path(options.path))
    return reports.inspection_text(inspection), reports.inspection_data(inspection)


def _merge(options: Namespace) -> Result:
    from lightning_lora.cli.merge import merge_files

    base = _safetensors(options.base)
    with _progress(base) as progress:
        report = merge_files(base, _safetensors(options.adapter), Path(options.out), options.overwrite, progress)
    return reports.merge_text(report, options.out), reports.merge_data(report)


def _diff(options: Namespace) -> Result:
    from lightning_lora.cli.diff import diff_files

    first, second = _safetensors(options.first), _safetensors(options.second)
    with _progress(first, second) as progress:
        differences = diff_files(first, second, progress)
    return reports.difference_text(differences, options.top), reports.difference_data(differences)


def _extract(options: Namespace) -> Result:
    from lightning_lora.cli.extract import extract

    base, out = _safetensors(options.base), Path(options.out)
    with _progress(base) as progress:
        extraction = extract(
            base, _safetensors(options.tuned), out, options.r, options.targets, options.overwrite, progress
        )
    return reports.extraction_text(extraction, options.out), reports.extraction_data(extraction)


def _plan(options: Namespace) -> Result:
    from lightning_lora.cli.plan import plan_files

    targets = options.targets[0] if len(options.targets) == 1 and options.targets[0] in PRESETS else options.targets
    planned = plan_files(_safetensors(options.source), options.r, targets)
    return reports.costs_text(planned), reports.costs_data(planned)


def _export(options: Namespace) -> Result:
    from lightning_lora.cli.convert import export_checkpoint

    exported = export_checkpoint(Path(options.checkpoint), Path(options.directory), options.inner, options.overwrite)
    return reports.exported_text(exported), reports.exported_data(exported)


def _import(options: Namespace) -> Result:
    from lightning_lora.cli.convert import import_directory

    imported = import_directory(Path(options.directory), Path(options.checkpoint), options.inner, options.overwrite)
    return reports.exported_text(imported), reports.exported_data(imported)


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
    from lightning_lora.files.weights import open_weights

    try:
        return sum(tensor.nbytes for path in paths for tensor in open_weights(path).tensors.values())
    except (ValueError, OSError):  # the command itself reports what is wrong
        return 0


COMMANDS: dict[str, Callable[[Namespace], Result]] = {
    "inspect": _inspect,
    "merge": _merge,
    "diff": _diff,
    "extract": _extract,
    "plan": _plan,
    "export": _export,
    "import": _import,
}
