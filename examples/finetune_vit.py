"""A vision transformer gets a new head: a linear probe, LoRA with the head, and full fine-tuning, at equal steps.

    python examples/finetune_vit.py                               # minutes on two CPU cores, without a hub
    python examples/finetune_vit.py --model vit_tiny_patch16_224  # weights from timm's hub; takes a GPU

The new task is to tell clothes apart (Fashion-MNIST), with 4,000 images to train on. No package carries weights of a
vision transformer, so the default base is a small one that learns digits here first (MNIST). It is no substitute for a
pretrained model: it shows how a base and a new head are trained. The script needs timm (`pip install timm`).
"""

from __future__ import annotations

import argparse
import copy
import warnings

import timm
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from real_data import FASHION_MNIST, MNIST, images_and_labels
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lora import LoRACallback, TuneCallback

SMALL = {"img_size": 28, "patch_size": 7, "depth": 4, "embed_dim": 64, "num_heads": 4}
METHODS = {  # the callback, and the best of three rates for the default base; a pretrained one wants smaller rates
    "linear probe": (lambda: TuneCallback("head"), 1e-2),
    "LoRA and the head": (lambda: LoRACallback(r=8, targets="all", also_train=["head"]), 3e-3),
    "full fine-tuning": (lambda: TuneCallback("all"), 1e-3),
}


class Classifier(LightningModule):
    """An ordinary module around an image model. It knows nothing of LoRA."""

    def __init__(self, model, lr):
        super().__init__()
        self.model, self.lr = model, lr
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images):
        images = 2 * images[:, None].expand(-1, 3, -1, -1) - 1  # three colours from -1 to 1, as timm's weights expect
        return self.model(nn.functional.interpolate(images, self.model.patch_embed.img_size))

    def on_train_start(self):
        self.trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, index):
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def fit(module, data, steps, *callbacks):
    """Train on the first part of the data; the accuracy on the second part, in percent."""
    train, test = (TensorDataset(*part) for part in data)
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=steps, callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True))
    return 100 * trainer.test(module, DataLoader(test, batch_size=250), verbose=False)[0]["accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a vision transformer of timm with weights on the hub")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each method, 64 images each")
    parser.add_argument("--base-steps", type=int, default=900, help="training steps of the default base")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*treespec.*")
    seed_everything(0)
    if arguments.model:
        base = timm.create_model(arguments.model, pretrained=True)
    else:
        base = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SMALL)
        accuracy = fit(Classifier(base, 1e-3), images_and_labels(MNIST), arguments.base_steps)
        print(f"the base: {accuracy:.2f} % on MNIST")

    (images, labels), test = images_and_labels(FASHION_MNIST)
    data = [(images[:4000], labels[:4000]), test]
    lines = [f"{'on Fashion-MNIST':<20}{'accuracy in %':>15}{'trained parameters':>20}"]
    for name, (callback, lr) in METHODS.items():
        seed_everything(0)  # the same head and the same batches for each method
        module = Classifier(copy.deepcopy(base), lr)
        module.model.reset_classifier(10)
        accuracy = fit(module, data, arguments.steps, callback())
        lines.append(f"{name:<20}{accuracy:>15.2f}{module.trained:>20,}")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
