"""What trains in addition to A and B: in a model with several adapters it acts with all of them."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import load_adapter, save_adapter, use_adapters
from tests.helpers.models import net
from tests.helpers.oracles import assert_same_values, snapshot
from tests.helpers.several import THREE, outputs, with_adapters, written_by_peft

X = torch.linspace(-1, 1, 5 * 16).reshape(5, 16)
HEAD = {**THREE["fr"], "also_train": ["head"]}


def with_head(**configs):
    model = with_adapters(net(), configs)
    model.head.weight.data += 0.5
    return model


def test_the_same_head_loads_again_and_another_one_only_with_all_of_its_adapters(tmp_path):
    model = with_head(fr=HEAD, de=THREE["de"])
    save_adapter(model, tmp_path)
    before = snapshot(model)
    load_adapter(model, tmp_path, name="fr")
    model.head.weight.data += 0.5
    with pytest.raises(ValueError, match=r"`head.weight` trains in addition to the adapters.* `de` would act with"):
        load_adapter(model, tmp_path, name="fr")
    load_adapter(model, tmp_path)
    assert_same_values(model, before)


def test_an_adapter_without_the_head_is_not_added_to_one_with_it(tmp_path):
    """Its outputs would be those of another head."""
    (place,) = written_by_peft(net(), tmp_path, {"de": {"r": 2, "target_modules": ["q"]}}).values()
    model, plain = with_head(fr=HEAD), net()
    with pytest.raises(ValueError, match=r"`head.weight` trains in addition .* `fr` would act with"):
        load_adapter(model, place, name="de")
    model.head.weight.data.copy_(net().head.weight)  # an untrained head is the base's
    load_adapter(model, place, name="de")
    load_adapter(plain, place)
    with use_adapters(model, "de"):
        assert torch.equal(outputs(model, X), outputs(plain, X))


def test_a_slot_is_not_swapped_with_another_head(tmp_path):
    save_adapter(with_head(fr=HEAD), tmp_path)
    model = with_adapters(net(), {"slot": {"targets": "all"}})
    with pytest.raises(ValueError, match="`slot` would act with"):
        load_adapter(model, tmp_path, into="slot")
