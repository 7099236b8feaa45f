"""The merge of adapters on a quantized base, against ``W0 + scale * B A`` written out; the way back gives its bits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    merged_state_dict,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.layers.quantized.formats import dequantized, is_quantized
from lightning_lora.model.merged_values import merged_values
from lightning_lora.model.quantized.merge import MergeBase, plain_dtype

bitsandbytes = pytest.importorskip("bitsandbytes")
from tests.helpers.interrupts import interrupt, lines_in  # noqa: E402
from tests.helpers.quantized import WideNet, eight_bits, four_bits  # noqa: E402

SCALE = 0.5
FORMATS = {
    "nf4": {"quant_type": "nf4"},
    "nf4-dq": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "stored as bf16": {"quant_type": "nf4", "quant_storage": torch.bfloat16},
    "computes in bf16": {"quant_type": "nf4", "compute_dtype": torch.bfloat16},
}


def net() -> WideNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WideNet()


def quantized_net(kind: str = "nf4") -> WideNet:
    """Its blocks are quantized, and their first projections get adapters."""
    model = net()
    for block in model.layers:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                quantized = eight_bits(layer) if kind == "int8" else four_bits(layer, **FORMATS[kind])
                setattr(block, name, quantized)
    return model


def adapted_net(kind: str = "nf4", name: str = "default") -> WideNet:
    model = quantized_net(kind)
    apply_lora(model, LoRAConfig(r=4, alpha=4 * SCALE, targets=["q"], name=name))
    train(model, name)
    return model


def train(model: nn.Module, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(len(name))
    for _, parameter in lora_parameters(model, name=name):
        nn.init.normal_(parameter, 0, 0.1, generator=generator)


def expected_weights(model: nn.Module, start=dequantized) -> dict[str, torch.Tensor]:
    """Every linear layer's weight as it must be: ``W0``, or ``W0 + scale * B A``, in fp64."""
    expected = {}
    for name, layer in model.named_modules():
        if is_quantized(layer):
            expected[name] = start(layer).double()
            if hasattr(layer, "lora"):
                pair = layer.lora.default
                expected[name] += SCALE * pair.B.double() @ pair.A.double()
    return expected


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Codes may be stored as floating-point numbers, and be NaNs of these."""
    as_bytes = ([value.reshape(-1).view(torch.uint8) for value in each.values()] for each in (first, second))
    return first.keys() == second.keys() and all(map(torch.equal, *as_bytes))


@pytest.mark.parametrize("kind", [*FORMATS, "int8"])
def test_every_quantized_layer_becomes_a_plain_one_and_comes_back_bit_for_bit(kind):
    model = adapted_net(kind)
    before, expected = bits(model), expected_weights(model)
    layers = dict(model.named_modules())
    classes = {name: type(layer) for name, layer in layers.items()}
    lost = merge_lora(model, dequantize=True)
    assert lost.keys() == {"layers.0.q", "layers.1.q"} and max(lost.values()) < 1e-5
    for name, weight in expected.items():
        assert type(layers[name]) is nn.Linear and layers[name].weight.dtype == torch.float32
        torch.testing.assert_close(layers[name].weight.double(), weight, rtol=1e-7, atol=1e-7)
    net().load_state_dict(model.state_dict(), strict=True)
    plain = vars(nn.Linear(1, 1)).keys() | {"_lightning_lora"}
    assert all(vars(layers[name]).keys() <= plain for name in expected)
    unmerge_lora(model)
    assert {name: type(layer) for name, layer in model.named_modules()} == classes and same_bits(bits(model), before)


def test_the_merged_model_computes_what_was_trained():
    model, x = adapted_net().train(), torch.randn(5, 16)
    trained = model(x)
    merge_lora(model, dequantize=True)
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
    unmerge_lora(model)
    assert torch.equal(model(x), trained)
    remove_lora(model)
    assert torch.equal(model(x), quantized_net()(x))


def test_the_plain_layers_have_the_dtype_of_the_other_parameters_and_the_sum_is_rounded_once():
    """So their output goes on in it: bitsandbytes' layers cast to the dtype in which they compute, and back."""
    model = adapted_net()
    for layer in (model.up, model.head, *(block.ln for block in model.layers)):
        layer.to(torch.bfloat16)
    assert plain_dtype(model) == torch.bfloat16 and plain_dtype(four_bits(nn.Linear(64, 64))) == torch.float32
    expected = expected_weights(model)
    biases = {name: layer.bias for name, layer in model.named_modules() if is_quantized(layer)}
    lost = merge_lora(model, dequantize=True)
    layers = dict(model.named_modules())
    assert all(torch.equal(layers[name].weight, weight.to(torch.bfloat16)) for name, weight in expected.items())
    assert all(layers[name].bias.dtype == torch.bfloat16 for name in expected)
    assert 0.001 < min(lost.values()) < 1
    unmerge_lora(model)
    assert all(layers[name].bias is bias for name, bias in biases.items())


