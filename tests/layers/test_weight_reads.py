"""A weight that the code around its layer reads, instead of calling the layer, is adapted where it is read."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import linear

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, merge_lora, unmerge_lora
from lightning_lora.layers.weight_reads import WeightReads
from tests.helpers import oracles


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.called = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"deep": nn.Linear(4, 4)})

    def forward(self, x):
        return self.called(F.linear(x, self.fc.weight, self.fc.bias)) @ self.inner.deep.weight.t()


class Asks(nn.Module):
    """Wants to know about the weight, and handles it, but computes nothing with it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.fc.weight)

    def tie_weights(self, other):
        self.fc.weight = other.weight

    def forward(self, x):
        if isinstance(self.fc.weight, torch.Tensor) and x.dtype != self.fc.weight.dtype:
            x = x.to(self.fc.weight.device)
        facts = (self.fc.weight.shape, self.fc.weight.size(0), self.fc.weight.dim(), self.fc.weight.ndim)
        facts += (self.fc.weight.numel(), self.fc.weight.requires_grad, self.fc.weight.is_cuda, self.fc.weight.layout)
        self.facts = (*facts, self.fc.weight.stride(), id(self.fc.weight), type(self.fc.weight))
        if hasattr(self.fc, "weight") and hasattr(self.fc.weight, "scale"):
            raise TypeError
        return self.fc(x)


class AsksInOtherWays(nn.Module):
    """Calls ``getattr`` as the weight is not read, and in methods without a first argument."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    @staticmethod
    def dtype():
        return getattr(torch, "float32")  # noqa: B009

    def forward(self, x):
        named = self.fc, "out_features"
        return self.fc(x.to(self.dtype())) * getattr(*named) + getattr(self.fc, "bias")  # noqa: B009


class ReadsAll(nn.Module):
    """Reads the layers of a list, and none whose name begins as that of the list."""

    def __init__(self):
        super().__init__()
        self.layers, self.layer_out, self.fc = nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        for layer in self.layers:
            x = F.linear(x, layer.weight)
        if (last := self.last) is not None:
            x = linear(x, last.weight)
        return self.fc(self.layer_out(x))


class Derived(Reads):
    """Reads by what it inherits."""


class OtherMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.mixed(x)

    def mixed(self, x):
        return x * self.fc.weight.sum()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        *((Reads, {"fc", "inner.deep"}), (Derived, {"fc", "inner.deep"}), (OtherMethod, {"fc"})),
        *((Asks, set()), (AsksInOtherWays, set()), (ReadsAll, {"layers.0", "last"})),
    ],
)
def test_what_is_read(make, expected):
    model = nn.Sequential(nn.Identity(), make())
    modules = dict(model.named_modules())
    reads = WeightReads(modules)
    names = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    assert {name.removeprefix("1.") for name in names if reads.is_read_raw(name, "weight")} == expected


@pytest.mark.parametrize("make", [Reads, Derived, OtherMethod])
def test_what_is_read_is_the_sum(make):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model = make()
    plain, parameters = copy.deepcopy(model), dict(model.named_parameters())
    apply_lora(model, LoRAConfig(r=2, alpha=4, targets="all"))
    assert oracles.same_bits(model(x), plain(x))
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    oracles.train_by_hand(model)
    expected = copy.deepcopy(plain)
    for name, layer in expected.named_modules():
        if isinstance(layer, nn.Linear):
            pair = model.get_submodule(name).lora.default
            layer.weight.data += 2 * pair.B.detach() @ pair.A.detach()
    found = model(x)
    oracles.assert_close(found, expected(x), torch.float32)
    found.square().sum().backward()
    assert all(matrix.grad.any() for _, matrix in lora_parameters(model))
    assert all(parameter.grad is None for parameter in parameters.values())
    oracles.assert_close(oracles.saved_and_loaded(model)(x), found, torch.float32)
    merge_lora(model)
    assert all(type(one) is type(other) for one, other in zip(model.modules(), plain.modules(), strict=True))
    oracles.assert_close(model(x), found, torch.float32)
    unmerge_lora(model)
    for name, parameter in parameters.items():
        assert oracles.same_bits(parameter, dict(plain.named_parameters())[name])


def test_dropout_is_refused_where_the_input_is_not_to_be_had():
    with pytest.raises(ValueError, match=r"`fc` .*has code that reads its weight, where `dropout=0.1` cannot act"):
        apply_lora(Reads(), LoRAConfig(targets=["fc"], dropout=0.1))
    apply_lora(Reads(), LoRAConfig(targets=["called"], dropout=0.1))


def test_a_class_without_source_is_taken_as_it_is():
    names = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x * self.fc.weight.sum()", names)
    model = names["Made"]()
    model.fc = nn.Linear(2, 2)
    assert not WeightReads(dict(model.named_modules())).is_read_raw("fc", "weight")


class TiedByHand(nn.Module):
    """Uses the embedding's weight for its output, without a layer for that."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(9, 4)

    def forward(self, index):
        return F.linear(self.wte(index), self.wte.weight)


class Autoencoder(nn.Module):
    """Calls its layers on the way there, and reads them on the way back."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        for layer in reversed(self.layers):
            x = F.linear(x, layer.weight.t())
        return x


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(this, x):  # noqa: N805
        mine = this.conv
        return this.conv(x) + F.conv1d(x, getattr(mine, "weight"), padding=1)  # noqa: B009


@pytest.mark.parametrize(
    ("make", "x"),
    [(TiedByHand, torch.tensor([[1, 5], [0, 8]])), (Autoencoder, torch.ones(2, 4)), (Renamed, torch.ones(2, 3, 5))],
)
def test_what_is_called_and_read_is_one_sum(make, x):
    model = make()
    apply_lora(model, LoRAConfig(r=2, targets=[r"re:wte|conv|layers\.\d"]))
    oracles.train_by_hand(model)
    trained = model(x)
    merge_lora(model)
    oracles.assert_close(model(x), trained, torch.float32)


class ReadsItself(nn.Linear):
    """Hands on to the forward that it inherits, and reads its weight in another method."""

    def forward(self, x):
        return super().forward(x) + self.regular()

    def regular(self):
        return self.weight.square().mean()


def test_a_sub_class_that_reads_its_weight_elsewhere():
    model = nn.ModuleDict({"fc": ReadsItself(4, 4)})
    apply_lora(model, LoRAConfig(r=2, targets=["fc"]))
    oracles.train_by_hand(model)
    x = torch.ones(2, 4)
    trained = model.fc(x)
    merge_lora(model)
    oracles.assert_close(model.fc(x), trained, torch.float32)


class ReadsAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.attn(x, x, x)[0] @ self.attn.in_proj_weight[:4]


def test_an_attention_that_is_called_and_read_is_refused_with_advice_that_works():
    with pytest.raises(ValueError, match=r"reads its `in_proj_weight` too: .* targets=\['attn.in_proj_weight'\]"):
        apply_lora(ReadsAttention(), LoRAConfig(targets="attn"))
    model = ReadsAttention()
    apply_lora(model, LoRAConfig(r=2, targets=["attn.in_proj_weight"]))
    oracles.train_by_hand(model)
    x = torch.randn(3, 2, 4)
    trained = model(x)
    merge_lora(model)
    oracles.assert_close(model(x), trained, torch.float32)
