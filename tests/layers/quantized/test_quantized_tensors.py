"""Adapters on linear layers whose weight is a quantized tensor, as torchao's `quantize_` leaves them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    adapt,
    apply_lora,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    plan_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.analysis import UpdateRatio, UpdateSpectrum
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.quantized.formats import dequantized, is_quantized
from lightning_lora.methods.subspace.config import SubspaceConfig
from lightning_lora.methods.tune.config import TuneConfig
from lightning_lora.model.fingerprint import fingerprint, other_base
from lightning_lora.model.frozen_values import FrozenValues
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor, stored_tensors
from tests.helpers.quantized_tensors import FORMATS, QUANTIZES_INPUT, matrix_of, quantize
from tests.helpers.several import mixed_as_alone

CONFIG = LoRAConfig(r=4, alpha=8, targets=["0", "2"])
CONFIG_OF_ONE = LoRAConfig(r=4, alpha=8, targets=["0"])


def model_of(kind: str | None = "toy", layers: tuple[str, ...] = ()) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128), nn.Linear(128, 128))
    if kind:
        quantize(model, kind, layers)
    return model


def adapted(kind: str, config: LoRAConfig = CONFIG) -> nn.Sequential:
    model = model_of(kind)
    apply_lora(model, config)
    torch.manual_seed(1)
    for name, parameter in lora_parameters(model):
        if name.endswith("B"):
            nn.init.normal_(parameter)
    return model


def by_hand(model: nn.Sequential, x):
    """The output and the gradients of every A and B of ``y.sum()``, in fp64, on the matrices that the weights mean."""
    h, pairs = x.double(), []
    for layer in model:
        if isinstance(layer, nn.Tanh):
            h = h.tanh()
            continue
        matrix = matrix_of(layer)
        if isinstance(layer, LoRALayer) and layer.lora:
            A, B = (getattr(layer.lora.default, key).detach().double().requires_grad_() for key in "AB")
            pairs += [A, B]
            matrix = matrix + layer.lora.default.scale * B @ A
        h = h @ matrix.t() + layer.bias.detach().double()
    return h, torch.autograd.grad(h.sum(), pairs)


@pytest.mark.parametrize("kind", FORMATS)
def test_output_and_gradients_are_those_of_the_dequantized_matrices(kind):
    """The last layer is no target: the gradient goes through it all the same."""
    model, x = adapted(kind), torch.randn(5, 128)
    before = [model_of(kind)(x), [type(layer) for layer in model_of(kind)]]
    y = model(x)
    y.sum().backward()
    expected, gradients = by_hand(model, x)
    tolerance = {"rtol": 5e-2, "atol": 0.5} if kind in QUANTIZES_INPUT else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    for (_, parameter), gradient in zip(lora_parameters(model), gradients, strict=True):
        difference = (parameter.grad.double() - gradient).norm() / gradient.norm()
        assert difference < (2e-2 if kind in QUANTIZES_INPUT else 1e-5)
    remove_lora(model)
    assert torch.equal(model(x), before[0]) and [type(layer) for layer in model] == before[1]


@pytest.mark.parametrize("kind", FORMATS)
def test_before_training_the_output_is_the_base_s_bit_for_bit(kind):
    model, x = model_of(kind), torch.randn(5, 128)
    expected = model(x)
    apply_lora(model, CONFIG)
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_casts_and_copies_keep_the_codes_and_the_adapters(kind):
    model, x = adapted(kind), torch.randn(5, 128)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = adapted(kind)
    again.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(again(x), expected)
    model.to(torch.bfloat16)
    assert is_quantized_tensor(model[0].weight) and model[0].lora.default.A.dtype == torch.float32


def test_it_pickles_with_its_adapters():
    model, x = adapted("toy"), torch.randn(5, 128)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_after_it_was_adapted_it_computes_the_same(kind):
    first, second = model_of(kind, ("0", "2")), model_of(None)
    for model in (first, second):
        apply_lora(model, CONFIG)
    quantize(second, kind, ("0", "2"))
    assert not any(is_quantized_tensor(parameter) for _, parameter in lora_parameters(second))
    for model in (first, second):
        torch.nn.init.ones_(model[0].lora.default.B)
    x = torch.randn(5, 128)
    assert torch.equal(first(x), second(x))
    for model in (first, second):
        model(x).sum().backward()
    assert torch.equal(first[2].lora.default.B.grad, second[2].lora.default.B.grad)


def test_a_base_is_compared_by_names_and_shapes():
    quantized, plain = fingerprint(adapted("toy")), fingerprint(model_of(None))
    assert quantized["0.weight"] == [None, None, None, 128, 128] and plain["0.weight"][0] is not None
    assert other_base(quantized, plain) is None and other_base(plain, quantized) is None
    smaller = {**plain, "0.weight": [None, None, None, 64, 32]}
    assert "`0.weight` had shape (64, 32)" in other_base(smaller, quantized)


def test_a_change_of_codes_is_seen_where_the_values_are_known():
    model = model_of()
    watch = FrozenValues(dict(model.named_parameters()))
    base = fingerprint(model_of(None))
    assert watch.changed(base) == []
    stored_tensors(model[0].weight)[0].view(-1)[0] += 1
    assert watch.changed(base) == ["0.weight"]


def test_it_is_saved_and_loaded_as_any_adapter(tmp_path):
    model, x = adapted("toy"), torch.randn(5, 128)
    save_adapter(model, tmp_path)
    fresh = model_of()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))


def test_the_plan_and_the_metrics_know_it():
    assert "128 -> 128" in str(plan_lora(model_of(), CONFIG))
    model = adapted("toy")
    ratio = UpdateRatio()
    for metric in (UpdateSpectrum(), ratio):
        metric.update(model)
    norm = matrix_of(model[0]).norm().float()
    torch.testing.assert_close(ratio.compute()["0"]["weight_norm"], norm)


def test_a_merge_is_refused_by_name_and_one_beside_quantized_layers_is_not():
    with pytest.raises(ValueError, match="`0` is quantized, and its few bits cannot hold the sum"):
        merge_lora(adapted("toy"))
    model, x = model_of("toy", ("2", "3")), torch.randn(5, 128)
    apply_lora(model, LoRAConfig(r=4, targets=["0"]))
    nn.init.normal_(model[0].lora.default.B)
    expected = model(x)
    merge_lora(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), expected)


def test_what_a_layer_multiplies_by_is_known():
    model = adapted("toy")
    assert is_quantized(model[0]) and not is_quantized(model[1])
    torch.testing.assert_close(dequantized(model[0]).double(), matrix_of(model[0]), rtol=2e-2, atol=1e-3)


def test_on_the_weight_s_side_it_computes_with_activations():
    first, second = adapted("toy"), model_of()
    apply_lora(second, CONFIG, compute="weights")
    second.load_state_dict(first.state_dict())
    x = torch.randn(5, 128)
    assert torch.equal(first(x), second(x))


def test_each_sample_of_a_mixed_batch_is_that_sample_alone():
    model = model_of("int8")
    for name in ("fr", "de"):
        apply_lora(model, LoRAConfig(r=2, targets=["0", "2"], name=name))
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.lora[name].B)
    mixed_as_alone(model, torch.randn(3, 4, 128), ["fr", None, {"de": 0.5}]).sum().backward()


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2, self.bias)


def test_a_layer_that_reads_its_weight_is_refused_by_name():
    layer = Scaled(128, 128)
    layer.weight = model_of()[0].weight
    words = r"`0` has a weight that is a DynamicInt8, which LoRA adapts only in linear layers with torch's own forward"
    with pytest.raises(ValueError, match=words):
        apply_lora(nn.Sequential(layer), LoRAConfig(targets=["0"]))
    model = nn.Sequential(layer, nn.Linear(128, 8))
    apply_lora(model, LoRAConfig(targets="all", exclude=["0"]))  # the remedy


def test_quantized_weights_are_not_trained():
    model = model_of("toy", ("0",))
    adapt(model, TuneConfig(train="all"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["0.bias", "2.weight", "2.bias", "3.weight", "3.bias"]


def test_also_train_of_a_quantized_layer_is_refused_by_name():
    words = "`also_train` has '3', and the weight of `3` is quantized: its codes take no gradient. Adapt the layer"
    with pytest.raises(ValueError, match=words):
        apply_lora(model_of(), LoRAConfig(targets=["0"], also_train=["3"]))
    apply_lora(model_of(), LoRAConfig(targets=["0", "3"]))  # the remedies
    apply_lora(model_of("toy", ("0", "2")), LoRAConfig(targets=["0"], also_train=["3"]))


def test_it_is_not_projected():
    with pytest.raises(ValueError, match=r"`0.weight` cannot be projected: its few bits cannot be summed with P z"):
        adapt(model_of(), SubspaceConfig(dimension=10, targets=["0.weight"]))


class QLinear(nn.Linear):
    """As quanto's: a class of its own, whose forward reads the quantized weight."""

    __module__ = "optimum.toy"
    activation_qtype: object = None

    def forward(self, x):
        return nn.functional.linear(x, self.weight.dequantize(), self.bias)


