"""The example of a chat model, with a toy Llama, toy novels and a tokenizer of whole words."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

EXAMPLES = Path(__file__).parent.parent / "examples"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SENTENCES = [
    "It was a fine day for a walk in the park.",
    "She thought that it was a very fine walk with him.",
    "He had been in the park with her that day.",
]


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    return importlib.import_module("finetune_llm")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model and its tokenizer, as `from_pretrained` reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<unk>", "<user>", "<assistant>", "<end>"]
    words = sorted({word for sentence in SENTENCES for word in sentence.replace(".", " .").split()})
    words_alone = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, "<unk>"))
    words_alone.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    roles = {"additional_special_tokens": ["<user>", "<assistant>"]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words_alone, **names, **roles)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "eos_token_id": 4, "bos_token_id": None}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **ends, vocab_size=len(special) + len(words), initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def chats(example, folder) -> list[dict[str, list[int]]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [example.tokens(tokenizer, *pair) for pair in (SENTENCES[:2], SENTENCES[1:])]


def test_labels_are_the_answer_and_its_end(example, folder, chats):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for chat, reply in zip(chats, SENTENCES[1:], strict=True):
        counted = [token for token in chat["labels"] if token != -100]
        assert counted == [*tokenizer(reply)["input_ids"], tokenizer.eos_token_id]
        assert chat["input_ids"][-len(counted) :] == counted
        assert len(chat["labels"]) == len(chat["input_ids"]) == len(chat["attention_mask"])


def test_a_packed_batch_has_the_loss_of_each_chat_alone(example, folder, chats):
    module = example.ChatModel(str(folder))
    module.model.config.use_cache = True
    padding = transformers.DataCollatorForSeq2Seq(transformers.AutoTokenizer.from_pretrained(folder))
    alone = [module.training_step(padding([chat]), 0) for chat in chats]
    counts = [sum(label != -100 for label in chat["labels"]) for chat in chats]
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    packed = module.training_step(transformers.DataCollatorWithFlattening()(chats), 0)
    padded = module.training_step(padding(chats), 0)
    torch.testing.assert_close(packed, expected)
    torch.testing.assert_close(padded, expected)


def test_chats_are_neighbours_of_one_paragraph_of_fair_length(example):
    paragraphs = [" ".join(SENTENCES), "Mr. Elliot went home to his wife and his own house. Yes.", SENTENCES[0]]
    wrapped = "\n\n".join(paragraphs).replace(" park", "\npark")
    assert example.chats(wrapped) == [tuple(SENTENCES[:2]), tuple(SENTENCES[1:])]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_the_command(example, folder, tmp_path, monkeypatch, capsys, packing):
    novel = " ".join(SENTENCES * 6)
    monkeypatch.setattr(example, "austen_novels", lambda: [f"Persuasion\n\n{novel}", f"Emma\n\n{novel}"])
    monkeypatch.setattr(example, "smollm2", lambda: str(folder))
    monkeypatch.setattr(example, "QUESTIONS", SENTENCES[:1])
    out = tmp_path / "out"
    words = ["finetune_llm.py", "--steps", "30", "--out", str(out)] + ["--packing"] * packing
    monkeypatch.setattr("sys.argv", words)
    example.main()
    lines = capsys.readouterr().out.splitlines()
    before, after = (float(word) for word in lines[-1].split() if word[0].isdigit())
    assert after < before - 0.1
    first = lines.index(SENTENCES[0])
    answers = [line.split(": ", 1)[1] for line in lines[first + 1 : first + 5]]
    assert answers[1] == answers[2] == answers[3] != answers[0]
    by_peft = peft.AutoPeftModelForCausalLM.from_pretrained(out / "adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged")
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(by_peft(ids).logits, merged(ids).logits)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (base(ids).logits - merged(ids).logits).abs().max() > 0.01
    assert transformers.AutoTokenizer.from_pretrained(out / "merged").chat_template == TEMPLATE
