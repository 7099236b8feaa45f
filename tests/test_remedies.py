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
from tests.helpers.selection import slow_except

TABLES = [import_module(f"{remedies.__name__}.{table.name}") for table in iter_modules(remedies.__path__)]
CASES = [case for table in TABLES for case in cases_in(table)]
# Cases of several runs, each as long as ten others.
SLOW = {
    "a_base_that_every_stage_sets",
    "a_base_that_is_loaded_in_configure_model",
    "a_base_that_is_no_adapter",
    "a_base_that_is_unmerged",
    "a_base_with_the_names_of_the_module",
    "a_checkpoint_by_what_reads_it",
    "a_copy_that_is_made_in_setup",
    "a_head_that_was_just_drawn",
    "a_layer_that_is_built_again",
    "a_lower_base_under_ddp",
    "a_module_with_memory",
    "adam_for_sparse_adam",
    "adapters_that_are_given",
    "adapters_that_are_there",
    "averages_of_a_model_that_is_built",
    "export_after_spawned_processes",
    "layers_that_a_hook_builds_again",
    "merge_best_with_a_metric",
    "merged_file_after_spawned_processes",
    "merged_files_of_weights_that_are_not_tied",
    "merged_files_or_a_lower_base",
    "the_base_of_a_loaded_file",
    "the_base_of_the_adapter",
    "the_base_of_the_file",
    "weights_that_are_loaded_in_time",
    "what_moves_trains_or_is_skipped",
    "what_the_module_exports",
    "what_the_module_imports",
}
# Messages of callbacks come in runs, of a tenth of a second or more.
FAST = [case for case in CASES if not case.file.startswith("trainer/") and case.act.__name__ not in SLOW]
KEYS = [*((case.file, case.begin) for case in CASES), *TRIED, *NOT_TRIED]


@pytest.mark.slow
@pytest.mark.parametrize("case", slow_except(FAST, CASES), ids=lambda case: case.act.__name__)
def test_the_message_comes_and_its_remedy_works(case, tmp_path):
    case.run(tmp_path)


def test_every_message_with_an_advice_has_a_case_or_a_reason():
    missing = [
        f"{message.file}:{message.line} {message.text!r}"
        for message in messages()
        if not any(message.file == file and message.text.startswith(begin) for file, begin in KEYS)
    ]
    assert not missing, "write a case in tests/helpers/remedies for " + "\n".join(missing)


def test_what_is_slow_is_a_case():
    assert {case.act.__name__ for case in CASES} >= SLOW


@pytest.mark.slow
def test_what_needs_no_case_is_a_message_without_one():
    with_case = {(case.file, case.begin) for case in CASES}
    for file, begin in [*TRIED, *NOT_TRIED]:
        assert any(message.file == file and message.text.startswith(begin) for message in messages()), (file, begin)
        assert (file, begin) not in with_case


@pytest.mark.parametrize(("file", "name"), TRIED.values(), ids=lambda value: str(value))
def test_the_test_that_tries_it_exists(file, name):
    tree = ast.parse((Path(__file__).parent / file).read_text())
    assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
