"""Remedies of messages that come before the first step: parts of a Trainer that do not fit together."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_lora import (
    LoRACallback,
    load_adapter,
    load_from_checkpoint,
    merged_state_dict,
    save_adapter,
)
from tests.helpers.models import BuiltInConfigureModel, Lit, checkpoints, net
from tests.helpers.remedies.case import Expected, fit, fit_to_file, outputs, remedy

COMPATIBILITY = "trainer/compatibility.py"


def ddp() -> SingleDeviceStrategy:
    """For DDP, which two processes try in `tests/trainer/strategies`: here its name alone could be refused."""
    return strategy_named("DDPStrategy")


@remedy(COMPATIBILITY, "`compute='weights'` sums whole", "FSDPStrategy keeps", "Leave `compute` out")
def summed_weights_in_pieces(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(compute="weights"), strategy=strategy_named("FSDPStrategy"))
    fit(LoRACallback())  # with FSDP in two processes in `tests/trainer/strategies`


class _MultiProcessingLauncher:
    """Runs in this process what the real one runs in others."""

    is_interactive_compatible = True

    def launch(
        self, function: Callable[..., object], *args: object, trainer: object = None, **kwargs: object
    ) -> object:
        return function(*args, **kwargs)

    def kill(self, signal: int) -> None:
        pass


def spawning() -> SingleDeviceStrategy:
    return strategy_named("DDPStrategy", _launcher=_MultiProcessingLauncher())


def strategy_named(name: str, **attributes: object) -> SingleDeviceStrategy:
    """A strategy of one process under the name of another, which needs devices that are not here."""
    strategy = SingleDeviceStrategy("cpu")
    strategy.__class__ = type(name, (SingleDeviceStrategy,), {})
    vars(strategy).update(attributes)
    return strategy


@remedy(COMPATIBILITY, "LoRACallback does not support {} yet", "XLAFSDPStrategy", "use strategy='auto' or 'ddp'")
def another_strategy(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(), strategy=strategy_named("XLAFSDPStrategy"))
    fit(LoRACallback(), strategy="auto")


@remedy(COMPATIBILITY, "`sharding_strategy='NO_SHARD'`", "strategy='ddp'")
def ddp_for_no_shard(message: Expected, folder: Path) -> None:
    no_shard = type("ShardingStrategy", (), {"name": "NO_SHARD"})
    with message:
        fit(LoRACallback(), strategy=strategy_named("FSDPStrategy", sharding_strategy=no_shard))
    fit(LoRACallback(), strategy=ddp())


@remedy(COMPATIBILITY, "`use_orig_params=False`", "Leave it out")
def without_flat_parameters(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(), strategy=strategy_named("SingleDeviceStrategy", kwargs={"use_orig_params": False}))
    fit(LoRACallback(), strategy=strategy_named("SingleDeviceStrategy", kwargs={}))


@remedy(COMPATIBILITY, "`TransformerEnginePrecision` replaces", "Use precision='bf16-mixed' or 'bf16-true'")
def precision_of_torch(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(), plugins=type("TransformerEnginePrecision", (Precision,), {})())
    for precision in ("bf16-mixed", "bf16-true"):
        fit(LoRACallback(), precision=precision, module=NoLoss())


class NoLoss(Lit):
    """Casts its input, which is what "bf16-true" asks of data that is not Lightning's to move."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.to(self.net.head.weight.dtype)).float()


@remedy(COMPATIBILITY, "The Trainer has two LoRACallbacks", "`adapters` gives", "`targets` and `rank_pattern`")
def a_list_for_two_callbacks(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(targets=["q"]), LoRACallback(targets=["v"], r=2))
    module = fit(LoRACallback(targets=["q", "v"], rank_pattern={"v": 2}, merge=False))
    assert {module.net.layers[0].q.lora.default.A.shape[0], module.net.layers[0].v.lora.default.A.shape[0]} == {8, 2}
    module = fit(LoRACallback(adapters={"fr": {}, "de": {"r": 4}}, merge=False))
    assert set(module.net.layers[0].q.lora) == {"fr", "de"}


@remedy(COMPATIBILITY, "{} freezes and unfreezes the modules", "BackboneFinetuning", "`also_train`")
def also_train_for_base_finetuning(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(), BackboneFinetuning())
    module = fit(LoRACallback(also_train=["head"]))
    assert not torch.equal(module.net.head.weight, net().head.weight)


@remedy(COMPATIBILITY, "{} copies the whole module", "EMAWeightAveraging", "FSDPStrategy", "strategy='ddp'")
def averages_under_ddp(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(), EMAWeightAveraging(), strategy=strategy_named("FSDPStrategy"))
    fit(LoRACallback(), EMAWeightAveraging(), strategy=ddp())


