"""Every public signature as text, one parameter a line: `python -m tests.helpers.signatures > tests/signatures.txt`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator

import lightning_lora
from lightning_lora.cli.options import make_parser


def signatures() -> str:
    """The public names in alphabetical order, then the sub-commands as `lightning-lora --help` lists them."""
    names = sorted(lightning_lora.__all__)
    blocks = [python_signature(name, getattr(lightning_lora, name)) for name in names]
    return "\n".join(blocks + [command_signature(*command) for command in commands()])


def python_signature(name: str, function: Callable) -> str:
    """For a class this is the signature of its `__init__`."""
    signature = inspect.signature(function)
    result = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    return block(f"{name}(", with_marks(signature), f"){result}")


def with_marks(signature: inspect.Signature) -> Iterator[str]:
    """The parameters, with `*` before the first that is given by name alone."""
    marked = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not marked:
            marked = True
            yield "*"
        marked = marked or parameter.kind is parameter.VAR_POSITIONAL
        bare = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        yield f"{bare}: {parameter.annotation}{default}"


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def command_signature(name: str, parser: argparse.ArgumentParser) -> str:
    options = (option(action) for action in parser._actions if action.dest != "help")
    return block(f"lightning-lora {name}", options, "")


def option(action: argparse.Action) -> str:
    """Its names, its default, and how many values it takes where that is not one."""
    names = ", ".join(action.option_strings) or action.metavar
    return f"{names} (default {action.default!r}{'' if action.nargs is None else f', nargs {action.nargs!r}'})"


def block(head: str, rows: Iterator[str], tail: str) -> str:
    return "\n".join([head, *(f"    {row}" for row in rows), tail]).rstrip() + "\n"


if __name__ == "__main__":
    print(signatures(), end="")
