"""What a Trainer may hold beside the callback: each refusal before the first step, in its words."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_lora import LoRACallback, lora_parameters
from lightning_lora.trainer.compatibility import gpu_of
from tests.helpers.models import BuiltInConfigureModel, Lit, data, net, trainer


class NoStep(Callback):
    def on_train_batch_start(self, *_):
        raise AssertionError("a step was made")


def refused(words: str, *callbacks: object, error=MisconfigurationException, **kwargs: object) -> None:
    module = Lit()
    with pytest.raises(error, match=words):
        trainer(*callbacks, NoStep(), **kwargs).fit(module, data())
    assert list(module.state_dict()) == list(Lit().state_dict())
    assert all(
        torch.equal(module.net.get_parameter(name), p) and p.requires_grad for name, p in net().named_parameters()
    )


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", torch.device("cuda", 1)), ("cpu", None), ("mps", None)])
def test_sums_are_computed_on_the_gpu_of_the_rank(device, expected):
    own = trainer()
    own.strategy._root_device = torch.device(device)
    assert gpu_of(own) == expected


def test_two_callbacks():
    for other in (LoRACallback(r=2), LoRACallback(name="other")):
        refused("two LoRACallbacks, and each would take the optimizers.* Keep one: `adapters`", LoRACallback(), other)


@pytest.mark.parametrize(
    "averaging",
    [WeightAveraging(), EMAWeightAveraging(), StochasticWeightAveraging(1e-2)],
    ids=lambda c: type(c).__name__,
)
def test_averaging_before_us(averaging):
    words = rf"{type(averaging).__name__} copies the model in its `setup`, so LoRACallback must come before it"
    refused(words, averaging, LoRACallback())


def test_base_finetuning_beside_us():
    refused("BackboneFinetuning freezes and unfreezes the modules.*`also_train`", LoRACallback(), BackboneFinetuning())


def test_merge_best_without_a_checkpoint():
    refused("`merge='best'` needs a checkpoint to take the best adapters from", LoRACallback(merge="best"))


def test_a_strategy_that_nobody_tried():
    strategy = SingleDeviceStrategy("cpu")
    strategy.__class__ = type("XLAFSDPStrategy", (SingleDeviceStrategy,), {})
    words = r"LoRACallback does not support XLAFSDPStrategy yet: use strategy='auto' or 'ddp'"
    refused(words, LoRACallback(), strategy=strategy)


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
@pytest.mark.parametrize("averaging", [EMAWeightAveraging, StochasticWeightAveraging])
def test_averages_of_a_module_in_pieces(name, averaging):
    strategy = SingleDeviceStrategy("cpu")
    strategy.__class__ = type(name, (SingleDeviceStrategy,), {})
    other = averaging(swa_lrs=1e-3) if averaging is StochasticWeightAveraging else averaging()
    words = rf"{averaging.__name__} copies the whole module, which {name} shards.*strategy='ddp'"
    refused(words, LoRACallback(), other, strategy=strategy)


def test_swa_of_a_module_that_is_not_made_yet():
    with pytest.raises(
        MisconfigurationException, match=r"StochasticWeightAveraging copies the module in its `setup`, be"
    ):
        trainer(LoRACallback(), StochasticWeightAveraging(swa_lrs=1e-3)).fit(BuiltInConfigureModel(), data())


def test_sharding_that_shards_nothing():
    strategy = SingleDeviceStrategy("cpu")
    strategy.sharding_strategy = type("ShardingStrategy", (), {"name": "NO_SHARD"})
    refused(
        "`sharding_strategy='NO_SHARD'` keeps every weight whole.*strategy='ddp'", LoRACallback(), strategy=strategy
    )


def test_flat_parameters_of_a_whole_unit():
    strategy = SingleDeviceStrategy("cpu")
    strategy.kwargs = {"use_orig_params": False}
    refused("`use_orig_params=False` makes one parameter of all.*Leave it out", LoRACallback(), strategy=strategy)


def test_a_precision_plugin_that_puts_other_layers_in_place():
    plugin = type("TransformerEnginePrecision", (Precision,), {})()
    refused("`TransformerEnginePrecision` replaces every linear layer", LoRACallback(), plugins=plugin)


def test_targets_that_match_nothing():
    refused(
        "`targets` has 'q_proj', which matches no module. The nearest names",
        LoRACallback(targets=["q_proj"]),
        error=ValueError,
    )
    refused("which matches no module", LoRACallback(targets=["q", "nothing"]), error=ValueError)


class StatesAroundFinder(Callback):
    def on_train_start(self, trainer, pl_module):
        self.adapters = {name: p.detach().clone() for name, p in lora_parameters(pl_module)}
        self.state = trainer.optimizers[0].state_dict()["state"]


@pytest.mark.parametrize(
    "finder",
    [
        pytest.param(lambda: LearningRateFinder(num_training_steps=8), id="LearningRateFinder"),
        pytest.param(
            lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2), id="BatchSizeFinder", marks=pytest.mark.slow
        ),
    ],
)
def test_finders_give_adapters_and_optimizer_state_back(finder, tmp_path):
    class Sized(Lit):
        def __init__(self):
            super().__init__()
            self.batch_size = 8

        def train_dataloader(self):
            return torch.utils.data.DataLoader(data().dataset, batch_size=self.batch_size)

        def val_dataloader(self):
            return data(1)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    spy, plain, module = StatesAroundFinder(), StatesAroundFinder(), Sized()
    trainer(LoRACallback(r=4), finder(), spy, max_epochs=1, default_root_dir=tmp_path).fit(module)
    trainer(LoRACallback(r=4), plain, max_epochs=1).fit(Sized())
    assert len(spy.adapters) == 16
    assert all(torch.equal(value, plain.adapters[name]) for name, value in spy.adapters.items())
    assert spy.state == {}
    assert list(module.state_dict()) == list(Lit().state_dict())


@pytest.mark.slow
def test_the_other_package_of_lightning_takes_it_too(tmp_path):
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    methods = {
        name: vars(cls)[name] for cls in reversed(Lit.__mro__[:1]) for name in vars(cls) if not name.startswith("__")
    }

    class Twin(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.lr, self.net = 1e-2, net()

    for name, method in methods.items():
        setattr(Twin, name, method)
    Twin.__abstractmethods__ = frozenset()
    module, callback = Twin(), LoRACallback(r=4)
    assert isinstance(callback, pytorch_lightning.Callback)
    files = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    runner = pytorch_lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, callbacks=[callback, files]
    )
    runner.fit(module, data(), data(1))
    assert len(torch.load(files.best_model_path, weights_only=True)["state_dict"]) == 16
    merged = [n for n, p in net().named_parameters() if not torch.equal(module.net.get_parameter(n), p)]
    assert merged == [f"layers.{block}.{map_}.weight" for block in (0, 1) for map_ in "qkvo"]
    trained_by_the_other = runner.test(module, data(2), ckpt_path="best", verbose=False)
    assert trained_by_the_other == trainer(LoRACallback(r=4)).test(
        Lit(), data(2), ckpt_path=files.best_model_path, verbose=False
    )
