"""A state dict of the whole module in the state of a callback: whole again on resume, and no base in the file."""

from __future__ import annotations

import copy

import torch
from lightning.pytorch.callbacks import Callback

from lightning_lora import LoRACallback
from tests.helpers.models import Lit, checkpoints, data, trainer
from tests.helpers.runs import BASE, same


class Shadow(Callback):
    """A moving average as people write it."""

    def __init__(self, drifts: bool = False) -> None:
        self.shadow, self.drifts = None, drifts

    def on_train_start(self, trainer, pl_module):
        if self.shadow is None:
            self.shadow = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_end(self, trainer, pl_module, *_):
        for key, value in pl_module.state_dict().items():
            if self.drifts:
                self.shadow[key] = 0.9 * self.shadow[key] + 0.1 * value
            else:
                self.shadow[key].lerp_(value, 0.1)

    def state_dict(self):
        return {"shadow": self.shadow, "step": 3}

    def load_state_dict(self, state):
        self.shadow = state["shadow"]


def run(folder, epochs, shadow, ckpt=None):
    module = Lit()
    trainer(LoRACallback(r=2, targets=["q"], merge=False), shadow, checkpoints(folder), max_epochs=epochs).fit(
        module, data(), data(1), ckpt_path=ckpt
    )
    return module


def stored(path):
    (state,) = (s for name, s in torch.load(path, weights_only=True)["callbacks"].items() if "Shadow" in name)
    return state


def test_a_resumed_average_is_that_of_an_uninterrupted_run(tmp_path):
    four, two, resumed = Shadow(), Shadow(), Shadow()
    run(tmp_path / "four", 4, four)
    run(tmp_path / "two", 2, two)
    assert not BASE & stored(tmp_path / "two" / "last.ckpt")["shadow"].keys()
    assert stored(tmp_path / "two" / "last.ckpt")["step"] == 3
    module = run(tmp_path / "resumed", 4, resumed, tmp_path / "two" / "last.ckpt")
    assert same(resumed.shadow, four.shadow)
    assert list(resumed.shadow) == list(four.shadow)
    fresh = Lit().state_dict()
    assert all(torch.equal(module.state_dict()[key], fresh[key]) for key in BASE)  # the average got its own memory


def test_what_is_no_longer_the_base_stays_in_the_file(tmp_path):
    four, two, resumed = Shadow(drifts=True), Shadow(drifts=True), Shadow(drifts=True)
    run(tmp_path / "four", 4, four)
    run(tmp_path / "two", 2, two)
    assert BASE & stored(tmp_path / "two" / "last.ckpt")["shadow"].keys()
    run(tmp_path / "resumed", 4, resumed, tmp_path / "two" / "last.ckpt")
    assert same(resumed.shadow, four.shadow)
