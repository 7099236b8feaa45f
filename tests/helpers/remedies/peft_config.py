"""Remedies of messages about `adapter_config.json`: other methods than plain LoRA, and what peft does with them."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
)
from tests.helpers.models import net
from tests.helpers.remedies.case import Expected, outputs, remedy, warnings_ignored
from tests.helpers.remedies.models import CONFIG
from tests.helpers.remedies.peft_files import by_peft, loaded, model_with, reconfigure, saved

CONFIG_FILE = "peft_format/config.py"
STORED = "peft_format/stored.py"


def merged_by_peft(message: Expected, folder: Path, **changes: object) -> None:
    """What is refused is merged with peft, and is the base of a run then."""
    model = by_peft(folder, **changes)
    with message:
        loaded(folder)
    expected = outputs(model)
    merged = peft.PeftModel.from_pretrained(net(), str(folder)).merge_and_unload()
    torch.testing.assert_close(outputs(merged), expected)
    apply_lora(merged, CONFIG)
    torch.testing.assert_close(outputs(merged), expected)


@remedy(
    CONFIG_FILE, "DoRA scales the merged weight", "`use_dora`", "merge it with peft and load that model as the base"
)
def dora_that_peft_merged(message: Expected, folder: Path) -> None:
    merged_by_peft(message, folder, use_dora=True)


@remedy(CONFIG_FILE, "B has a bias there", "`lora_bias`", "merge it with peft and load that model as the base")
def a_bias_that_peft_merged(message: Expected, folder: Path) -> None:
    merged_by_peft(message, folder, lora_bias=True)


@remedy(CONFIG_FILE, "it holds single rows of an embedding", "`trainable_token_indices`", "merge it with peft first")
def rows_that_peft_merged(message: Expected, folder: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.q = nn.Embedding(5, 16), nn.Linear(16, 16)

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.q(self.embedding(index))

    base = Words()
    config = peft.LoraConfig(r=2, target_modules=["q"], trainable_token_indices={"embedding": [1, 2]})
    with warnings_ignored():  # it is no model of transformers
        peft.get_peft_model(model_with(Words(), base.state_dict()), config).save_pretrained(str(folder))
    with message:
        loaded(folder, model_with(Words(), base.state_dict()))
    merged = peft.PeftModel.from_pretrained(model_with(Words(), base.state_dict()), str(folder)).merge_and_unload()
    apply_lora(merged, LoRAConfig(r=2, targets=["q"]))
    torch.testing.assert_close(merged(torch.arange(5)), base(torch.arange(5)))


@remedy(CONFIG_FILE, "`adapter_config.json` has {}: {}, which may", "`new_key`: `x`", "take it out of the file")
def an_unknown_key_that_is_taken_out(message: Expected, folder: Path) -> None:
    model = by_peft(folder)
    reconfigure(folder, new_key="x")
    with message:
        loaded(folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    del content["new_key"]
    (folder / "adapter_config.json").write_text(json.dumps(content))
    torch.testing.assert_close(outputs(loaded(folder)), outputs(model))


@remedy(
    CONFIG_FILE, "`adapter_config.json` has `init_lora_weights`", "`pissa`", "path_initial_model_for_weight_conversion"
)
def a_changed_base_that_peft_converts(message: Expected, folder: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q"], init_lora_weights="pissa")
    model = peft.get_peft_model(net(), config)
    model.peft_config["default"].init_lora_weights = True  # as peft's own guide has it
    model.save_pretrained(str(folder / "initial"))
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1.5)
    model.save_pretrained(str(folder / "trained"))
    with message:
        loaded(folder / "trained")
    with warnings_ignored():  # of more than one adapter, which peft has for the time of the conversion
        initial = str(folder / "initial")
        model.save_pretrained(str(folder / "converted"), path_initial_model_for_weight_conversion=initial)
    torch.testing.assert_close(outputs(loaded(folder / "converted")), outputs(model), rtol=1e-4, atol=1e-5)


@remedy(
    STORED, "`{}` holds `{}`, a pickle", "adapter_model.bin`", "PeftModel.from_pretrained(base, directory).save_pretra"
)
def a_pickle_that_peft_saved_again(message: Expected, folder: Path) -> None:
    model = by_peft(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with message:
        loaded(folder)
    peft.PeftModel.from_pretrained(net(), str(folder)).save_pretrained(str(folder))
    torch.testing.assert_close(outputs(loaded(folder)), outputs(model))


@remedy(STORED, "`{}` does not exist: give a PEFT directory", "nothing`")
def a_directory_that_is_there(message: Expected, folder: Path) -> None:
    from lightning_lora.peft_format.stored import open_adapter

    with message:
        open_adapter(folder / "nothing")
    open_adapter(saved(folder / "adapter"))


@remedy(STORED, "`{}` has no {} in its folder", "adapter_config.json", "give the PEFT directory")
def a_file_alone_without_its_scale(message: Expected, folder: Path) -> None:
    from lightning_lora.cli.merge import merge_files

    save_file(net().state_dict(), folder / "base.safetensors")
    directory = saved(folder / "adapter")
    alone = folder / "alone.safetensors"
    alone.write_bytes((directory / "adapter_model.safetensors").read_bytes())
    with message:
        merge_files(folder / "base.safetensors", alone, folder / "out.safetensors")
    merge_files(folder / "base.safetensors", directory, folder / "out.safetensors")
