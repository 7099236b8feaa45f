"""A run on a quantized base that is merged: into the dequantized weights, or into those of a file."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRACallback, load_from_checkpoint, lora_state_dict, merge_lora
from lightning_lora.layers.quantized.formats import dequantized, is_quantized
from lightning_lora.trainer.imports import MisconfigurationException
from tests.helpers.models import Lit, checkpoints, data, trainer

pytest.importorskip("bitsandbytes")
from tests.helpers.quantized import FourBits, Wide, eight_bits, four_bits, quantizing_trainer


def lora(**kwargs: object) -> LoRACallback:
    return LoRACallback(**{"r": 4, "targets": ["q", "v"], **kwargs})


def base_file(folder: Path) -> str:
    path = folder / "base.safetensors"
    save_file(Wide().state_dict(), path)
    return str(path)


def trained(folder: Path, callback: LoRACallback, module: nn.Module, make=quantizing_trainer):
    """A Trainer after its fit, and the callback that wrote its checkpoints."""
    files = checkpoints(folder, monitor="val_loss", save_top_k=1)
    runner = make(callback, files)
    runner.fit(module, data(), data(2))
    return runner, files


def sums(module: nn.Module, path: str, starts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``W0 + B A`` of each adapted layer, with the adapters of a checkpoint."""
    state = torch.load(path, weights_only=True)["state_dict"]
    result = {}
    for name, start in starts.items():
        pair = [state.get(f"{name}.lora.default.{key}") for key in "BA"]
        result[name] = start if pair[0] is None else start + pair[0] @ pair[1]
    return result


def quantized_weights() -> dict[str, torch.Tensor]:
    module = Wide()
    quantizing_trainer().strategy.precision_plugin.convert_module(module)
    return {name: dequantized(layer.to("cpu")) for name, layer in module.named_modules() if is_quantized(layer)}


