"""`lr_scale` through every scheduler of torch: as if the module had been written with the scaled rate."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import optim
from torch.optim import lr_scheduler as s

from lightning_lora import LoRACallback
from tests.helpers.models import Lit, data, trainer
from tests.helpers.selection import slow_except

STEPS = 16
SCHEDULERS = {
    "none": lambda o, lr: None,
    "LambdaLR": lambda o, lr: s.LambdaLR(o, lambda step: 0.9**step),
    "LambdaLR with warm-up": lambda o, lr: s.LambdaLR(o, lambda step: min(1.0, step / 5)),
    "MultiplicativeLR": lambda o, lr: s.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o, lr: s.StepLR(o, 3),
    "MultiStepLR": lambda o, lr: s.MultiStepLR(o, [3, 7]),
    "ConstantLR": lambda o, lr: s.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o, lr: s.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o, lr: s.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o, lr: s.PolynomialLR(o, STEPS, 2.0),
    "CosineAnnealingLR": lambda o, lr: s.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingLR with a floor": lambda o, lr: s.CosineAnnealingLR(o, 6, eta_min=lr / 7),
    "CosineAnnealingWarmRestarts": lambda o, lr: s.CosineAnnealingWarmRestarts(o, 5, eta_min=lr / 9),
    "CyclicLR": lambda o, lr: s.CyclicLR(o, lr / 10, lr, 4, cycle_momentum=False),
    "OneCycleLR": lambda o, lr: s.OneCycleLR(o, lr, STEPS + 1),
    "OneCycleLR in three phases": lambda o, lr: s.OneCycleLR(o, lr, STEPS + 1, three_phase=True),
    "ReduceLROnPlateau": lambda o, lr: s.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0, min_lr=lr / 20),
    "SequentialLR": lambda o, lr: s.SequentialLR(
        o, [s.LinearLR(o, 0.1, total_iters=4), s.CosineAnnealingLR(o, 12)], [4]
    ),
    "ChainedScheduler": lambda o, lr: s.ChainedScheduler([s.ConstantLR(o, 0.5, 3), s.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o, lr: optim.swa_utils.SWALR(o, swa_lr=lr / 3, anneal_epochs=5),
}

# Factors of the initial rate, a floor, and a metric.
FAST = ["LambdaLR", "CosineAnnealingLR with a floor", "ReduceLROnPlateau"]


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class LogsLoss(Lit):
    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.log("val_loss", loss)
        return loss


def rates(name: str, lr: float, scale: float) -> list:
    module, spy = LogsLoss(), Rates()

    def configure():
        optimizer = optim.AdamW(module.parameters(), lr)
        scheduler = SCHEDULERS[name](optimizer, lr)
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": "val_loss", "strict": False},
        }

    module.configure_optimizers = configure
    trainer(LoRACallback(r=2, lr_scale=scale, merge=False), spy).fit(module, data())
    return spy.seen


@pytest.mark.parametrize("name", slow_except(FAST, SCHEDULERS))
def test_every_scheduler_follows_the_scaled_rate(name):
    scaled, written = rates(name, 1e-3, 10.0), rates(name, 1e-2, 1.0)
    assert len(scaled) == STEPS and len({rate for [rate] in scaled}) >= (1 if name == "none" else 2)
    torch.testing.assert_close(torch.tensor(scaled), torch.tensor(written), rtol=1e-6, atol=0)


def two_groups(m, **head):
    return [{"params": m.net.layers.parameters()}, {"params": m.net.head.parameters(), **head}]


KINDS = ["LambdaLR", "OneCycleLR", "CosineAnnealingLR", "CyclicLR"]


@pytest.mark.parametrize("kind", slow_except(["LambdaLR", "OneCycleLR"], KINDS))
def test_groups_without_adapters_keep_their_rate(kind):
    def run(scale, lr):
        module, spy = Lit(), Rates()

        def configure():
            optimizer = optim.AdamW(two_groups(module, lr=2e-3), lr)
            scheduler = {
                "LambdaLR": lambda: s.LambdaLR(optimizer, lambda step: 0.9**step),
                "OneCycleLR": lambda: s.OneCycleLR(optimizer, [lr, 2e-3], STEPS + 1),
                "CosineAnnealingLR": lambda: s.CosineAnnealingLR(optimizer, 10),
                "CyclicLR": lambda: s.CyclicLR(optimizer, [lr / 9, 1e-4], [lr, 2e-3], 4, cycle_momentum=False),
            }[kind]()
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        module.configure_optimizers = configure
        callback = LoRACallback(r=2, lr_scale=scale, also_train=["head"], merge=False)
        trainer(callback, spy).fit(module, data())
        return torch.tensor(spy.seen)

    torch.testing.assert_close(run(10.0, 1e-3), run(1.0, 1e-2), rtol=1e-6, atol=0)


def test_one_floor_for_both_kinds_of_groups_is_refused():
    module = Lit()

    def configure():
        optimizer = optim.AdamW(two_groups(module), 1e-3)
        return [optimizer], [s.CosineAnnealingLR(optimizer, 10, eta_min=1e-5)]

    module.configure_optimizers = configure
    with pytest.raises(MisconfigurationException, match=r"cannot scale `eta_min=1e-05` of CosineAnnealingLR"):
        trainer(LoRACallback(r=2, lr_scale=10.0, also_train=["head"])).fit(module, data())


def test_a_resumed_run_continues_the_scaled_rates_and_does_not_scale_twice(tmp_path):
    def run(epochs, ckpt=None, scale=10.0):
        spy = Rates()
        runner = trainer(LoRACallback(r=2, lr_scale=scale, merge=False), spy, max_epochs=epochs)
        runner.fit(Lit(), data(), ckpt_path=ckpt)
        return runner, spy.seen

    _, whole = run(4)
    _, seen = run(2)
    module = Lit()
    runner = trainer(LoRACallback(r=2, lr_scale=10.0, merge=False), Save(tmp_path / "two.ckpt"), max_epochs=2)
    runner.fit(module, data())
    _, rest = run(4, tmp_path / "two.ckpt")
    assert seen + rest == whole
    with pytest.warns(UserWarning, match="was written with lr_scale=10.0; its learning rates are continued"):
        run(3, tmp_path / "two.ckpt", scale=1.0)


class Save(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)
