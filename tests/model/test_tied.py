"""Weights that several modules share: right before the merge, right after it, and shared again when it is undone."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora, merge_lora, remove_lora, unmerge_lora
from tests.helpers import oracles, zoo


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index):
        return self.head(self.body(self.embed(index)))


class TiedByMemory(Tied):
    """Two parameters, one memory."""

    def __init__(self):
        super().__init__()
        self.head.weight = nn.Parameter(self.embed.weight.detach())


class SharedLayer(nn.Module):
    """One layer under two names, used three times."""

    def __init__(self):
        super().__init__()
        self.embed, self.one = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.two = self.one

    def forward(self, index):
        return self.two(self.one(self.one(self.embed(index)).relu()).relu())


INDEX = torch.tensor([[1, 5, 5], [0, 8, 2]])
FUNCTIONS = {
    "head": lambda W, D, body: F.linear(body(F.embedding(INDEX, W)), W + D["head"]),
    "embed": lambda W, D, body: F.linear(body(F.embedding(INDEX, W + D["embed"])), W),
    "both": lambda W, D, body: F.linear(body(F.embedding(INDEX, W + D["embed"])), W + D["head"]),
}


def delta(layer):
    pair = layer.lora.default
    product = 2 * pair.B.detach() @ pair.A.detach()
    return product.t() if isinstance(layer, nn.Embedding) else product


@pytest.mark.filterwarnings("ignore:`head.weight` was shared")
@pytest.mark.parametrize("make", [Tied, TiedByMemory])
@pytest.mark.parametrize("which", FUNCTIONS)
def test_each_of_the_tied_has_its_own_adapter_and_nobody_elses(make, which):
    model = make()
    shared, base = model.embed.weight, copy.deepcopy(model)
    targets = ["embed", "head"] if which == "both" else [which]
    apply_lora(model, LoRAConfig(r=2, alpha=4, targets=targets))
    oracles.train_by_hand(model)
    deltas = {name: delta(getattr(model, name)) for name in targets}
    expected = FUNCTIONS[which](shared.detach(), deltas, base.body)
    oracles.assert_close(model(INDEX), expected, torch.float32)
    with pytest.warns(
        UserWarning, match=rf"`{targets[0]}.weight` was shared with another module, and merged it is a param"
    ):
        merge_lora(model)
    oracles.assert_close(model(INDEX), expected, torch.float32)
    for name in {"embed", "head"} - set(targets):
        assert oracles.same_bits(getattr(model, name).weight, base.embed.weight)
    unmerge_lora(model)
    oracles.assert_close(model(INDEX), expected, torch.float32)
    remove_lora(model)
    assert oracles.same_bits(model(INDEX), base(INDEX))
    assert model.embed.weight is shared
    assert (model.head.weight is shared) is (make is Tied)
    assert model.head.weight.data_ptr() == shared.data_ptr()


@pytest.mark.filterwarnings("ignore:`(head.)?weight` was shared")
def test_copies_pickles_and_parts_know_that_it_is_shared():
    model = Tied()
    before = oracles.snapshot(model)
    apply_lora(model, LoRAConfig(r=2, targets=["head"]))
    oracles.train_by_hand(model)
    trained = model(INDEX)
    merge_lora(model.head)  # a part that does not know who else has its weight
    oracles.assert_close(model(INDEX), trained, torch.float32)
    for other in (copy.deepcopy(model), oracles.saved_and_loaded(model), model):
        oracles.assert_close(other(INDEX), trained, torch.float32)
        unmerge_lora(other)
        remove_lora(other)
        assert other.head.weight is other.embed.weight
        oracles.assert_same_values(other, before)


@pytest.mark.filterwarnings("ignore:`head.weight` was shared")
def test_a_shared_weight_that_was_changed_since_is_named_and_nothing_is_unmerged():
    model = Tied()
    apply_lora(model, LoRAConfig(r=2, targets=["head", "body"]))
    oracles.train_by_hand(model)
    merge_lora(model)
    model.embed.weight.data += 1
    merged = oracles.snapshot(model)
    with pytest.raises(ValueError, match=r"`head\.weight` is not what the merge left .* Nothing was changed\."):
        unmerge_lora(model)
    oracles.assert_same_values(model, merged)


@pytest.mark.filterwarnings("ignore:.*was shared")
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("make", [Tied, TiedByMemory])
def test_flags_are_as_before_where_both_holders_were_merged(make, flag):
    model = make()
    model.embed.weight.requires_grad_(flag)
    model.head.weight.requires_grad_(flag)
    apply_lora(model, LoRAConfig(r=2, targets=["embed", "head"]))
    merge_lora(model)
    assert model.embed.weight.requires_grad == model.head.weight.requires_grad == flag
    unmerge_lora(model)
    assert not model.embed.weight.requires_grad
    remove_lora(model)
    assert model.embed.weight.requires_grad == model.head.weight.requires_grad == flag


@pytest.mark.filterwarnings("ignore:`head.weight` was shared")
def test_kept_for_good_the_merged_model_is_not_tied():
    model = Tied()
    apply_lora(model, LoRAConfig(r=2, targets=["head"]))
    oracles.train_by_hand(model)
    trained = model(INDEX)
    merge_lora(model, undo=False)
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.empty(9, 4))
    untied.load_state_dict(model.state_dict())
    oracles.assert_close(untied(INDEX), trained, torch.float32)
    with pytest.raises(ValueError, match="no merged adapters"):
        unmerge_lora(model)


def test_a_layer_under_two_names_has_one_adapter_and_is_merged_once():
    model = SharedLayer()
    base = copy.deepcopy(model)
    assert apply_lora(model, LoRAConfig(r=2, alpha=4, targets=["one", "two"])) == ["one"]
    oracles.train_by_hand(model)
    W = base.one.weight.detach() + delta(model.one)
    base.one.weight.data = W
    oracles.assert_close(model(INDEX), base(INDEX), torch.float32)
    merge_lora(model)
    oracles.assert_close(model.two.weight, W, torch.float32)
    oracles.assert_close(model(INDEX), base(INDEX), torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["lm_head", "wte"], ["lm_head", "c_attn"]], ids=str)
def test_the_tied_head_of_gpt2(targets):
    transformers.logging.set_verbosity_error()
    model, inputs = zoo.build(zoo.CASES["gpt2"])
    assert model.lm_head.weight is model.transformer.wte.weight
    before, start = oracles.snapshot(model), zoo.output(model, inputs)
    apply_lora(model, LoRAConfig(r=2, targets=targets))
    oracles.train_by_hand(model)
    trained = zoo.output(model, inputs)
    assert not torch.allclose(trained, start, rtol=1e-2)
    merge_lora(model)
    oracles.assert_close(zoo.output(model, inputs), trained, torch.float32)
    unmerge_lora(model)
    assert oracles.same_bits(zoo.output(model, inputs), trained)
    remove_lora(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    oracles.assert_same_values(model, before)
