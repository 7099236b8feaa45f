"""The README's code runs, its table is what is shown, and its commands are the ones that are tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lightning_lora
from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.cli import main as command_line
from lightning_lora.model.summary import describe
from tests.helpers.models import Lit, data

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_code_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "YourLightningModule": Lit,
        "train_loader": data(),
        "val_loader": data(1),
        "test_loader": data(2),
        "example_input": data(3).dataset.tensors[0][:2],
    }
    assert len(blocks("python")) == 10
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["names"] == [f"net.layers.{block}.{name}" for block in (0, 1) for name in "qkvo"]
    assert torch.load("merged.pt").keys() == Lit().state_dict().keys()
    assert Lit.load_from_checkpoint("merged.ckpt").net is not None
    assert [type(layer) for layer in names["net"]] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]


def test_the_transcript_is_what_the_command_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks("python") if "base.safetensors" in block)
    code = "from safetensors.torch import save_file\n" + block[block.index("torch.manual_seed") :]
    exec(compile(code, "README.md", "exec"), {"torch": torch} | vars(lightning_lora))
    (transcript,) = blocks("console")
    for command in re.findall(r"^\$ lightning-lora (.*)$", transcript, re.MULTILINE):
        print(f"$ lightning-lora {command}")
        assert command_line.main(command.split()) == 0
    assert capsys.readouterr().out == transcript


def test_the_table_is_what_is_shown():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.BertConfig(num_labels=3)
        module = torch.nn.ModuleDict({"model": transformers.BertForSequenceClassification(config)})
    apply_lora(module, LoRAConfig(r=8, targets="qv"))
    assert blocks("text")[0].strip() == describe(module)


@pytest.mark.parametrize("command", re.findall(r"^pip install -c .*$", README, re.MULTILINE))
def test_the_set_up_is_two_commands_of_things_that_exist(command):
    extra = re.search(r"\[(\w+)\]", command)[1]
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "constraints.txt").exists()
    assert all((ROOT / file).exists() for file in re.findall(r"examples/\w+\.py", command))


def test_there_are_exactly_two():
    assert len(re.findall(r"^pip install -c .*$", README, re.MULTILINE)) == 2


def test_every_file_that_is_named_is_there():
    for name in re.findall(r"`((?:examples|lightning_lora)/[\w/.-]+)", README):
        assert (ROOT / name).exists(), name