def toy_quanto() -> nn.Sequential:
    layer = QLinear(128, 128)
    layer.weight = model_of()[0].weight
    return nn.Sequential(layer)


def real_quanto() -> nn.Sequential:
    quanto = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(nn.Linear(128, 128))
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    return model


@pytest.mark.parametrize("make", [toy_quanto, real_quanto])
def test_quanto_adds_the_update_to_the_output_of_its_own_layer(make):
    model, x = make(), torch.randn(5, 128, requires_grad=True)
    matrix, before = model[0].weight.dequantize().double(), model(x)
    apply_lora(model, CONFIG_OF_ONE)
    assert torch.equal(model(x), before)
    pair = model[0].lora.default
    nn.init.normal_(pair.B, std=0.01)
    summed = matrix + pair.scale * (pair.B @ pair.A).detach().double()
    expected = x.detach().double() @ summed.t() + model[0].bias.detach().double()
    y = model(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad.double(), summed.sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dequantized(model[0]).double(), matrix)


@pytest.mark.parametrize("make", [toy_quanto, real_quanto])
def test_quanto_is_merged_in_the_model_in_full_precision(make, tmp_path):
    """Python cannot give its layers the class of a plain one."""
    model, original = make(), nn.Linear(128, 128)
    original.bias = nn.Parameter(model[0].bias.detach().clone())
    apply_lora(model, CONFIG_OF_ONE)
    pair = model[0].lora.default
    nn.init.normal_(pair.B, std=0.01)
    words = "`0` is a layer of quanto, which cannot become a plain one. Call save_adapter"
    with pytest.raises(ValueError, match=f"`0` is quantized, and its few bits cannot hold the sum. {words}"):
        merge_lora(model)
    with pytest.raises(ValueError, match=f"^{words}"):
        merge_lora(model, dequantize=True)
    save_adapter(model, tmp_path)
    matrix, plain = original.weight.detach().double(), nn.Sequential(original)
    with pytest.warns(UserWarning, match="`0.weight` was compared by name and shape alone"):
        load_adapter(plain, tmp_path)
    merge_lora(plain)
    expected = matrix + pair.scale * (pair.B @ pair.A).detach().double()
    torch.testing.assert_close(original.weight.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_merge_into_the_dequantized_weight_is_undone_bit_for_bit():
    model, x = model_of(), torch.randn(5, 128)
    apply_lora(model, CONFIG_OF_ONE)
    pair, before = model[0].lora.default, dequantized(model[0]).double()
    nn.init.normal_(pair.B, std=0.01)
    expected, y = before + pair.scale * (pair.B @ pair.A).detach().double(), model(x)
    merge_lora(model, dequantize=True)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model[0].weight.double(), expected, rtol=1e-6, atol=1e-7)
    unmerge_lora(model)
    assert torch.equal(model(x), y)


