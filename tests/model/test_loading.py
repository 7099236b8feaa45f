"""Base checkpoints load into an adapted model as into a plain one; anything in between stays wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora, remove_lora, unmerge_lora
from tests.helpers.models import Net, net


def adapted() -> Net:
    model = net()
    apply_lora(model, LoRAConfig(r=2))
    return model


def other_base() -> dict[str, torch.Tensor]:
    return {name: value + 1 for name, value in net().state_dict().items()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_base_checkpoint_loads_strictly_and_leaves_the_adapters(wrapped):
    model, base = adapted(), other_base()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora." in name}
    if wrapped:
        nn.ModuleDict({"inner": model}).load_state_dict({f"inner.{name}": value for name, value in base.items()})
    else:
        model.load_state_dict(base)
    assert len(before) == 16
    for name, value in {**base, **before}.items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("lost", ["layers.0.q.lora.default.A", "layers.1.mlp.weight"])
def test_a_file_that_lacks_one_thing_is_refused(lost):
    state = adapted().state_dict()
    del state[lost]
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{lost}"'):
        adapted().load_state_dict(state)


def test_a_file_that_lacks_the_adapters_of_one_layer_is_refused():
    state = {key: value for key, value in adapted().state_dict().items() if not key.startswith("layers.0.q.lora")}
    with pytest.raises(RuntimeError, match=r"layers\.0\.q\.lora\.default\.B"):
        adapted().load_state_dict(state)


def test_an_empty_file_lacks_everything():
    with pytest.raises(RuntimeError, match=r"layers\.0\.q\.lora\.default\.A"):
        adapted().load_state_dict({})


def test_copies_do_the_same_and_plain_models_have_no_hook():
    model = adapted()
    copy.deepcopy(model).load_state_dict(other_base())
    merge_lora(model)
    assert len(model._load_state_dict_post_hooks) == 0
    unmerge_lora(model)
    model.load_state_dict(net().state_dict())
    remove_lora(model)
    assert len(model._load_state_dict_post_hooks) == 0