def test_a_run_is_merged_into_the_dequantized_base_and_goes_on_as_any_other(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lightning_lora.trainer.end_of_fit.rank_zero_info", said.append)
    module = Wide()
    runner, files = trained(tmp_path, lora(dequantize=True), module)
    expected = sums(module, files.last_model_path, quantized_weights())
    layers = dict(module.named_modules())
    for name, weight in expected.items():
        assert type(layers[name]) is nn.Linear
        torch.testing.assert_close(layers[name].weight, weight, rtol=1e-6, atol=1e-6)
    assert (
        f"Merged 4 layers in fp32 into the dequantized base: the adapters of the last step ({runner.global_step})"
        in said[0]
    )
    merged = {key: value.clone() for key, value in module.state_dict().items()}
    Wide().load_state_dict(merged, strict=True)

    plain = Wide()
    plain.load_state_dict(merged)
    assert runner.test(module, data(2), verbose=False) == trainer().test(plain, data(2), verbose=False)
    fresh = quantizing_trainer(lora()).test(Wide(), data(2), ckpt_path=files.last_model_path, verbose=False)
    assert runner.test(module, data(2), ckpt_path=files.last_model_path, verbose=False) == fresh
    assert all(torch.equal(value, merged[key]) for key, value in module.state_dict().items())

    runner.save_checkpoint(tmp_path / "merged.ckpt")
    Wide().load_state_dict(torch.load(tmp_path / "merged.ckpt", weights_only=True)["state_dict"], strict=True)
    before = {key: value.clone() for key, value in lora_state_dict(module).items()}
    quantizing_trainer(lora(merge=False)).fit(module, data())
    assert all(is_quantized(block.q) and is_quantized(block.mlp) for block in module.net.layers)
    assert any(not torch.equal(value, before[key]) for key, value in lora_state_dict(module).items())


@pytest.mark.parametrize("make", [quantizing_trainer, trainer], ids=["by the plug-in", "as it comes"])
def test_a_run_is_merged_into_the_weights_of_a_file(tmp_path, monkeypatch, make):
    said: list[str] = []
    monkeypatch.setattr("lightning_lora.trainer.end_of_fit.rank_zero_info", said.append)
    base = base_file(tmp_path)
    module = Wide() if make is quantizing_trainer else FourBits()
    callback = lora(merge_base=base, merged=str(tmp_path / "merged.safetensors"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Of the parameters")
        _, files = trained(tmp_path, callback, module, make)
    originals = {name: layer.weight.data for name, layer in Wide().named_modules() if isinstance(layer, nn.Linear)}
    expected = sums(module, files.last_model_path, originals)
    for name, layer in module.named_modules():
        if name in expected:
            assert type(layer) is nn.Linear
            torch.testing.assert_close(layer.weight, expected[name], rtol=1e-6, atol=1e-6)
    assert f"into the weights in {base}: the adapters of the last step" in said[0]
    written = load_file(tmp_path / "merged.safetensors")
    assert written.keys() == Wide().state_dict().keys()
    assert all(torch.equal(value, written[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("which", ["dequantize", "merge_base"])
def test_a_merged_file_is_written_where_the_module_keeps_its_adapters(tmp_path, which):
    target = {"dequantize": True} if which == "dequantize" else {"merge_base": base_file(tmp_path)}
    module, path = FourBits(), tmp_path / "merged.safetensors"
    trained(tmp_path, lora(merge=False, merged=str(path), **target), module, trainer)
    written = load_file(path)
    Wide().load_state_dict(written, strict=True)
    assert is_quantized(module.net.layers[0].q)
    merge_lora(module, **({"dequantize": True} if which == "dequantize" else {"base": base_file(tmp_path)}))
    assert all(torch.equal(value, written[key]) for key, value in module.state_dict().items())


def test_the_best_checkpoint_is_merged(tmp_path):
    module = FourBits()
    _, files = trained(tmp_path, lora(merge="best", dequantize=True), module, trainer)
    best = load_from_checkpoint(FourBits, files.best_model_path)
    merge_lora(best, dequantize=True)
    assert all(torch.equal(value, best.state_dict()[key]) for key, value in module.state_dict().items())


class EightBits(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.net.layers[0].q = eight_bits(self.net.layers[0].q)


@pytest.mark.parametrize(("make", "quantize"), [(FourBits, four_bits), (EightBits, eight_bits)])
def test_a_quantized_base_is_not_copied(tmp_path, make, quantize):
    """Its codes alone would be, without their scales. What the error says to do gives what was trained."""
    module, path = make(), str(tmp_path / "model.safetensors")
    save_file(module.net.state_dict(), path)
    _, files = trained(tmp_path, lora(merge=False), module, trainer)
    other = make()
    other.net.layers[0].q = quantize(nn.Linear(64, 64))
    words = r"`net.layers.0.q.weight` is quantized in it and plain here: make the module with the quantized layers that"
    for base in (path, make()):
        with pytest.raises(ValueError, match=words):
            load_from_checkpoint(Wide(), files.best_model_path, base=base)
        with pytest.raises(
            ValueError, match=r"is of .* in it and quantized here, with other values: load the base bef"
        ):
            load_from_checkpoint(other, files.best_model_path, base=base)
    for base in (None, path, make()):
        loaded = load_from_checkpoint(make(), files.best_model_path, base=base)
        assert all(torch.equal(value, module.state_dict()[key]) for key, value in loaded.state_dict().items())
    with pytest.warns(UserWarning, match="compared by name and shape alone, being quantized in one of the two"):
        loaded = load_from_checkpoint(Wide(), files.best_model_path, base=base_file(tmp_path))
    pair, weight = loaded.net.layers[0].q.lora.default, Wide().net.layers[0].q.weight
    assert torch.equal(pair.B, module.net.layers[0].q.lora.default.B)
    assert torch.equal(loaded.net.layers[0].q._parameters["weight"], weight)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"merge_base": "nothing/there"}, FileNotFoundError, "`nothing/there` does not exist"),
        ({"merge_base": "other"}, ValueError, "is not what this base was quantized from"),
        (
            {"dequantize": True, "save": "merged"},
            MisconfigurationException,
            r"`save='merged'` cannot .*`merged=PATH`",
        ),
        (
            {"merged": "x.safetensors"},
            ValueError,
            r"`merged='x.safetensors'` cannot be .*merge_base",
        ),
    ],
)
def test_what_could_not_be_merged_is_refused_before_the_first_step(tmp_path, change, error, words):
    if change.get("merge_base") == "other":
        change = {"merge_base": str(tmp_path / "other.safetensors")}
        save_file({key: value.flip(0) for key, value in Wide().state_dict().items()}, change["merge_base"])
    for module in (FourBits(), Wide()):
        make = trainer if isinstance(module, FourBits) else quantizing_trainer
        runner = make(lora(**change))
        with pytest.raises(error, match=words):
            runner.fit(module, data())
        assert runner.global_step == 0
        make(lora(dequantize=True)).fit(module, data())
        assert type(module.net.layers[0].q) is nn.Linear


def test_a_base_that_is_not_quantized_is_told_to_leave_it_out():
    with pytest.raises(ValueError, match=r"`dequantize=True` is for a base that is quantized.*Leave it out"):
        trainer(lora(dequantize=True, targets="attn")).fit(Lit(), data())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dequantize": True, "merge_base": "x"}, "`merge_base='x'` and `dequantize=True` name two bases"),
        ({"dequantize": True, "merge": False}, "merge=False without `merged` merges nothing. Leave them out"),
    ],
)
def test_arguments_that_contradict_each_other(arguments, words):
    with pytest.raises(ValueError, match=words):
        lora(**arguments)


def test_a_file_that_went_away_in_training_costs_the_merge_and_nothing_else(tmp_path):
    path, module = base_file(tmp_path), FourBits()

    class Removing(FourBits):
        def on_train_end(self):
            Path(path).unlink()

    module = Removing()
    with pytest.warns(UserWarning, match=r"`merge_base=.*base.safetensors'`: `.*` does not exist"):
        trainer(lora(merge_base=path)).fit(module, data())
    assert is_quantized(module.net.layers[0].q) and lora_state_dict(module)


def test_sharded_strategies_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(
        "lightning_lora.trainer.checkpointing.quantized_base.SHARDING_STRATEGIES", ("SingleDeviceStrategy",)
    )
    words = r"`dequantize=True` makes quantized layers plain ones, which SingleDeviceStrategy holds in pieces"
    with pytest.raises(MisconfigurationException, match=words):
        trainer(lora(dequantize=True)).fit(FourBits(), data())
