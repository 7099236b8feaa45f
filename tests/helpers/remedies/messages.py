"""Every sentence in the package's code that names a remedy, found by its syntax tree."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lightning_lora

PACKAGE = Path(lightning_lora.__file__).parent
VERBS = (
    "add build call change choose compare copy download fetch give keep leave let load make merge move name pass "
    "plan read remove rename resize resume save set take tie train untie use write"
)
# The verb comes where an instruction begins: at the start of a sentence, after a colon, in a second one after "or", or
# after an infinitive of purpose ("to start over call ...").
ADVICE = re.compile(
    rf"(?:^|[.:;,(?]\s+|\b(?:or|and|otherwise)\s+|(?:^|[.:;]\s)to\b[^.:;]*\s)(?:{'|'.join(VERBS.split())})\b(?!:)",
    re.IGNORECASE,
)
LEAST_WORDS = 4


@dataclass(frozen=True)
class Message:
    """A text with `{}` where a value stands, and the place it is written in."""

    file: str
    text: str
    line: int

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile("(?s:.*)".join(re.escape(part) for part in self.text.split("{}")))


def text_of(node: ast.expr) -> str:
    """A string as it is written, with `{}` for everything that is only known when it is used."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return "{}"


def strings(node: ast.AST) -> list[ast.expr]:
    """The outermost strings under `node`; docstrings are none."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return []
    if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp)) and text_of(node) != "{}":
        return [node]
    return [string for child in ast.iter_child_nodes(node) for string in strings(child)]


@cache
def texts() -> list[Message]:
    """All strings of at least some words, in the order of files and lines."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        written = ((text_of(node), node.lineno) for node in strings(ast.parse(path.read_text())))
        found += [Message(file, text, line) for text, line in written if len(text.split()) >= LEAST_WORDS]
    return found


@cache
def messages() -> list[Message]:
    """Those with an advice."""
    return [message for message in texts() if ADVICE.search(message.text)]


def message_that_begins(file: str, begin: str) -> Message:
    """The one message of ``file`` with these first words."""
    found = [message for message in texts() if message.file == file and message.text.startswith(begin)]
    assert len(found) == 1, f"{len(found)} messages begin with {begin!r} in {file}"
    return found[0]