def test_layers_that_would_round_an_update_are_refused_by_name():
    model = toy_quanto()
    model[0].activation_qtype = "qint8"
    with pytest.raises(ValueError, match=r"`0` quantizes its output \(quanto's `activations`\), and an update smaller"):
        apply_lora(model, CONFIG_OF_ONE)
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    with pytest.raises(ValueError, match="`0` is an AutoBitLinear, which computes with weights of -1, 0 and 1"):
        apply_lora(nn.Sequential(bitnet.AutoBitLinear(128, 128)), CONFIG_OF_ONE)
    apply_lora(nn.Sequential(nn.Linear(128, 128)), CONFIG_OF_ONE)  # the remedy


def test_weights_of_8_bit_floating_point_are_refused_with_what_can_be_adapted():
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    words = "`0` has a weight of torch.float8_e4m3fn; LoRA adapts .* weights that bitsandbytes, torchao or quanto quant"
    with pytest.raises(ValueError, match=words):
        apply_lora(nn.Sequential(integration.FP8Linear(128, 128)), CONFIG_OF_ONE)


def test_an_embedding_that_is_quantized_too_is_recorded_and_becomes_plain(tmp_path):
    """`quantize_` with a filter of its own takes embeddings, which have no `in_features`."""
    model = nn.ModuleDict({"emb": nn.Embedding(32, 128), "q": nn.Linear(128, 64)})
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    matrices = {name: layer.weight.detach().clone() for name, layer in model.items()}
    for layer in model.values():
        FORMATS["toy"](layer)
    rows = model["emb"].weight.dequantize()
    apply_lora(model, LoRAConfig(r=4, alpha=4, targets=["q"]))
    nn.init.normal_(model["q"].lora.default.B, std=0.01)
    delta = (model["q"].lora.default.B @ model["q"].lora.default.A).detach()
    assert fingerprint(model)["emb.weight"] == [None, None, None, 32, 128]
    merge_lora(model, dequantize=True)
    assert type(model["emb"]) is nn.Embedding and torch.equal(model["emb"].weight, rows)
    merge_lora(model, base=tmp_path / "base.safetensors")
    assert torch.equal(model["emb"].weight, matrices["emb"])
    torch.testing.assert_close(model["q"].weight, matrices["q"] + delta)
    unmerge_lora(model)
    assert torch.equal(model["emb"].weight.dequantize(), rows)


class QConv2d(nn.Conv2d):
    """As quanto's: its state dict has the parts of its weight."""

    __module__ = "optimum.toy"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight._data"] = self.weight.detach()
        destination[f"{prefix}weight._scale"] = torch.ones(())


def test_the_parts_of_a_quantized_weight_that_is_no_linear_layers_stay_out_of_files(tmp_path):
    model = nn.Sequential(QConv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    apply_lora(model, LoRAConfig(r=2, targets=["2"]))
    assert list(lora_state_dict(model)) == ["2.lora.default.A", "2.lora.default.B"]
    save_adapter(model, tmp_path)
    remove_lora(model)
    load_adapter(model, tmp_path)
