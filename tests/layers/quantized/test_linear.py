"""A base in few bits under Lightning's `BitsandbytesPrecision`: A and B beside it in fp32, and no merge."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    SubspaceConfig,
    TuneCallback,
    TuneConfig,
    adapt,
    apply_lora,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    plan_lora,
)
from lightning_lora.layers.adapters import Adapters
from tests.helpers.models import checkpoints, data, trainer
from tests.helpers.several import mixed_as_alone

bitsandbytes = pytest.importorskip("bitsandbytes")

from tests.helpers.quantized import FourBits, Wide, Words, four_bits, quantizing_trainer, words  # noqa: E402


class Spy(Callback):
    def on_train_end(self, trainer, pl_module):
        self.adapters = {name: (p.dtype, p.requires_grad) for name, p in lora_parameters(pl_module)}
        states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
        self.states = {value.dtype for state in states for value in state.values()}
        self.trained = sorted(name for name, p in pl_module.named_parameters() if p.requires_grad)
        self.weight = type(pl_module.net.layers[0].q.weight).__name__


@pytest.mark.slow
def test_adapters_are_there_in_fp32_and_train_and_so_is_their_optimizer_state(tmp_path):
    spy, module = Spy(), Wide()
    quantizing_trainer(LoRACallback(r=4), spy, checkpoints(tmp_path, monitor=None)).fit(module, data())
    assert len(spy.adapters) == 16 and set(spy.adapters.values()) == {(torch.float32, True)}
    assert spy.trained == sorted(spy.adapters) and spy.states == {torch.float32} and spy.weight == "Params4bit"
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert sorted(saved["state_dict"]) == sorted(spy.adapters)
    assert saved["lightning_lora"]["base"]["net.layers.0.q.weight"][3:] == [64, 64]


@pytest.mark.slow
def test_the_module_keeps_its_adapters_and_a_fresh_one_tests_the_same(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lightning_lora.trainer.end_of_fit.rank_zero_info", said.append)
    files, module = checkpoints(tmp_path, monitor=None), Wide()
    runner = quantizing_trainer(LoRACallback(r=4), files)
    runner.fit(module, data())
    assert "Quantized weights cannot hold the sum, so nothing is merged" in said[0]
    own = runner.test(module, data(2), verbose=False)
    fresh = quantizing_trainer(LoRACallback(r=4)).test(Wide(), data(2), ckpt_path=files.last_model_path, verbose=False)
    assert own == fresh != quantizing_trainer().test(Wide(), data(2), verbose=False)


@pytest.mark.slow
def test_a_base_that_evaluation_packs_anew_is_the_same_base(tmp_path):
    files, module = checkpoints(tmp_path, monitor=None), FourBits()
    runner = trainer(LoRACallback(r=4), files)
    runner.fit(module, data())
    expected = runner.test(module, data(2), verbose=False)
    assert runner.test(module, data(2), ckpt_path=files.last_model_path, verbose=False) == expected
    fresh = trainer(LoRACallback(r=4)).test(FourBits(), data(2), ckpt_path=files.last_model_path, verbose=False)
    assert fresh == expected


@pytest.mark.slow
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path):
    def run(name: str, epochs: int, ckpt: object = None) -> dict:
        files = checkpoints(tmp_path / name, monitor=None)
        module = Wide()
        quantizing_trainer(LoRACallback(r=4), files, max_epochs=epochs).fit(module, data(), ckpt_path=ckpt)
        return lora_state_dict(module)

    four, two = run("four", 4), run("two", 2)
    resumed = run("resumed", 4, tmp_path / "two" / "last.ckpt")
    assert all(torch.equal(four[key], resumed[key]) for key in four)
    assert not all(torch.equal(four[key], two[key]) for key in four)


@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_the_quantized_map_and_the_low_rank_term(training):
    torch.manual_seed(0)
    model = nn.Sequential(four_bits(nn.Linear(64, 96)))
    packed = model[0].weight
    weight = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state).float()
    apply_lora(model, LoRAConfig(r=4, targets=["0"]))
    A, B = (parameter for _, parameter in lora_parameters(model))
    assert (A.shape, B.shape) == ((4, 64), (96, 4))
    nn.init.normal_(B)
    x = torch.randn(5, 64)
    model.train(training)
    expected = F.linear(x, weight + B @ A, model[0].bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-3 if training else 0.3)  # evaluates in bf16
    assert isinstance(model[0], bitsandbytes.nn.Linear4bit)
    assert "64 -> 96" in str(plan_lora(nn.Sequential(four_bits(nn.Linear(64, 96))), LoRAConfig(targets=["0"])))


def test_what_acts_is_looked_up_once_in_each_call(monkeypatch):
    layer = four_bits(nn.Linear(64, 64))
    apply_lora(layer, LoRAConfig(r=4, targets="all"))
    looked_up, terms = [], Adapters.terms
    monkeypatch.setattr(Adapters, "terms", lambda self, x: looked_up.append(x) or terms(self, x))
    x = torch.randn(2, 64)
    layer(x)
    assert looked_up == [x]


def test_a_merge_is_refused_by_name():
    model = nn.Sequential(four_bits(nn.Linear(64, 64)))
    apply_lora(model, LoRAConfig(r=4, targets=["0"]))
    with pytest.raises(
        ValueError,
        match=r"`0` is quantized, and its few bits cannot hold the sum. merge_lora\(model, dequantize=True\)",
    ):
        merge_lora(model)


def test_eight_bits_and_an_embedding_that_is_plain():
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    weight = layer.weight.data.clone()
    model = nn.ModuleDict({"few": layer.to("cpu")})
    apply_lora(model, LoRAConfig(r=4, targets=["few"]))
    A, B = (parameter for _, parameter in lora_parameters(model))
    nn.init.normal_(B)
    x = torch.randn(5, 64)
    expected = F.linear(x, weight + B @ A, layer.bias)
    torch.testing.assert_close(model["few"](x), expected, rtol=0.02, atol=0.1)
    apply_lora(embedding := nn.Sequential(bitsandbytes.nn.StableEmbedding(8, 4)), LoRAConfig(r=2, targets=["0"]))
    merge_lora(embedding)


def test_each_sample_of_a_mixed_batch_is_that_sample_alone():
    torch.manual_seed(0)
    layer = four_bits(nn.Linear(64, 64))
    for name in ("fr", "de", "idle"):
        apply_lora(layer, LoRAConfig(r=2, targets="all", name=name))
        nn.init.normal_(layer.lora[name].B)
    mixed_as_alone(layer, torch.randn(3, 4, 64), ["fr", None, {"de": 0.5}]).sum().backward()
    assert layer.lora["idle"].A.grad is None and layer.lora["fr"].A.grad is not None


def half_quantized() -> nn.Module:
    """A quantized layer, whose weight no device has made codes yet, and what trains."""
    return nn.ModuleDict(
        {"mlp": nn.Sequential(bitsandbytes.nn.LinearNF4(64, 64), nn.LayerNorm(64)), "q": nn.Linear(64, 64)}
    )


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoRAConfig(r=2, targets=["q"], also_train=["mlp"]), r"the weight of `mlp\.0` is quantized: its codes take no"),
        (
            LoRAConfig(r=2, targets=["mlp.0.weight"]),
            "holds `weight`, which is quantized, and .*: name the layer instead",
        ),
        (TuneConfig(["mlp.0.weight"]), "nothing that can train: it is quantized, and its codes take no gradient"),
        (SubspaceConfig(4), r"`mlp\.0\.weight` cannot be projected: its few bits"),
    ],
)
def test_codes_that_are_to_train_are_refused_by_name(config, words, moved):
    model = half_quantized().to("cpu") if moved else half_quantized()
    with pytest.raises(ValueError, match=words):
        adapt(model, config)
    remedies = {LoRAConfig: LoRAConfig(r=2, targets=["q", "mlp.0"], also_train=["mlp.1", "mlp.0.bias"])}
    adapt(model, remedies.get(type(config), TuneConfig(["mlp"])))
    model.to("cpu")["mlp"](torch.ones(1, 64)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"mlp.0.bias", "mlp.1.weight"} <= trained and "mlp.0.weight" not in trained


@pytest.mark.parametrize(("mode", "dtype"), [("nf4", torch.float32), ("int8", torch.float16)])
def test_all_that_can_train_of_a_base_that_a_plug_in_quantizes(mode, dtype):
    module = Words()
    runner = quantizing_trainer(TuneCallback("all"), mode=mode, dtype=dtype, max_epochs=1)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    runner.fit(module, words())
    moved = {
        name for name, p in module.named_parameters() if not p.is_floating_point() or not torch.equal(p, before[name])
    }
    codes = {name for name, parameter in module.named_parameters() if not parameter.is_floating_point()}
    assert len(codes) == 10 and moved == set(before)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"])
def test_every_mode_of_the_plug_in(mode, tmp_path):
    """No warning either: a base is the same before and after its numbers became codes."""
    dtype = torch.float16 if mode.startswith("int8") else torch.float32

    def run(folder: str, epochs: int, ckpt: object = None) -> tuple:
        files, module = checkpoints(tmp_path / folder), Words()
        runner = quantizing_trainer(LoRACallback(r=4), files, mode=mode, dtype=dtype, max_epochs=epochs)
        runner.fit(module, words(), words(1), ckpt_path=ckpt)
        return lora_state_dict(module), runner, module, files

    expected, runner, module, files = run("whole", 2)
    expected = {key: value.clone() for key, value in expected.items()}
    run("half", 1)
    resumed, *_ = run("resumed", 2, tmp_path / "half" / "last.ckpt")
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert torch.load(files.last_model_path, weights_only=True)["state_dict"].keys() == expected.keys()
    best = runner.test(module, words(2), ckpt_path="best", verbose=False)
    fresh = quantizing_trainer(LoRACallback(r=4), mode=mode, dtype=dtype)
    assert fresh.test(Words(), words(2), ckpt_path=files.best_model_path, verbose=False) == best
