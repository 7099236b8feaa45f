"""A search for the learning rate is one of the module's rate: adapters take `lr_scale` times it, as in any fit."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from lightning_lora import LoRACallback
from tests.helpers.models import Lit, data, trainer

SEARCH = {"num_training": 16, "early_stop_threshold": None, "mode": "linear"}


class Rates(Callback):
    def on_train_start(self, trainer, pl_module):
        self.seen = [group["lr"] for group in trainer.optimizers[0].param_groups]


class WithHead(Lit):
    """A group for the adapters, and one for the head."""

    def configure_optimizers(self):
        groups = [{"params": self.net.layers.parameters()}, {"params": self.net.head.parameters()}]
        return torch.optim.AdamW(groups, lr=self.lr)


def search(module, folder, scale, **limits):
    """The Tuner's search with adapters alone, or with the head too."""
    also = ["head"] if isinstance(module, WithHead) else None
    runner = trainer(LoRACallback(r=2, also_train=also, lr_scale=scale), max_epochs=1, default_root_dir=folder)
    return Tuner(runner).lr_find(module, data(n=256), **SEARCH, **limits), runner


def test_the_search_is_of_the_scaled_rate(tmp_path):
    """The same steps as a search without a factor, over rates that are eight times as large."""
    scaled, _ = search(Lit(), tmp_path, 8.0, min_lr=2.0**-10, max_lr=2.0**-4)
    plain, _ = search(Lit(), tmp_path, 1.0, min_lr=2.0**-7, max_lr=2.0**-1)
    assert scaled.results["loss"] == plain.results["loss"]
    assert [8 * rate for rate in scaled.results["lr"]] == pytest.approx(plain.results["lr"])
    assert 8 * scaled.suggestion() == pytest.approx(plain.suggestion())


def test_a_fit_after_the_tuner_trains_at_the_found_rate_times_the_factor(tmp_path):
    module, rates = WithHead(), Rates()
    search(module, tmp_path, 10.0)
    found = module.lr
    assert found != WithHead().lr
    trainer(LoRACallback(r=2, also_train=["head"], lr_scale=10.0), rates, max_epochs=1).fit(module, data())
    assert rates.seen == [found * 10.0, found]


@pytest.mark.parametrize("finder_first", [True, False])
def test_a_fit_with_the_finder_goes_on_at_the_found_rate_times_the_factor(finder_first, tmp_path):
    module, rates, lora = WithHead(), Rates(), LoRACallback(r=2, also_train=["head"], lr_scale=10.0)
    finder = LearningRateFinder(num_training_steps=16, early_stop_threshold=None)
    callbacks = [finder, lora] if finder_first else [lora, finder]
    trainer(*callbacks, rates, max_epochs=1, default_root_dir=tmp_path).fit(module, data(n=256))
    assert module.lr == finder.optimal_lr.suggestion()
    assert rates.seen == [module.lr * 10.0, module.lr]
    assert "lr_find" not in vars(finder), "the next run of the finder is its own"


def test_a_search_that_only_looks_leaves_the_rates_alone(tmp_path):
    rates, finder = Rates(), LearningRateFinder(num_training_steps=16, update_attr=False)
    lora = LoRACallback(r=2, also_train=["head"], lr_scale=10.0)
    trainer(lora, finder, rates, max_epochs=1, default_root_dir=tmp_path).fit(WithHead(), data(n=256))
    assert rates.seen == [WithHead().lr * 10.0, WithHead().lr]


def test_a_search_that_fails_leaves_no_hook_on_the_optimizer(tmp_path):
    class Failing(WithHead):
        calls = 0

        def configure_optimizers(self):
            self.optimizer = super().configure_optimizers()
            return self.optimizer

        def training_step(self, batch, index):
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("stop")
            return super().training_step(batch, index)

    module = Failing()
    with pytest.raises(RuntimeError, match="stop"):
        search(module, tmp_path, 10.0)
    optimizer = module.optimizer
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
