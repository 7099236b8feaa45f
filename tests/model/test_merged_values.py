"""The state dict of the merged model, computed while the adapters stay live: what a merge would write, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_state_dict, merge_lora, merged_state_dict, unmerge_lora
from lightning_lora.model.merged_values import merged_weights
from tests.helpers.models import net
from tests.helpers.runs import same

CONFIG = LoRAConfig(r=2, alpha=6, also_train=["head"], bias="lora_only")


def trained(seed: int = 1, config: LoRAConfig = CONFIG, **kwargs: object) -> nn.Module:
    model = net(batch_norm=True, **kwargs)
    apply_lora(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.bn.running_mean.fill_(seed)
    return model


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_what_the_merge_writes_and_the_model_stays(dtype):
    model = trained().to(dtype)
    before, merged = bits(model), merged_state_dict(model)
    assert same(bits(model), before)
    assert merged._metadata == net(batch_norm=True).state_dict()._metadata
    for key, value in net(batch_norm=True).state_dict().items():
        A, B = (before.get(f"{key.removesuffix('.weight')}.lora.default.{name}") for name in "AB")
        expected = before[key] if A is None else (value.to(dtype).double() + 3 * B.double() @ A.double()).to(dtype)
        torch.testing.assert_close(merged[key], expected)
    copies = {key: value.clone() for key, value in merged.items()}
    merge_lora(model)
    assert list(copies) == list(model.state_dict()) and same(copies, bits(model))
    assert same(merged_state_dict(model), bits(model))
    unmerge_lora(model)
    assert same(bits(model), before)


def test_the_plain_model_loads_it_and_computes_the_same():
    model, plain = trained().double(), net(batch_norm=True).double()
    plain.load_state_dict(merged_state_dict(model))
    with torch.no_grad():
        for layer in ("layers.0.q", "layers.1.o"):
            x = torch.ones(1, 16, dtype=torch.float64)
            torch.testing.assert_close(plain.get_submodule(layer)(x), model.get_submodule(layer)(x))


def test_a_part_and_a_model_that_is_merged_in_part():
    model, whole = trained(), merged_state_dict(trained())
    merge_lora(model.layers[0])
    assert same(merged_state_dict(model), whole)
    part = {key.removeprefix("layers."): value for key, value in whole.items() if key.startswith("layers.")}
    assert same(merged_state_dict(model.layers), part)


def test_keys_are_those_of_the_model_compiled_or_not():
    model = nn.Module()
    model.net = torch.compile(net())
    keys = list(model.state_dict())
    apply_lora(model, LoRAConfig(r=2))
    assert list(merged_state_dict(model)) == keys and "net._orig_mod.head.weight" in keys


def test_a_tied_weight_stays_one_tensor_and_its_adapted_twin_is_another():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 5, bias=False))
    model[2].weight = model[3].weight = model[0].weight
    apply_lora(model, LoRAConfig(r=2, targets=["2"]))
    nn.init.ones_(model[2].lora.default.B)
    merged = merged_state_dict(model)
    assert merged["0.weight"].data_ptr() == merged["3.weight"].data_ptr() == model[0].weight.data_ptr()
    with pytest.warns(UserWarning, match="was shared"):
        merge_lora(model)
    assert same(merged, dict(model.state_dict()))


def test_the_weights_of_other_values_of_the_adapters():
    model, other = trained(1), trained(2)
    state, before = {key: value.clone() for key, value in lora_state_dict(other).items()}, bits(model)
    weights, expected = dict(merged_weights(model, state)), merged_state_dict(other)
    assert len(weights) == 8 and all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert same(bits(model), before)


def test_without_adapters_and_without_an_entry_for_a_weight_it_says_so():
    with pytest.raises(ValueError, match="has no adapters, live or merged"):
        merged_state_dict(net())

    class Renames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def state_dict(self, **kwargs):
            return self.net.state_dict(**kwargs)

    model = Renames()
    apply_lora(model, LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"`Renames.state_dict\(\)` has no entry `net\.layers\.0\.q\.weight`"):
        merged_state_dict(model)


class Remembers(nn.Identity):
    def get_extra_state(self):
        return {"kept": 1}

    def set_extra_state(self, state):
        assert state == {"kept": 1}


def test_extra_state_is_in_it():
    model = nn.Sequential(nn.Linear(4, 4), Remembers())
    apply_lora(model, LoRAConfig(r=2, targets=["0"]))
    assert merged_state_dict(model)["1._extra_state"] == {"kept": 1}
