"""Which base it is: the same in another precision, another by any change."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.model.fingerprint import (
    exactly_same,
    fingerprint,
    has_values,
    inexact,
    other_base,
    shape_alone,
    sums_of,
)
from lightning_lora.trainer.checkpointing import checkpoint_io as files
from tests.helpers.models import Lit, data, trainer
from tests.helpers.oracles import adapted, net, train

CUDA = torch.cuda.is_available()


def test_it_names_every_frozen_parameter_with_three_sums_and_a_shape():
    found = fingerprint(net())
    assert list(found) == [name for name, _ in net().named_parameters()]
    assert found["body.0.weight"][3:] == [6, 4]
    assert len(found["scale"]) == 4
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="no GPU"))])
def test_it_is_the_same_wherever_it_is_summed(device):
    model = net()
    assert fingerprint(model, device) == fingerprint(model)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.slow
def test_a_run_sums_on_its_own_device(monkeypatch):
    asked = []
    monkeypatch.setattr(files, "fingerprint", lambda model, device: asked.append(device) or fingerprint(model))
    trainer(LoRACallback(r=2), max_epochs=1).fit(Lit(), data())
    assert asked == [torch.device("cpu")]


def test_the_same_base_is_the_same():
    assert fingerprint(net()) == fingerprint(net())
    assert other_base(fingerprint(net()), fingerprint(net())) is None
    assert exactly_same(fingerprint(net()), fingerprint(net()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_same_base_in_another_precision_is_no_other_but_not_exactly_the_same(dtype):
    cast = fingerprint(net().to(dtype))
    assert other_base(fingerprint(net()), cast) is None
    assert other_base(cast, fingerprint(net())) is None
    assert not exactly_same(fingerprint(net()), cast)


def test_a_weight_that_is_quantized_in_one_of_two_bases_is_not_said_to_differ_in_low_bits():
    here, quantized = fingerprint(net()), fingerprint(net())
    quantized["body.0.weight"] = shape_alone(net().body[0].weight)
    for first, second in ((here, quantized), (quantized, here)):
        assert other_base(first, second) is None
        words = "trained on: `body.0.weight` was compared by name and shape alone, being quantized in one of the two"
        assert words in (inexact(first, second, "the adapter") or "")
    assert "in low bits from the one that it was" in (inexact(here, fingerprint(net().bfloat16()), "it") or "")
    assert inexact(quantized, quantized, "it") is None


@pytest.mark.parametrize("there", [torch.bfloat16, torch.float64], ids=str)
def test_there_and_back_shows_whether_a_bit_was_lost(there):
    assert exactly_same(fingerprint(net()), fingerprint(net().to(there).float())) == (there == torch.float64)


def test_a_change_below_bf16_is_no_other_base_but_not_exactly_the_same():
    model = net()
    model.head.weight.data.fill_(1)
    before = fingerprint(model)
    model.head.weight.data[0, 0] += 1e-5
    assert other_base(before, fingerprint(model)) is None
    assert not exactly_same(before, fingerprint(model))


NAMES = [name for name, _ in net().named_parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_one_other_value_of_any_parameter_is_another_base(name):
    model = net()
    model.get_parameter(name).data.view(-1)[-1] += 1
    told = other_base(fingerprint(net()), fingerprint(model))
    assert told == f"`{name}` has other values"
    assert other_base(fingerprint(model), fingerprint(net())) == told


def test_values_in_other_places_are_another_base():
    model = net()
    model.head.weight.data = model.head.weight.data.flip(1)
    assert other_base(fingerprint(net()), fingerprint(model)) == "`head.weight` has other values"


def test_another_shape_or_name_is_another_base():
    one, other = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(2, 3))
    longer = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    longer.load_state_dict(one.state_dict(), strict=False)
    assert other_base(fingerprint(one), fingerprint(other)) == "`0.weight` had shape (2, 3) and has (3, 2) here"
    assert other_base(fingerprint(one), fingerprint(longer)) == "`1.weight` is only in the model"
    assert other_base(fingerprint(longer), fingerprint(one)) == "`1.weight` is only in the file"


def test_adapters_do_not_count():
    expected = fingerprint(net())
    model = train(adapted())
    assert fingerprint(model) == expected
    merge_lora(model)
    assert other_base(expected, fingerprint(model)) == "`body.0.weight` has other values"
    unmerge_lora(model)
    assert fingerprint(model) == expected
    remove_lora(model)
    assert fingerprint(model) == expected


def test_adapters_that_do_not_train_do_not_count():
    model, expected = net(), fingerprint(net())
    apply_lora(model, LoRAConfig(r=2, targets="all", name="fr"))
    LoRAMethod(LoRAConfig(r=3, targets="all", name="de"), keep={"fr": 0.5}).complete(model)
    for _, parameter in lora_parameters(model):
        parameter.data += 0.1
    assert fingerprint(model) == expected
    merge_lora(model, {"de": 1.0})
    unmerge_lora(model)
    assert fingerprint(model) == expected


def test_what_is_trained_does_not_count():
    model = adapted(r=2, targets=["body.*"], bias="lora_only", also_train=["head"])
    before = fingerprint(model)
    assert before.keys() == set(NAMES) - {"body.0.bias", "body.2.bias", "head.weight", "head.bias"}
    assert fingerprint(train(model)) == before


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_a_quantized_parameter_is_known_by_its_shape_alone(dtype):
    def quantized(value, shape=(2, 3)):
        model = nn.Linear(3, 2)
        model.weight = nn.Parameter(torch.full(shape, value, dtype=dtype), requires_grad=False)
        model.bias = None
        return fingerprint(model)

    assert other_base(quantized(1), quantized(2)) is None
    assert other_base(quantized(1), quantized(1, (3, 3))) == "`weight` had shape (2, 3) and has (3, 3) here"


def test_a_quantized_load_of_a_base_is_compared_by_shape():
    plain, quantized = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    quantized.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    assert other_base(fingerprint(plain), fingerprint(quantized)) is None


def test_parameters_without_values_are_compared_by_shape():
    with torch.device("meta"):
        model = type(net())()
    assert other_base(fingerprint(net()), fingerprint(model)) is None


def test_a_parameter_of_zeros_is_told_from_other_values():
    zeros, ones = nn.LayerNorm(4), nn.LayerNorm(4)
    ones.bias.data.fill_(1)
    assert other_base(fingerprint(zeros), fingerprint(ones)) == "`bias` has other values"
    assert other_base(fingerprint(ones), fingerprint(zeros)) == "`bias` has other values"


def test_wrappers_change_no_name():
    wrapped = nn.Module()
    wrapped.add_module("_orig_mod", net())
    assert fingerprint(wrapped) == fingerprint(net())


def test_the_memory_format_does_not_count():
    model = nn.Conv2d(3, 4, 3)
    before = fingerprint(model)
    assert fingerprint(model.to(memory_format=torch.channels_last)) == before


def test_it_changes_nothing():
    model = net()
    apply_lora(model, LoRAConfig(targets=["head"]))
    before = {name: (parameter.requires_grad, parameter.dtype) for name, parameter in model.named_parameters()}
    fingerprint(model)
    assert {name: (parameter.requires_grad, parameter.dtype) for name, parameter in model.named_parameters()} == before


class Packed(nn.Module):
    """Its weight is stored as a 4-bit library stores one: two numbers in a byte, the matrix's shape in an attribute."""

    def __init__(self, stored=(32, 1), dtype=torch.uint8):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(stored, dtype=dtype), requires_grad=False)
        self.weight.quant_state = SimpleNamespace(shape=torch.Size((8, 8)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_quantized_base_that_its_library_packs_anew_is_the_same(dtype):
    model = Packed(dtype=dtype)
    before = fingerprint(model)
    assert before == {"weight": [None, None, None, 8, 8]}
    model.weight.data = torch.zeros(8, 4, dtype=torch.uint8)
    assert exactly_same(before, fingerprint(model))


def test_a_file_that_recorded_the_packed_shape_is_of_the_same_base():
    recorded = {"weight": [None, None, None, 32, 1]}
    assert other_base(recorded, fingerprint(Packed())) is None
    assert other_base({"weight": [None, None, None, 33, 1]}, fingerprint(Packed())) == (
        "`weight` had shape (33, 1) and has (8, 8) here"
    )


def test_a_quantized_matrix_may_be_stored_transposed_in_the_original():
    """As GPT-2's layers have it, in whose place there are quantized linear layers."""
    recorded = {"weight": [None, None, None, 8, 24]}
    model = nn.ParameterDict({"weight": torch.ones(24, 8)})
    assert other_base(recorded, fingerprint(model)) is None
    with_values = {"weight": [1, 2, 3, 8, 24]}
    assert other_base(with_values, fingerprint(model)) == "`weight` had shape (8, 24) and has (24, 8) here"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_of_a_half_dtype_are_the_same_in_fp32(dtype):
    """As bitsandbytes casts a bias to the dtype in which its layer computes."""
    half = torch.randn(64).to(dtype)
    entry = sums_of(half)
    assert has_values(half.float(), entry) and has_values(half.double(), entry)
    moved = half.float()
    moved[5] += 1e-6
    assert not has_values(moved, entry) and not has_values(half.float() + 0.5, entry)
    assert not has_values(half.float(), sums_of(half.float() + 1e-6))


def test_a_bias_that_a_call_of_its_quantized_layer_casts_is_no_other_base():
    trained = {"q.weight": [None, None, None, 4, 4], "q.bias": [1, 2, 3, 4], "ln.bias": [5, 6, 7, 4]}
    fresh = {**trained, "q.bias": [1, 8, 1, 4]}
    assert exactly_same(trained, fresh) and exactly_same(fresh, trained) and inexact(trained, fresh, "it") is None
    assert not exactly_same(trained, {**trained, "ln.bias": [5, 6, 8, 4]})
    in_full = {**trained, "q.weight": [1, 2, 3, 4, 4]}
    assert not exactly_same(in_full, {**in_full, "q.bias": [1, 8, 1, 4]})