def test_what_transformers_keeps_in_fp32_does_not_decide_the_dtype():
    """Of T5 in fp16 that are the largest of the other weights, and the activations are in fp16."""
    model = adapted_net()
    for layer in (model.head, *(block.ln for block in model.layers)):
        layer.to(torch.bfloat16)
    assert plain_dtype(model) == torch.float32
    model._keep_in_fp32_modules = ["up"]
    assert plain_dtype(model) == torch.bfloat16


def test_the_merge_into_a_base_in_full_precision(tmp_path):
    """``W0`` is the file's; the layers without adapters get the file's weights too."""
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    model = adapted_net()
    before, original = bits(model), dict(net().named_modules())
    names = {id(layer): name for name, layer in model.named_modules()}
    expected = expected_weights(model, lambda layer: original[names[id(layer)]].weight)
    merge_lora(model, base=tmp_path / "base.safetensors")
    layers = dict(model.named_modules())
    for name, weight in expected.items():
        torch.testing.assert_close(layers[name].weight.double(), weight, rtol=1e-7, atol=1e-7)
    assert torch.equal(layers["layers.0.v"].weight, original["layers.0.v"].weight)
    merge_lora(model, dequantize=True)  # taken out, and merged into the other base
    torch.testing.assert_close(layers["layers.0.v"].weight, dequantized(quantized_net().layers[0].v))
    unmerge_lora(model)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_frozen_biases_are_those_of_the_base_in_full_precision(tmp_path, bias):
    """bitsandbytes rounds them at the first call to the dtype in which the layer computes; those that train stay."""
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    model, original = quantized_net("computes in bf16"), dict(net().named_modules())
    apply_lora(model, LoRAConfig(r=4, targets=["q"], bias=bias))
    train(model)
    model(torch.ones(1, 16))
    before, path = bits(model), tmp_path / "base.safetensors"
    rounded = {name: layer.bias for name, layer in model.named_modules() if is_quantized(layer)}
    assert {value.dtype for value in rounded.values()} == {torch.bfloat16}
    written = dict(merged_values(model, into=MergeBase(str(path))))
    merge_lora(model, base=path)
    for name, value in rounded.items():
        trains = bias == "lora_only" and name.endswith("q")
        expected = value.float() if trains else original[name].bias
        assert torch.equal(model.get_submodule(name).bias, expected)
        assert torch.equal(written[f"{name}.bias"], expected)
    unmerge_lora(model)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_record_travels_with_copies(copied):
    model = adapted_net()
    before = bits(model)
    merge_lora(model, dequantize=True)
    other = copied(model)
    unmerge_lora(other)
    assert same_bits(bits(other), before) and type(model.layers[0].q) is nn.Linear


def test_without_undo_nothing_of_the_quantized_base_is_kept():
    model = adapted_net()
    merge_lora(model, dequantize=True, undo=False)
    assert not any("_lightning_lora" in vars(module) for module in model.modules())
    assert b"bitsandbytes" not in pickle.dumps(model)
    with pytest.raises(ValueError, match="no merged adapters"):
        unmerge_lora(model)


def test_an_error_leaves_the_quantized_model(monkeypatch):
    model = adapted_net()
    before = bits(model)
    names = []

    def fail(layer):
        names.append(layer)
        if len(names) == 3:
            raise MemoryError
        return dequantized(layer)

    monkeypatch.setattr("lightning_lora.model.quantized.merge.dequantized", fail)
    with pytest.raises(MemoryError):
        merge_lora(model, dequantize=True)
    assert same_bits(bits(model), before) and all(is_quantized(block.q) for block in model.layers)


