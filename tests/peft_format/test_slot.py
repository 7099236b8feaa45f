"""Values of a file for an adapter that is in use: the same memory, and nothing is compiled again."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    save_adapter,
    use_adapters,
)
from tests.helpers.models import FusedBlocks, net
from tests.helpers.oracles import assert_same_values, same_bits, snapshot
from tests.helpers.several import THREE, fill, opened_by_peft, outputs, outputs_in_peft, with_adapters, written_by_peft

pytest.importorskip("peft")
X = torch.linspace(-1, 1, 5 * 16).reshape(5, 16)
SLOT = {"r": 8, "alpha": 3, "targets": "all"}
BY_PEFT = {
    "smaller": {"r": 2, "lora_alpha": 6, "target_modules": ["q", "v"]},
    "equal": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["mlp", "k"]},
    "ranks": {"r": 5, "lora_alpha": 1, "target_modules": ["o"], "rank_pattern": {"layers.0.o": 3}},
}


def with_slot(**arguments):
    model = net()
    apply_lora(model, LoRAConfig(**SLOT | arguments, name="slot"))
    fill(model)
    return model


def alone(model, name, x=X):
    with use_adapters(model, name):
        return outputs(model, x)


@pytest.mark.parametrize("name", BY_PEFT)
def test_the_slot_computes_as_peft(tmp_path, name):
    place = written_by_peft(net(), tmp_path, {name: BY_PEFT[name]})[name]
    model = with_slot()
    addresses = [parameter.data_ptr() for _, parameter in lora_parameters(model)]
    scales = [layer.lora["slot"].scale for layer in model.modules() if hasattr(layer, "lora")]
    adapted = load_adapter(model, place, into="slot")
    assert adapted == [n for n, m in model.named_modules() if hasattr(m, "lora")]
    expected = outputs_in_peft(opened_by_peft(net(), {name: place}), name, X)
    assert torch.allclose(outputs(model, X), expected, rtol=1e-5, atol=1e-6)
    assert [parameter.data_ptr() for _, parameter in lora_parameters(model)] == addresses
    assert [layer.lora["slot"].scale for layer in model.modules() if hasattr(layer, "lora")] == scales


def test_the_other_adapters_stay(tmp_path):
    place = written_by_peft(net(), tmp_path, {"a": BY_PEFT["smaller"]})["a"]
    model = with_adapters(net(), {**THREE, "slot": SLOT})
    before = snapshot(model)
    load_adapter(model, place, into="slot")
    changed = {key for key, value in model.state_dict().items() if not same_bits(value, before[key])}
    assert changed == set(lora_state_dict(model, "slot"))


@pytest.mark.slow
def test_nothing_is_compiled_again(tmp_path):
    """Whatever the choice and the values: a backend counts its graphs."""
    places = written_by_peft(net(), tmp_path, BY_PEFT)
    model, graphs = with_adapters(net(), {"fr": THREE["fr"], "slot": SLOT}).eval(), []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count)
    with torch.no_grad():
        with use_adapters(model, "fr"):
            compiled(X)
        number = len(graphs)
        for name, place in places.items():
            load_adapter(model, place, into="slot")
            with use_adapters(model, "slot"):
                y = compiled(X)
            expected = outputs_in_peft(opened_by_peft(net(), {name: place}), name, X)
            assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert number and len(graphs) == number


def test_slices_of_a_fused_layer(tmp_path):
    """Each slice gets its columns of the one pair in the file."""

    def fused():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return FusedBlocks(16)

    x = torch.linspace(-1, 1, 2 * 3 * 16).reshape(2, 3, 16)
    source = with_adapters(fused(), {"fr": {"r": 2, "alpha": 5, "targets": "qv"}})
    save_adapter(source, tmp_path)
    model = with_adapters(fused(), {"slot": {"r": 3, "targets": "qv"}, "other": {"targets": "qv"}})
    load_adapter(model, tmp_path, into="slot")
    assert torch.allclose(alone(model, "slot", x), outputs(source, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"r": 4}, r"has rank 5 in the file and only 4 in the model"),
        ({"targets": ["q"]}, r"has an adapter in the file and none in `into='slot'`"),
    ],
)
def test_what_the_slot_has_no_place_for_is_refused(tmp_path, arguments, words):
    (place,) = written_by_peft(net(), tmp_path, {"ranks": BY_PEFT["ranks"]}).values()
    model = with_slot(**arguments)
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        load_adapter(model, place, into="slot")
    assert_same_values(model, before)


def test_no_slot_and_merged_slots_are_refused(tmp_path):
    (place,) = written_by_peft(net(), tmp_path, {"ranks": BY_PEFT["ranks"]}).values()
    model = with_slot()
    with pytest.raises(ValueError, match=r"`into` must be the name of an adapter, but got 'slt'. The model has `slot`"):
        load_adapter(model, place, into="slt")
    with pytest.raises(ValueError, match="Give one of them"):
        load_adapter(model, place, name="slot", into="slot")
    with pytest.raises(ValueError, match="`into` takes the directory of one adapter"):
        load_adapter(model, tmp_path, into="slot")
    merge_lora(model)
    with pytest.raises(ValueError, match="unmerge_lora"):
        load_adapter(model, place, into="slot")
