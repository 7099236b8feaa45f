"""The public surface, and what importing the package may not do."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora.config import RunConfig
from tests.helpers.scripts import run_code
from tests.helpers.signatures import signatures

NAMES = [
    "LoRACallback",
    "LoRAConfig",
    "LoRAMonitor",
    "PrefixCallback",
    "PrefixConfig",
    "PromptCallback",
    "PromptConfig",
    "SubspaceCallback",
    "SubspaceConfig",
    "TuneCallback",
    "AdapterCallback",
    "BottleneckConfig",
    "FusionCallback",
    "FusionConfig",
    "TuneConfig",
    "adapt",
    "apply_lora",
    "combine_adapters",
    "disable_lora",
    "load_adapter",
    "load_from_checkpoint",
    "load_lora_state_dict",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "merged_state_dict",
    "plan",
    "plan_lora",
    "remove_adapted",
    "remove_lora",
    "save_adapter",
    "unmerge_lora",
    "use_segments",
    "use_adapters",
]
ROOT = Path(__file__).parent.parent


def test_all():
    assert sorted(lightning_lora.__all__) == sorted(NAMES)
    assert all(callable(getattr(lightning_lora, name)) for name in NAMES)


def test_every_public_signature_is_the_committed_one():
    file = ROOT / "tests" / "signatures.txt"
    changes = "\n".join(
        difflib.unified_diff(file.read_text().splitlines(), signatures().splitlines(), "committed", "now", lineterm="")
    )
    assert not changes, (
        f"Public signatures changed:\n{changes}\nIf that is meant, say so in CHANGELOG.md and run\n"
        "    python -m tests.helpers.signatures > tests/signatures.txt"
    )


def test_every_public_name_has_a_docstring_with_an_example():
    for name in NAMES:
        assert ">>>" in inspect.getdoc(getattr(lightning_lora, name)), name


def test_the_callback_takes_what_the_configuration_takes():
    callback = inspect.signature(lightning_lora.LoRACallback).parameters
    configs = (lightning_lora.LoRAConfig, RunConfig)
    taken = {field.name: field.default for config in configs for field in dataclasses.fields(config)}
    assert {name: p.default for name, p in callback.items()} == taken
    described = re.findall(r"^ {4}(\w+): ", inspect.getdoc(lightning_lora.LoRACallback).split("Args:")[1], re.MULTILINE)
    assert described[: len(callback)] == list(callback)


def test_the_version_is_the_changelog_s():
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert newest == declared == lightning_lora.__version__


@pytest.mark.slow
def test_import_patches_nothing_and_sets_nothing():
    script = """
import os, torch, lightning, lightning.pytorch, pytorch_lightning
from torch import nn
watched = [nn.Module, nn.Linear, nn.Embedding, nn.Conv2d, lightning.pytorch.LightningModule, lightning.pytorch.Trainer,
           lightning.pytorch.Callback, pytorch_lightning.Trainer, torch.optim.Optimizer]
def facts():
    return [dict(vars(cls)) for cls in watched], dict(os.environ), torch.get_rng_state().tolist()
before = facts()
import lightning_lora
assert facts() == before
assert not torch.cuda.is_initialized()
"""
    done = run_code(script)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_lightning_is_imported_when_it_is_asked_for():
    script = """
import sys
import lightning_lora
def imported():
    return {"lightning", "lightning_fabric", "lightning.pytorch", "pytorch_lightning"} & sys.modules.keys()
assert not imported(), imported()
assert set(lightning_lora.__all__) <= set(dir(lightning_lora))
lightning_lora.apply_lora(__import__("torch").nn.Linear(4, 2), lightning_lora.LoRAConfig(targets="all"))
assert not imported(), imported()
lightning_lora.LoRACallback
assert "lightning.pytorch" in sys.modules
assert "LoRACallback" in vars(lightning_lora), "the second access costs nothing"
"""
    done = run_code(script)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lightning_lora' has no attribute 'LoraCallback'"):
        lightning_lora.LoraCallback  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("first", ["lightning.pytorch", "pytorch_lightning"])
def test_where_lightning_is_there_the_callback_comes_at_once_and_the_logger_stays_as_the_user_set_it(first):
    script = f"""
import {first}
from lightning_utilities.core import rank_zero
before = rank_zero.log
assert before.name.startswith("{first}")
import lightning_lora
assert "LoRACallback" in vars(lightning_lora)
import lightning.pytorch, pytorch_lightning
assert rank_zero.log is before
assert issubclass(lightning_lora.LoRACallback, lightning.pytorch.Callback)
assert issubclass(lightning_lora.LoRACallback, pytorch_lightning.Callback)
"""
    done = run_code(script)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_entry_point_adapts_every_model_on_the_machine():
    groups = ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory")
    for group in groups:
        assert not [e for e in entry_points(group=group) if "lightning_lora" in e.value]
    assert "callbacks_factory" not in (ROOT / "pyproject.toml").read_text()


def test_the_package_is_typed():
    assert (Path(lightning_lora.__file__).parent / "py.typed").exists()
