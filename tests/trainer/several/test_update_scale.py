"""`lr_scale` of one adapter: as if the optimizer had that rate for it, and no group more."""

from __future__ import annotations

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import optim
from torch.optim import lr_scheduler as s

from lightning_lora import LoRACallback
from lightning_lora.trainer.several.update_scale import PROPORTIONAL
from tests.helpers.models import Lit, data, trainer
from tests.helpers.remedies.case import lines_of_log
from tests.helpers.routed import ADAPTERS, RoutedLit, Trace, difference, own_run, rows, steps_of, values_of
from tests.helpers.selection import slow_except

SCALES = {"fr": {}, "de": {"r": 4, "lr_scale": 2.0}, "it": {"alpha": 3.0, "lr_scale": 0.5}}
SCHEDULERS = {
    "none": lambda o: None,
    "LambdaLR": lambda o: s.LambdaLR(o, lambda step: 0.9**step),
    "OneCycleLR": lambda o: s.OneCycleLR(o, 1e-3, 17),
    "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, 6, eta_min=1e-4),
    "SequentialLR": lambda o: s.SequentialLR(o, [s.LinearLR(o, 0.1), s.ExponentialLR(o, 0.9)], [4]),
}


class Groups(Callback):
    def on_train_batch_end(self, runner, pl_module, outputs, batch, index):
        assert [len(optimizer.param_groups) for optimizer in runner.optimizers] == [1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_adapter_trains_as_alone_at_its_own_rate(optimizer):
    trace, module = Trace(), RoutedLit(optimizer)
    callback = LoRACallback(r=2, adapters=SCALES, route="task", merge=False)
    lines: list[str] = []
    with lines_of_log(lines):
        trainer(callback, trace, Groups()).fit(module, rows())
    for name in ADAPTERS:
        alone = own_run(name, steps_of(2), optimizer, rate=SCALES[name].get("lr_scale", 1.0))
        assert difference(trace.steps, alone) < 1e-6
    assert "Adapter `de` trains at 2 times the learning rate that its group shows." in lines
    assert not any("Adapter `fr`" in line for line in lines)


def fit(callback: LoRACallback, optimizer=optim.AdamW, scheduler="none", **kwargs) -> dict:
    module = Lit()

    def configure():
        made = optimizer(module.parameters(), 1e-3, **kwargs)
        rates = SCHEDULERS[scheduler](made)
        return made if rates is None else ([made], [{"scheduler": rates, "interval": "step"}])

    module.configure_optimizers = configure
    trainer(callback, max_epochs=1).fit(module, data())
    return values_of(module)


def compare(**kwargs) -> None:
    """The factor of the adapter times that of the callback is the callback's alone."""
    common = {"r": 2, "merge": False}
    own = fit(LoRACallback(**common, adapters={"fr": {"lr_scale": 5.0}}, lr_scale=2.0), **kwargs)
    alone = fit(LoRACallback(**common, name="fr", lr_scale=10.0), **kwargs)
    plain = fit(LoRACallback(**common, name="fr"), **kwargs)
    assert max(float((own[key] - alone[key]).abs().max()) for key in own) < 1e-6
    assert max(float((own[key] - plain[key]).abs().max()) for key in own) > 1e-5


@pytest.mark.parametrize("scheduler", slow_except(["OneCycleLR"], SCHEDULERS))
def test_every_scheduler_acts_on_the_scaled_rate(scheduler):
    compare(scheduler=scheduler)


@pytest.mark.parametrize("optimizer", slow_except([optim.RMSprop], PROPORTIONAL), ids=lambda cls: cls.__name__)
def test_an_update_is_proportional_to_the_rate(optimizer):
    compare(optimizer=optimizer, weight_decay=0.1)


@pytest.mark.parametrize("optimizer", [optim.Adafactor, optim.ASGD, optim.Rprop])
def test_an_optimizer_whose_update_is_not_is_refused(optimizer):
    callback = LoRACallback(adapters={"fr": {}, "de": {"lr_scale": 2.0}}, merge=False)
    with pytest.raises(MisconfigurationException, match=f"`lr_scale` in `adapters` .* {optimizer.__name__} is not"):
        fit(callback, optimizer)
    fit(LoRACallback(adapters={"fr": {}, "de": {}}, merge=False), optimizer)


def test_an_optimizer_that_outlives_the_run_steps_as_before():
    module = Lit()
    made = optim.SGD(module.parameters(), 1e-2)
    module.configure_optimizers = lambda: made
    trainer(LoRACallback(adapters={"fr": {"lr_scale": 5.0}})).fit(module, data())
    assert not made._optimizer_step_pre_hooks and not made._optimizer_step_post_hooks
