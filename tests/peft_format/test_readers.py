"""All that reads a PEFT directory gives one verdict on it: load_adapter, init_from, inspect, merge, diff, import."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, load_adapter, save_adapter
from lightning_lora.cli.diff import diff_files
from lightning_lora.cli.import_directory import import_directory
from lightning_lora.cli.inspect import inspect_files
from lightning_lora.cli.merge import merge_files
from tests.helpers.models import Lit, data, trainer
from tests.helpers.oracles import train_by_hand

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def net():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


class Module(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()


def load(directory, folder):
    load_adapter(net(), directory)


def init_from(directory, folder):
    callback = LoRACallback(r=2, alpha=6, targets=["0"], init_from=str(directory))
    trainer(callback, max_steps=1, max_epochs=1, limit_val_batches=0).fit(Module(), data())


def merge(directory, folder):
    save_file(net().state_dict(), folder / "base.safetensors")
    merge_files(folder / "base.safetensors", directory, folder / "merged.safetensors", overwrite=True)


def into_checkpoint(directory, folder):
    import_directory(directory, folder / "adapter.ckpt", overwrite=True)


READERS = {
    "load_adapter": load,
    "init_from": init_from,
    "inspect": lambda directory, folder: inspect_files(directory),
    "merge": merge,
    "diff": lambda directory, folder: diff_files(directory, directory),
    "import": into_checkpoint,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    model = net()
    apply_lora(model, LoRAConfig(r=2, alpha=6, targets=["0"]))
    train_by_hand(model)
    save_adapter(model, folder)
    return folder


def edited(original, folder, *, header=True, **changes):
    """A copy in which the configuration is another."""
    shutil.copytree(original, folder / "adapter")
    values = {**json.loads((original / CONFIG).read_text()), **changes}
    (folder / "adapter" / CONFIG).write_text(json.dumps(values))
    if not header:  # as peft writes it
        save_file(load_file(original / WEIGHTS), folder / "adapter" / WEIGHTS, {"format": "pt"})
    return folder / "adapter"


def verdict(read, directory, folder):
    """The error, or ``None``."""
    try:
        read(directory, folder)
    except ValueError as error:
        return str(error)
    return None


# What the two files say decides these.
BAD = {
    "unknown-method": ({"use_newlora": True}, "has `use_newlora`: `True`, which may mean another method"),
    "dora": ({"use_dora": True}, "has `use_dora`, which is not plain LoRA"),
    "other-start": ({"init_lora_weights": "mystery"}, "`init_lora_weights` in `adapter_config.json` must be one of"),
    "changed-base": ({"init_lora_weights": "pissa"}, "`init_lora_weights` `pissa`, which changed the base"),
    "float-rank": ({"r": 2.0}, "`r` in `adapter_config.json` must be a positive integer, but got `2.0`"),
    "bool-rank": ({"r": True}, "`r` in `adapter_config.json` must be a positive integer, but got `True`"),
    "other-rank": ({"r": 3}, "`0` has rank 2 in"),
    "other-targets": ({"target_modules": ["other"]}, "leave it out: the two files do not belong together"),
    "no-targets": ({"target_modules": None}, "`target_modules` in `adapter_config.json` must be module names"),
    "excluded": ({"exclude_modules": ["0"]}, "leave it out: the two files do not belong together"),
    "method-in-small": ({"peft_type": "lora"}, "`peft_type` in `adapter_config.json` must be 'LORA'"),
    "other-method": ({"peft_type": "IA3"}, "`peft_type` in `adapter_config.json` must be 'LORA'"),
    "bias": ({"bias": "sometimes"}, "`bias` in `adapter_config.json` must be one of"),
    "rslora": ({"use_rslora": None}, "`use_rslora` in `adapter_config.json` must be true or false"),
    "negative-alpha": ({"lora_alpha": -1}, "`lora_alpha` in `adapter_config.json` must be a positive number"),
    "pattern": ({"alpha_pattern": {"(": 1}}, "`alpha_pattern` in `adapter_config.json` must be a regular expression"),
    "turned": ({"fan_in_fan_out": "yes"}, "`fan_in_fan_out` in `adapter_config.json` must be true or false"),
}
GOOD = {
    "as-written": {},
    "large-alpha": {"lora_alpha": 1e10},
    "expression": {"target_modules": r"(0|other)"},
    "all-linear-but-one": {"target_modules": "all-linear", "exclude_modules": ["2"]},
    "pattern": {"r": 8, "rank_pattern": {"0": 2}, "alpha_pattern": {"^0": 3}},
    "rslora": {"use_rslora": True},
    "named-base": {"base_model_name_or_path": "some/model", "task_type": "CAUSAL_LM", "inference_mode": True},
}
# `init_from` reads a directory for adapters that are there, whose scale has to be the same; `import` needs our header.
WITHOUT_SCALE = [name for name in READERS if name not in ("init_from", "import")]


@pytest.mark.parametrize("case", BAD)
def test_every_reader_refuses(case, original, tmp_path):
    changes, words = BAD[case]
    directory = edited(original, tmp_path, header=False, **changes)
    for name, read in READERS.items():
        found = verdict(read, directory, tmp_path)
        assert found is not None and words in found, name


@pytest.mark.parametrize("case", GOOD)
def test_every_reader_accepts(case, original, tmp_path):
    directory = edited(original, tmp_path, header=False, **GOOD[case])
    for name in WITHOUT_SCALE:
        assert verdict(READERS[name], directory, tmp_path) is None, name


@pytest.mark.parametrize("name", READERS)
def test_what_was_written_is_accepted(name, original, tmp_path):
    directory = edited(original, tmp_path, base_model_name_or_path="renamed", task_type="CAUSAL_LM")
    assert verdict(READERS[name], directory, tmp_path) is None


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("changes", [{"lora_alpha": 24}, {"use_rslora": True}, {"target_modules": "all-linear"}])
def test_a_configuration_of_another_write_is_refused(name, changes, original, tmp_path):
    """An interrupted write leaves the configuration of one adapter and the weights of another."""
    directory = edited(original, tmp_path, **changes)
    (key,) = changes
    found = verdict(READERS[name], directory, tmp_path)
    assert found is not None and f"does not belong to the weights, `{key}` is" in found


def test_the_weights_name_the_configuration_that_they_were_written_with(original):
    with (original / WEIGHTS).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"]["lightning_lora.adapter_config"] == (original / CONFIG).read_text()


def test_equal_adapters_have_equal_bytes(original, tmp_path):
    model = net()
    load_adapter(model, original)
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name, metadata={"z": "1", "a": "2"})
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["load_adapter", "init_from", "inspect", "import"])
def test_no_pickle_is_read(name, original, tmp_path):
    directory = edited(original, tmp_path)
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")
    found = verdict(READERS[name], directory, tmp_path)
    assert found is not None and "a pickle, which can run any code" in found
