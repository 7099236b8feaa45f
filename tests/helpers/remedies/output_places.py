"""Remedies of messages about the place where a command writes."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.remedies.case import Expected, remedy
from tests.helpers.remedies.command_line import command, files

OUTPUT = "cli/output.py"


@remedy(OUTPUT, "`{}`, the folder of {}, is no directory", "missing`", "make it first")
def a_folder_that_is_there(message: Expected, folder: Path) -> None:
    base, adapter = files(folder)
    with message:
        command("merge", base, adapter, folder / "missing" / "out")
    (folder / "missing").mkdir()
    command("merge", base, adapter, folder / "missing" / "out")


@remedy(OUTPUT, "`{}` exists: choose another name", "out` exists", "give --overwrite")
def another_name_or_overwrite(message: Expected, folder: Path) -> None:
    base, adapter = files(folder)
    command("merge", base, adapter, folder / "out")
    with message:
        command("merge", base, adapter, folder / "out")
    command("merge", base, adapter, folder / "other")
    command("merge", base, adapter, folder / "out", "--overwrite")


@remedy(OUTPUT, "`{}` and the input `{}` must be apart", "base`", "choose another place to write to")
def another_place(message: Expected, folder: Path) -> None:
    base, adapter = files(folder)
    with message:
        command("merge", base, adapter, base, "--overwrite")
    command("merge", base, adapter, folder / "out")


@remedy(OUTPUT, "`{}` is no {}, so --overwrite does not replace it", "notes`", "choose another name")
def another_name_for_what_is_no_model(message: Expected, folder: Path) -> None:
    base, adapter = files(folder)
    (folder / "notes").mkdir()
    (folder / "notes" / "text").write_text("mine")
    with message:
        command("merge", base, adapter, folder / "notes", "--overwrite")
    command("merge", base, adapter, folder / "out", "--overwrite")


@remedy(OUTPUT, "`{}` holds `{}` too", "`mine`", "move it away, or choose another name")
def a_directory_that_holds_more(message: Expected, folder: Path) -> None:
    base, adapter = files(folder)
    command("merge", base, adapter, folder / "out")
    (folder / "out" / "mine").write_text("")
    with message:
        command("merge", base, adapter, folder / "out", "--overwrite")
    (folder / "out" / "mine").unlink()
    command("merge", base, adapter, folder / "out", "--overwrite")
