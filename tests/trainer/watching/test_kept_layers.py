"""A layer that other code replaces during a run takes its adapter with it: an error, and no file without it."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_lora import LoRACallback
from tests.helpers.models import Lit, data, trainer


class Replaces(Lit):
    """Gives a layer a plain one in its place, in the hook ``when``."""

    def __init__(self, when: str, epoch: int = 0) -> None:
        super().__init__()
        self.when, self.epoch = when, epoch

    def replace(self, when: str) -> None:
        if when == self.when and self.current_epoch == self.epoch:
            self.net.layers[0].q = nn.Linear(16, 16)

    def on_fit_start(self) -> None:
        self.replace("on_fit_start")

    def on_train_epoch_start(self) -> None:
        self.replace("on_train_epoch_start")

    def on_train_batch_end(self, *_: object) -> None:
        self.replace("on_train_batch_end")


@pytest.mark.parametrize(
    ("when", "epoch"), [("on_fit_start", 0), ("on_train_epoch_start", 0), ("on_train_epoch_start", 1)]
)
def test_a_replaced_layer_is_named_before_the_next_step(when, epoch):
    module = Replaces(when, epoch)
    words = r"`net.layers.0.q` was replaced during the run by a plain Linear \(1 adapted layer in all\), which"
    runner = trainer(LoRACallback(r=2), max_epochs=3)
    with pytest.raises(MisconfigurationException, match=words):
        runner.fit(module, data())
    assert runner.global_step == epoch * len(data())


def test_no_file_is_written_without_what_was_trained(tmp_path):
    with pytest.raises(MisconfigurationException, match="has no adapter: what was trained is lost"):
        trainer(LoRACallback(r=2), ModelCheckpoint(tmp_path, save_last=True), max_epochs=1).fit(
            Replaces("on_train_batch_end"), data()
        )
    assert not list(tmp_path.iterdir())


def test_layers_that_go_are_the_users_choice():
    class Drops(Lit):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                del self.net.layers[1]

    module = Drops()
    trainer(LoRACallback(r=2, liveness=False, merge=False), max_epochs=2).fit(module, data())
    assert len(module.net.layers) == 1 and hasattr(module.net.layers[0].q, "lora")


def test_layers_that_setup_replaces_are_adapted():
    class InSetup(Lit):
        def setup(self, stage: str) -> None:
            self.net.layers[0].q = nn.Linear(16, 16)

    module = InSetup()
    trainer(LoRACallback(r=2, merge=False), max_epochs=1).fit(module, data())
    assert module.net.layers[0].q.lora.default.B.any()
