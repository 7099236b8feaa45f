"""Every code block of the README runs by itself, its numbers are recorded, its links exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block_with(text: str) -> str:
    """The one python block that contains `text`."""
    (block,) = (block for block in blocks("python") if text in block)
    return block


def run(block: str) -> dict[str, Any]:
    """Run `block` as a file of its own, and return its names."""
    names = {"__name__": "__main__"}
    exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_block_has_a_test():
    assert len(blocks("python")) == 4


@pytest.mark.slow
def test_the_first_block():
    names = run(block_with('ckpt_path="best"'))
    assert type(names["model"].layer) is nn.Linear
    saved = torch.load(names["trainer"].checkpoint_callback.best_model_path)["state_dict"]
    assert sorted(saved) == ["layer.lora.default.A", "layer.lora.default.B"]


@pytest.mark.slow
def test_the_language_model(monkeypatch):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    given = []

    def tiny_llama(model_id: str) -> nn.Module:
        given.append(model_id)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=128)).eval()

    def letters(model_id: str) -> Any:
        given.append(model_id)
        return lambda text, return_tensors: transformers.BatchEncoding(
            {"input_ids": (ids := torch.tensor([list(text.encode())])), "attention_mask": torch.ones_like(ids)}
        )

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", tiny_llama)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", letters)
    names = run(block_with("AutoModelForCausalLM"))
    assert given == [names["model_id"]] * 2
    trained = peft.PeftModel.from_pretrained(tiny_llama(""), "squares")
    base, batch = tiny_llama(""), names["rows"][0]
    assert trained(**batch, labels=batch["input_ids"]).loss < base(**batch, labels=batch["input_ids"]).loss


class VisionTransformer(nn.Module):
    """A network with timm's names for its attention and its head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(VisionBlock(), VisionBlock())
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch_embed(images).flatten(2).transpose(1, 2)).mean(1))


class VisionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(16), VisionAttention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class VisionAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


def test_several_adapters():
    names = run(block_with("combine_adapters"))
    assert names["y"].shape == (3, 2)
    assert [type(module) for module in names["model"]] == [nn.Linear, nn.ReLU, nn.Linear], "merged"


@pytest.mark.slow
def test_the_files():
    names = run(block_with("load_from_checkpoint"))
    trained, reloaded = (names[name].layer.lora["default"] for name in ("loaded", "model"))
    assert torch.count_nonzero(trained.B) == trained.B.numel()
    assert torch.equal(trained.A, reloaded.A) and torch.equal(trained.B, reloaded.B)
    assert torch.equal(names["loaded"].layer.weight, names["model"].layer.weight)


@pytest.mark.parametrize("call", re.findall(r"^\| `(\w+Callback\(.*?\))`", README, re.MULTILINE))
def test_the_callbacks_of_the_table_take_these_arguments(call):
    name = call.partition("(")[0]
    assert type(eval(call, {name: getattr(lightning_lora, name)})).__name__ == name


def test_the_numbers_of_the_first_screen_are_recorded():
    text = README[README.index("A trained MLP") : README.index("![")]
    record = (ROOT / re.search(r"\((examples/.*?)\)", text)[1]).read_text()
    for number in re.findall(r"\d\d\.\d\d|\d+,\d+", text):
        assert number in record


def test_the_numbers_of_the_tables_are_recorded():
    records = " ".join(path.read_text() for path in (ROOT / "examples" / "benchmarks").glob("*.md"))
    tables = README[README.index("| strategy") : README.index("## Try it")]
    numbers = re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", tables)
    assert len(numbers) > 25
    for number in numbers:
        assert number in records, number


@pytest.mark.parametrize(
    ("study", "number", "recorded"),
    [
        ("rate_and_rank", "0.03", "0.03 for r=2"),
        ("rate_and_rank", "0.003", "0.003 for r=32 and r=128"),
        ("compare_methods", "0.85", "| +0.85 ± 0.36 |"),
        ("qlora_accuracy", "0.058", "After training NF4 is behind by +0.0583"),
        ("qlora_merge", "14", "14 % of what the training gained is lost"),
    ],
)
def test_what_it_says_of_a_study_is_in_its_record(study, number, recorded):
    path = f"examples/benchmarks/{study}_2026-11-29.md"
    [lines] = re.findall(rf"[^\n]*\n[^\n]*{path}[^\n]*", README)
    assert re.search(rf"(?<![\d.]){number}(?!\d)", lines)
    assert recorded in (ROOT / path).read_text()


@pytest.mark.parametrize("command", re.findall(r"^pip install -c .*$", README, re.MULTILINE))
def test_the_set_up_is_two_commands_of_things_that_exist(command):
    extra = re.search(r"\[(\w+)\]", command)[1]
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "constraints.txt").exists()
    assert all((ROOT / file).exists() for file in re.findall(r"examples/\w+\.py", command))


def test_there_are_exactly_two():
    assert len(re.findall(r"^pip install -c .*$", README, re.MULTILINE)) == 2


def test_it_has_at_most_200_lines():
    assert len(README.splitlines()) <= 200


def test_every_link_and_every_file_that_is_named_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    named = re.findall(r"`((?:examples|lightning_lora)/[\w/.-]+)", README)
    for name in [link for link in links if not link.startswith("https://")] + named:
        assert (ROOT / name).exists(), name
