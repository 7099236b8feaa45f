"""The command ``lightning-lora``: tools on files of adapters and models, without a model in memory."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import Namespace

from lightning_lora.cli import reports
from lightning_lora.cli.options import make_parser
from lightning_lora.config import PRESETS

ZIP = b"PK\x03\x04"  # how torch.save begins
PATIENCE = 1.0  # seconds after which a command that is not done shows a progress bar
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
        print(_as_json(name, data) if options.json else text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _failed(options, name, "interrupted; nothing was written", 130)
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        return _failed(options, name, " ".join(str(error).split()) or type(error).__name__, 1)
    except Exception as error:  # files come from strangers
        return _failed(
            options, name, f"the files are not what they should be ({type(error).__name__}: {error!s:.200})", 1
        )
    return 0


def _as_json(name: str, data: Mapping[str, Any]) -> str:
    return json.dumps(reports.plain({"command": name, **data}), indent=2, default=str)


def _failed(options: Namespace, name: str, why: str, status: int) -> int:
    if options.json:
        print(_as_json(name, {"error": why}), flush=True)
    print(reports.printable(f"lightning-lora {name}: {why}"), file=sys.stderr)
    return status


def _safetensors(name: str) -> Path:
    """The path ``name``, for an argument that is a model in safetensors files and no checkpoint."""
    path = Path(name)
    if _is_checkpoint(path):
        raise ValueError(
            f"`{path}` is a checkpoint of PyTorch or Lightning (a pickle in a zip archive), and a model is read from "
            "safetensors files. The adapters in one of LoRACallback are shown by `lightning-lora inspect CKPT`, merged "
            "by `lightning-lora merge BASE CKPT OUT`, and `lightning-lora export CKPT DIR` makes a PEFT directory."
        )
    return path


@contextmanager
def _adapter(name: str) -> Iterator[Path]:
    """The path ``name``, of adapters or a model; of a run's checkpoint a directory that is made for the time."""
    path = Path(name)
    if not _is_checkpoint(path):
        yield path
        return
    from lightning_lora.cli.convert import export_checkpoint

    with TemporaryDirectory() as folder:
        export_checkpoint(path, Path(folder, path.stem))
        yield Path(folder, path.stem)


@contextmanager
def _one_adapter(name: str) -> Iterator[Path]:
    """As :func:`_adapter`, of one adapter."""
    from lightning_lora.peft_format.directories import check_is_one, directories_in

    with _adapter(name) as path:
        several = directories_in(path) if path != Path(name) else {}
        if several:
            raise ValueError(
                f"`{name}` holds the adapters {', '.join(several)}, and this takes one at a time. Make a directory of "
                f"each by `lightning-lora export {name} DIR`, and give those."
            )
        check_is_one(path)
        yield path


def _is_checkpoint(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == ZIP


# Each command imports what it needs: the others, and Lightning, stay out of its start.


def _inspect(options: Namespace) -> Result:
    from lightning_lora.cli.inspect import inspect_files

    if options.plot is not None:
        return _plotted(options)
    inspection = inspect_files(Path(options.path))
    return reports.inspection_text(inspection), reports.inspection_data(inspection)


def _plotted(options: Namespace) -> Result:
    from lightning_lora.cli.inspect import inspect_files, read_deltas
    from lightning_lora.cli.inspect_plot import check_plot, write_plot

    path, out = Path(options.path), Path(options.plot)
    check_plot(out, options.overwrite)
    inspection = inspect_files(path)
    write_plot(inspection, read_deltas(path), out)
    text = f"{reports.inspection_text(inspection)}\ndrawn in {reports.printable(str(out))}"
    return text, {**reports.inspection_data(inspection), "plot": str(out)}


def _merge(options: Namespace) -> Result:
    from lightning_lora.cli.merge import merge_files

    base, names = _safetensors(options.base), options.adapters
    factors = options.weights or [1.0] * len(names)
    _check_weights(factors, names)
    with ExitStack() as stack:
        paths = [stack.enter_context(_one_adapter(name)) for name in names]
        adapters = dict(zip(paths, factors, strict=True))
        progress = stack.enter_context(_progress(base))
        report = merge_files(base, adapters, Path(options.out), options.overwrite, progress, options.dequantize)
    return reports.merge_text(report, options.out), reports.merge_data(report)


def _check_weights(factors: Sequence[float], adapters: Sequence[str]) -> None:
    if len(factors) != len(adapters):
        raise ValueError(
            f"`--weights` must give one number for each adapter, but got {len(factors)} for {len(adapters)}: "
            f"{', '.join(adapters)}."
        )
    if len({Path(adapter).resolve() for adapter in adapters}) < len(adapters):
        raise ValueError("ADAPTER names one adapter twice. Name it once, and give the sum of its weights.")
    for factor in factors:
        if not isfinite(factor):
            raise ValueError(f"`--weights` must be finite numbers, but got {factor}.")


def _diff(options: Namespace) -> Result:
    from lightning_lora.cli.diff import diff_files

    with _adapter(options.first) as first, _adapter(options.second) as second, _progress(first, second) as progress:
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

    exported = export_checkpoint(
        Path(options.checkpoint), Path(options.directory), options.inner, options.overwrite, options.name
    )
    return reports.exported_text(exported), reports.exported_data(exported)


def _import(options: Namespace) -> Result:
    from lightning_lora.cli.import_directory import import_directory

    imported = import_directory(Path(options.directory), Path(options.checkpoint), options.inner, options.overwrite)
    return reports.exported_text(imported), reports.exported_data(imported)


@contextmanager
def _progress(*paths: Path) -> Iterator[Callable[[int], object]]:
    """A bar on stderr where somebody watches, the command takes longer than a moment, and tqdm is installed."""
    watched = sys.stderr.isatty()
    try:
        from tqdm import tqdm
    except ImportError:
        watched = False
    if not watched:
        yield lambda _: None
        return
    with tqdm(total=_size(paths), unit="B", unit_scale=True, delay=PATIENCE) as bar:
        yield bar.update


def _size(paths: Sequence[Path]) -> int:
    from lightning_lora.cli.dequantized_base import open_dequantized

    try:
        weights = [open_dequantized(path) for path in paths]
        return sum(tensor.nbytes for each in weights for tensor in each.tensors.values())
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