@remedy(COMPATIBILITY, "{} copies the module in its `setup`, before", "Make the model in `__init__`", "WeightAveraging")
def averages_of_a_model_that_is_built(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(), StochasticWeightAveraging(swa_lrs=1e-3), module=BuiltInConfigureModel())
    fit(LoRACallback(), StochasticWeightAveraging(swa_lrs=1e-3), module=Lit(), max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*overrides the configure_model", category=UserWarning
        )  # Lightning's
        fit(LoRACallback(), WeightAveraging(), module=BuiltInConfigureModel())


@remedy(COMPATIBILITY, "{} copies the model in its `setup`, so", "callbacks=[LoRACallback(...), WeightAveraging(...)]")
def averages_after_the_callback(message: Expected, folder: Path) -> None:
    with message:
        fit(WeightAveraging(), LoRACallback())
    fit(LoRACallback(), WeightAveraging())


@remedy(COMPATIBILITY, "`base_dtype={}` does not work with {}, which casts", "`base_dtype='bf16'`", "strategy='ddp'")
def a_lower_base_under_ddp(message: Expected, folder: Path) -> None:
    lora = LoRACallback(base_dtype="bf16")
    with message:
        fit(lora, strategy=strategy_named("FSDPStrategy"), plugins=MixedPrecision("bf16-mixed", "cpu"))
    fit(LoRACallback(base_dtype="bf16"), strategy=ddp(), precision="bf16-mixed")
    fit(LoRACallback(), strategy=ddp(), precision="bf16-mixed")


@remedy(COMPATIBILITY, "`base_dtype={}` keeps weights", "`base_dtype='bf16'`", "precision='bf16-mixed'", "'32-true'")
def a_lower_base_with_its_autocast(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(base_dtype="bf16"))
    fit(LoRACallback(base_dtype="bf16"), precision="bf16-mixed")
    fit(LoRACallback())


@remedy(COMPATIBILITY, "`base_dtype={}` does not work with {}, which averages", "Leave one of the two out")
def a_lower_base_or_averages(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(base_dtype="bf16"), WeightAveraging(), precision="bf16-mixed")
    fit(LoRACallback(base_dtype="bf16"), precision="bf16-mixed")
    fit(LoRACallback(), WeightAveraging(), precision="bf16-mixed")


@remedy(COMPATIBILITY, "`merge='best'` needs a checkpoint", "ModelCheckpoint(monitor=...)", "merge='last'")
def merge_best_with_a_metric(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(merge="best"))
    fit(LoRACallback(merge="best"), checkpoints(folder, monitor="val_loss"))
    fit(LoRACallback(merge="last"))


@remedy(COMPATIBILITY, "`save='merged'` needs the whole model", "FSDPStrategy", "Use save='adapter'")
def adapter_files_of_a_sharded_model(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(save="merged"), strategy=strategy_named("FSDPStrategy"))
    fit(LoRACallback(save="adapter"), strategy="auto")  # what a sharded run writes is tried in tests/trainer/strategies


@remedy(COMPATIBILITY, "Processes started by spawn or fork", "strategy='ddp'")
def ddp_for_spawned_processes(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(), strategy=spawning())
    fit(LoRACallback(), strategy=ddp())


@remedy(
    COMPATIBILITY, "`export={}` is written at the end of fit", "strategy='ddp'", "save_adapter(load_from_checkpoint("
)
def export_after_spawned_processes(message: Expected, folder: Path) -> None:
    out = str(folder / "out")
    with message:
        fit(LoRACallback(export=out), checkpoints(folder), strategy=spawning())
    module = fit(LoRACallback(export=out), strategy=ddp())
    load_adapter(other := net(), out)
    torch.testing.assert_close(outputs(other), outputs(module))
    path = fit_to_file(folder, LoRACallback())
    save_adapter(load_from_checkpoint(Lit, path), folder / "afterwards")
    load_adapter(other := net(), folder / "afterwards")
    assert torch.equal(outputs(other), outputs(load_from_checkpoint(Lit, path)))


@remedy(COMPATIBILITY, "`merged={}` is written at the end of fit", "strategy='ddp'", "torch.save(merged_state_dict(")
def merged_file_after_spawned_processes(message: Expected, folder: Path) -> None:
    out = str(folder / "merged.safetensors")
    with message:
        fit(LoRACallback(merged=out), checkpoints(folder), strategy=spawning())
    fit(LoRACallback(merged=out), strategy=ddp())
    assert Path(out).exists()
    trained = load_from_checkpoint(Lit, fit_to_file(folder, LoRACallback()))
    torch.save(merged_state_dict(trained), folder / "merged.pt")
    plain = Lit()
    plain.load_state_dict(torch.load(folder / "merged.pt"))
    torch.testing.assert_close(outputs(plain), outputs(trained))
