"""Adapters between Lightning and peft: train here and load there, train there and go on here.

    python examples/peft_both_ways.py

A small Llama that counts in ones (it is trained first, in seconds) learns to count in threes. It needs the extra
`examples`, and no network. What the one library gives the other is judged by the model's outputs.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRACallback

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = 32


def llama(weights: Path | None = None) -> LlamaForCausalLM:
    """The base: with the weights in a file, as from a hub."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=WORDS, use_cache=False))
    if weights is not None:
        model.load_state_dict(torch.load(weights))
    return model.eval()


def counting(step: int, count: int) -> DataLoader:
    """Rows of `first + k * step`, modulo the number of words."""
    rows = (torch.randint(0, WORDS, (count, 1)) + step * torch.arange(16)) % WORDS
    return DataLoader(TensorDataset(rows), batch_size=32)


class Language(LightningModule):
    """An ordinary module; nothing in it knows of LoRA."""

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.model = llama(weights)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", self.model(input_ids=batch[0], labels=batch[0]).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def trainer(*callbacks: LoRACallback, epochs: int = 1) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=False, **quiet)


def loss(module: Language, *callbacks: LoRACallback) -> float:
    return trainer(*callbacks).test(module, counting(3, 256), verbose=False)[0]["loss"]


def train_in_peft(model: PeftModel, data: DataLoader) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for (ids,) in data:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Of the logits of two models, at most."""
    (prompt,) = next(iter(counting(3, 8)))
    return float((one.eval()(input_ids=prompt).logits - other.eval()(input_ids=prompt).logits).abs().max())


def main(folder: Path) -> None:
    weights, by_lightning, by_peft = folder / "base.pt", str(folder / "by_lightning"), str(folder / "by_peft")
    torch.manual_seed(0)
    counter = Language()
    trainer(epochs=6).fit(counter, counting(1, 2048))
    torch.save(counter.model.state_dict(), weights)
    threes = counting(3, 2048)

    print("Train with Lightning, load in peft:")
    print(f"  loss of the base {loss(Language(weights)):.3f}")
    module = Language(weights)
    trainer(LoRACallback(r=8, targets="all", export=by_lightning), epochs=4).fit(module, threes)
    print(f"  loss of the merged module {loss(module):.3f}")
    loaded = PeftModel.from_pretrained(llama(weights), by_lightning, is_trainable=True)
    print(f"  peft's logits differ from the merged module's by at most {difference(loaded, module.model):.1e}")

    print("Train in peft, go on with Lightning:")
    train_in_peft(loaded.train(), threes)
    loaded.save_pretrained(by_peft)
    module, lora = Language(weights), LoRACallback(r=8, targets="all", init_from=by_peft)
    print(f"  loss {loss(module, lora):.3f}; the logits differ by at most {difference(loaded, module.model):.1e}")
    trainer(lora, epochs=2).fit(module, threes)
    print(f"  after two more epochs {loss(module):.3f}")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as directory:
        main(Path(directory))
