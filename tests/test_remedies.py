"""Every message that names a remedy: the remedy is tried, here by the tables of the helpers or in another test."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

from tests.helpers import remedies
from tests.helpers.remedies.case import cases_in
from tests.helpers.remedies.elsewhere import NOT_TRIED, TRIED
from tests.helpers.remedies.messages import messages

TABLES = [import_module(f"{remedies.__name__}.{table.name}") for table in iter_modules(remedies.__path__)]
CASES = [case for table in TABLES for case in cases_in(table)]
KEYS = [*((case.file, case.begin) for case in CASES), *TRIED, *NOT_TRIED]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.act.__name__)
def test_the_message_comes_and_its_remedy_works(case, tmp_path):
    case.run(tmp_path)


def test_every_message_with_an_advice_has_a_case_or_a_reason():
    missing = [
        f"{message.file}:{message.line} {message.text!r}"
        for message in messages()
        if not any(message.file == file and message.text.startswith(begin) for file, begin in KEYS)
    ]
    assert not missing, "write a case in tests/helpers/remedies for " + "\n".join(missing)


@pytest.mark.parametrize("key", [*TRIED, *NOT_TRIED], ids=": ".join)
def test_what_needs_no_case_is_a_message_without_one(key):
    file, begin = key
    assert any(message.file == file and message.text.startswith(begin) for message in messages())
    assert key not in [(case.file, case.begin) for case in CASES]


@pytest.mark.parametrize(("file", "name"), TRIED.values(), ids=lambda value: str(value))
def test_the_test_that_tries_it_exists(file, name):
    tree = ast.parse((Path(__file__).parent / file).read_text())
    assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
