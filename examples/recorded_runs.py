"""Many runs of one study: each result is appended to a file of JSON lines as it comes, and a cut study is continued.

The lines of several processes may stand in several files: each process takes its part of the runs (``--part 0/3``).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

Record = dict[str, Any]
PACKAGES = ("torch", "lightning", "transformers")


@dataclass(frozen=True)
class Storage:
    """Where results go, and which runs this process makes.

    Args:
        out: file of JSON lines to append to.
        done: files of earlier runs, which are not made again.
        part: index of this process and number of processes.
    """

    out: Path
    done: tuple[Path, ...] = ()
    part: tuple[int, int] = (0, 1)

    def mine(self, items: Sequence[Any]) -> list[Any]:
        """What this process does of ``items``."""
        index, parts = self.part
        return list(items[index::parts])

    def read(self) -> list[Record]:
        """The results of all files, in the order of the lines."""
        return read(path for path in (*self.done, self.out) if path.exists())


def read(paths: Iterable[Path]) -> list[Record]:
    """The results of several files; a last line that was cut off is left out."""
    records: list[Record] = []
    for path in paths:
        for line in path.read_text().split("\n")[:-1]:
            records.append(json.loads(line))
    return records


def run_missing(settings: Sequence[Any], run: Callable[[Any], Record], storage: Storage) -> None:
    """Make the runs that no file holds, and append each result.

    A run that fails is reported, and the next one starts: one method that does not work must not cost the study.

    Args:
        settings: a dataclass for each run of this process.
        run: returns the result of a setting.
        storage: where results go.

    Raises:
        RuntimeError: at the end, if a run failed.
    """
    made = storage.read()
    missing = [setting for setting in settings if not any(_is_of(setting, record) for record in made)]
    failed = 0
    for number, setting in enumerate(missing, 1):
        start = time.perf_counter()
        try:
            result = run(setting)
        except Exception:
            failed += 1
            print(f"{setting} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            continue
        seconds = time.perf_counter() - start
        record = {**asdict(setting), **result, "seconds": round(seconds, 2), "machine": machine()}
        with storage.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{number} of {len(missing)}, {seconds:.1f} s: {setting}", flush=True)
    if failed:
        raise RuntimeError(f"{failed} of {len(missing)} runs failed; their errors are above.")


def of_settings(settings: Sequence[Any], records: Sequence[Record]) -> list[Record]:
    """The results of these settings, in their order; settings without a result are left out."""
    return [record for setting in settings for record in records if _is_of(setting, record)]


def _is_of(setting: Any, record: Record) -> bool:
    return all(record.get(name) == value for name, value in asdict(setting).items())


def machine() -> str:
    """The hardware and the versions."""
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"CPU ({platform.machine()}), threads of torch: {torch.get_num_threads()}"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([hardware, f"Python {platform.python_version()}", *versions])


def machines(records: Sequence[Record]) -> str:
    """The different machines of the results."""
    return "; ".join(dict.fromkeys(record["machine"] for record in records))


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """The options that every study has."""
    parser.add_argument("--full", action="store_true", help="all runs, for a GPU; default: a few minutes on a CPU")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="write the data to DIR, and stop")
    parser.add_argument("--data", type=Path, metavar="DIR", help="take the data from DIR: no network is needed")
    parser.add_argument("--out", type=Path, default=Path(f"{name}.jsonl"), help="results, one JSON object a line")
    parser.add_argument("--done", type=Path, nargs="*", default=[], metavar="FILE", help="results of earlier runs")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="make every Nth run, from the Ith on")
    parser.add_argument("--report", type=Path, metavar="FILE", help="make no runs: write FILE from the results")


def quiet_transformers() -> None:
    """Show no bars and no notes of transformers between the lines of a study."""
    set_verbosity_error()
    disable_progress_bar()


def quiet_lightning() -> None:
    """Show no notes of Lightning and no warnings about data loading, for a study whose runs are a Trainer's."""
    warnings.filterwarnings("ignore", message=".*many workers.*|.*treespec.*|.*in eval mode.*|.*no `val_dataloader`.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def show(text: str, records: Sequence[Record], report: Path | None) -> None:
    """Print the result of a study, and write it into the file ``report`` with the machines of ``records``."""
    print(text)
    if report is not None:
        report.write_text(f"{machines(records)}\n\n{text}\n")


def storage_of(options: argparse.Namespace) -> Storage:
    """The storage that the options ask for."""
    index, parts = (int(number) for number in options.part.split("/"))
    return Storage(options.out, tuple(options.done), (index, parts))