def everything(model: nn.Module) -> tuple[object, ...]:
    """Classes, attributes, flags and bits."""
    modules = {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return modules, flags, {key: value.reshape(-1).view(torch.uint8).tolist() for key, value in bits(model).items()}


def dequantize(model: nn.Module) -> None:
    merge_lora(model, dequantize=True)


@pytest.mark.parametrize("count", [12, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", [dequantize, unmerge_lora])
def test_an_interrupt_at_any_line_leaves_the_model_before_or_after(verb, count):
    def ready() -> nn.Module:
        model = nn.ModuleDict({name: four_bits(nn.Linear(64, 64).requires_grad_(False)) for name in "qv"})
        apply_lora(model, LoRAConfig(r=2, targets=["q"], seed=0))
        train(model)
        if verb is unmerge_lora:
            dequantize(model)
        return model

    torch.manual_seed(0)
    subject = ready()
    twin, done = copy.deepcopy(subject), copy.deepcopy(subject)
    before, lines = everything(subject), len(lines_in(lambda: verb(twin)))
    verb(done)
    after = everything(done)
    for line in range(1, lines, max(1, lines // count)):
        model = copy.deepcopy(subject)
        interrupt(lambda model=model: verb(model), line)
        assert everything(model) in (before, after), f"line {line} of {lines}"


@pytest.mark.parametrize("name", ["q", "v"])
def test_a_weight_that_changed_since_is_not_overwritten(name):
    model = adapted_net()
    merge_lora(model, dequantize=True)
    with torch.no_grad():
        getattr(model.layers[1], name).weight[0, 0] += 1
    changed = bits(model)
    with pytest.raises(ValueError, match=rf"`layers.1.{name}.weight` is not what the merge left there"):
        unmerge_lora(model)
    assert same_bits(bits(model), changed)


def test_of_several_adapters_those_that_are_named_are_merged():
    model = adapted_net(name="fr")
    apply_lora(model, LoRAConfig(r=2, targets=["q"], name="de"))
    train(model, "de")
    before, layer = bits(model), model.layers[0].q
    fr, de = layer.lora["fr"], layer.lora["de"]
    expected = dequantized(layer) + SCALE * fr.B @ fr.A + 0.5 * de.B @ de.A
    merge_lora(model, {"fr": 1.0, "de": 0.5}, dequantize=True)
    torch.testing.assert_close(layer.weight, expected)
    unmerge_lora(model)
    assert same_bits(bits(model), before)


def test_adapters_load_into_the_merged_model_and_are_merged_into_the_same_base():
    model, other = adapted_net(), adapted_net()
    for _, parameter in lora_parameters(other):
        nn.init.ones_(parameter)
    state = copy.deepcopy(lora_state_dict(other))
    merge_lora(model, dequantize=True)
    model.load_state_dict(state)
    merge_lora(other, dequantize=True)
    assert same_bits(bits(model), bits(other)) and type(model.layers[0].q) is nn.Linear
    unmerge_lora(model)
    assert is_quantized(model.layers[0].q)


def test_the_state_dict_of_the_merged_model_is_the_plain_one():
    model = adapted_net()
    with pytest.raises(ValueError, match=r"cannot hold the sum.*Call merge_lora\(model, dequantize=True\) first"):
        merged_state_dict(model)
    merge_lora(model, dequantize=True)
    assert same_bits(dict(merged_state_dict(model)), bits(model))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, r"`layers.0.q` is quantized.*dequantize=True.*base=PATH"),
        ({"dequantize": 1}, TypeError, "`dequantize` must be a bool"),
        ({"base": 3}, TypeError, "`base` must be the path of a model in full precision, but got 3"),
        ({"base": "x", "dequantize": True}, ValueError, "`base='x'` and `dequantize=True` name two bases"),
        ({"base": "nothing/there"}, FileNotFoundError, "`nothing/there` does not exist"),
    ],
)
def test_arguments_that_are_refused(arguments, error, words):
    model = adapted_net()
    with pytest.raises(error, match=words):
        merge_lora(model, **arguments)
    assert is_quantized(model.layers[0].q)
    merge_lora(model, dequantize=True)


def test_a_base_that_is_not_quantized_has_nothing_to_dequantize():
    model = net()
    apply_lora(model, LoRAConfig(targets=["q"]))
    with pytest.raises(ValueError, match="`dequantize=True` is for a base that is quantized, and no linear layer"):
        merge_lora(model, dequantize=True)
    merge_lora(model)


def test_quantized_layers_that_are_no_linear_ones_are_refused_by_name():
    model = nn.ModuleDict({"emb": bitsandbytes.nn.Embedding4bit(64, 64), "q": four_bits(nn.Linear(64, 64))})
    apply_lora(model, LoRAConfig(targets=["q"]))
    with pytest.raises(ValueError, match=r"`emb.weight` of a Embedding4bit is quantized, and only linear layers"):
        merge_lora(model, dequantize=True)


def test_a_merged_model_saves_its_adapters_with_the_fingerprint_of_the_quantized_base(tmp_path):
    model = adapted_net()
    save_adapter(model, tmp_path / "live")
    merge_lora(model, dequantize=True)
    save_adapter(model, tmp_path / "merged")
    live, merged = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("live", "merged"))
    assert live == merged
    load_adapter(other := quantized_net(), tmp_path / "merged")
    unmerge_lora(model)
    assert same_bits(bits(other), bits(model))
