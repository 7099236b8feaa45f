"""What several tests of runs look at: the names in a checkpoint of `models.Lit`, and callbacks that look or raise."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from tests.helpers.models import data, net

BASE = {f"net.{name}" for name, _ in net().named_parameters()}
ADAPTERS = {f"net.layers.{b}.{m}.lora.default.{x}" for b in (0, 1) for m in "qkvo" for x in "AB"}


def load(path: object) -> dict:
    return torch.load(path, weights_only=True)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Spy(Callback):
    """Looks at the module while it trains."""

    def on_train_start(self, trainer, pl_module):
        self.trainable = [name for name, p in pl_module.named_parameters() if p.requires_grad]

    def on_train_end(self, trainer, pl_module):
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.in_groups = {id(p) for group in groups for p in group["params"]}
        self.wanted = {id(p) for p in pl_module.parameters() if p.requires_grad}
        self.base = {n: p.detach().clone() for n, p in pl_module.named_parameters() if ".lora." not in n}
        self.adapters = {n: p.detach().clone() for n, p in pl_module.named_parameters() if ".lora." in n}
        pl_module.eval()
        self.output = pl_module(data(9).dataset.tensors[0]).detach()
        pl_module.train()


class Break(Callback):
    """Raises at the given step."""

    def __init__(self, error: BaseException, at: int = 3) -> None:
        self.error, self.at = error, at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            raise self.error


def types(module: nn.Module) -> dict[str, type]:
    return {name: type(inner) for name, inner in module.named_modules()}
