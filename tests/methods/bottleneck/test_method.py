"""Bottlenecks on whole models: the start, the formula through a model, copies, compiled and checkpointed blocks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_lora.layers.adapted import adapted_modules
from lightning_lora.methods.bottleneck.config import PLACEMENTS, BottleneckConfig
from lightning_lora.methods.bottleneck.method import BottleneckMethod
from tests.helpers import models

every_placement = pytest.mark.parametrize("placement", PLACEMENTS)
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def method(placement="houlsby", **arguments):
    return BottleneckMethod(BottleneckConfig(**{"size": 3, "placement": placement, **arguments}))


def randomize(model):
    """Give every bottleneck an update that is not zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bottleneck." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(placement, trained=True, **arguments):
    model = models.net()
    method(placement, **arguments).complete(model)
    return randomize(model) if trained else model


def update(b, x):
    """Written out, as in the paper."""
    if b.norm is not None:
        x = F.layer_norm(x, (16,), b.norm, b.norm_bias)
    return b.scale * (torch.relu(x @ b.down.T + b.down_bias) @ b.up.T + b.up_bias)


def after(layer, y):
    b = getattr(layer, "bottleneck", None)
    return y if b is None else y + update(b, y)


def by_hand(model, placement, x):
    """The network of ``models.Net`` with its bottlenecks, written out."""
    for block in model.layers:
        h = block.ln(x)
        attention = F.linear(torch.tanh(block.q(h) * block.k(h)) + block.v(h), block.o.weight, block.o.bias)
        inner = x + after(block.o, attention)
        mlp = F.linear(h, block.mlp.weight, block.mlp.bias)
        mlp = mlp + update(block.mlp.bottleneck, h) if placement == "parallel" else after(block.mlp, mlp)
        x = after(block, inner + torch.relu(mlp))
    return model.head(x)


@every_placement
def test_the_start_is_the_base_bit_for_bit(placement):
    model, base = adapted(placement, trained=False), models.net()
    assert torch.equal(model(X), base(X))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, _ in method(placement).added_parameters(model)]
    model(X).sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith(".up"))


@every_placement
def test_formula(placement):
    model, x = adapted(placement, activation="relu", scale=4.0).double(), X.double()
    for parameter in model.parameters():
        parameter.data = parameter.double()
    torch.testing.assert_close(model(x), by_hand(model, placement, x))
    assert not torch.allclose(model(x), models.net().double()(x))


def test_names_of_parameters():
    model = models.net()
    assert method("block").complete(model) == ["layers.0", "layers.1"]
    names = [name for name, _ in method("block").added_parameters(model)]
    keys = ["down", "down_bias", "up", "up_bias", "norm", "norm_bias"]
    assert names == [f"layers.{number}.bottleneck.{key}" for number in range(2) for key in keys]


@every_placement
def test_remove(placement):
    model, base = adapted(placement), models.net()
    method(placement).remove(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(X), base(X))


@every_placement
def test_again_adds_nothing(placement):
    model = adapted(placement)
    before, state = model(X), copy.deepcopy(model.state_dict())
    method(placement).complete(model)
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(model(X), before)


@every_placement
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(placement, copied):
    model = adapted(placement)
    other = copied(model)
    assert torch.equal(other(X), model(X))
    randomize(model)
    assert not torch.equal(other(X), model(X))
    assert [name for name, _ in adapted_modules(other)] == [name for name, _ in adapted_modules(model)]


@every_placement
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_give_the_same_gradients(placement, reentrant):
    model, plain = adapted(placement), adapted(placement)
    x = X.clone().requires_grad_()
    for block in model.layers:
        x = checkpoint(block, x, use_reentrant=reentrant)
    model.head(x).sum().backward()
    plain(X).sum().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (model, plain)]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.slow
@every_placement
def test_compiled_in_one_graph(placement):
    model = adapted(placement)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))
    compiled(X).sum().backward()
    model(X).sum().backward()
    for (_, ours), (_, theirs) in zip(model.named_parameters(), compiled.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def encoder(norm_first=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2)


PADDING = torch.tensor([[False] * 4, [False] * 2 + [True] * 2])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@every_placement
def test_torch_transformer_in_evaluation_is_that_of_training(placement):
    """The fast path of evaluation reads weights and calls no layer; the model has no dropout but by its mode."""
    model, base, x = encoder(), encoder(), X.view(1, 4, 16).repeat(2, 1, 1)
    names = method(placement).complete(model)
    assert len(names) == (4 if placement == "houlsby" else 2)
    with torch.no_grad():
        for arguments in ({}, {"src_key_padding_mask": PADDING}):
            kept = slice(0, 2) if arguments else slice(None)  # a nested tensor gives zeros for padding
            ours, theirs = (m.eval()(x, **arguments)[:, kept] for m in (model, base))
            torch.testing.assert_close(ours, theirs)
        randomize(model)
        without_gradients = model(x, src_key_padding_mask=PADDING)[:, :2]
        assert not torch.allclose(without_gradients, theirs, atol=1e-3)
    with_gradients = model(x, src_key_padding_mask=PADDING)[:, :2]  # torch takes no fast path with gradients
    torch.testing.assert_close(without_gradients, with_gradients)


def test_attention_of_torch():
    """``out_proj`` is never called, so the bottleneck acts on the output of attention, whatever else it returns."""
    model, x = encoder(), X.view(1, 4, 16)
    method("houlsby").complete(model)
    attention = randomize(model).layers[0].self_attn
    output, weights = attention(x, x, x)
    plain = copy.deepcopy(encoder().layers[0].self_attn)
    expected, expected_weights = plain(x, x, x)
    torch.testing.assert_close(output, expected + attention.bottleneck.update(expected))
    torch.testing.assert_close(weights, expected_weights)


def test_a_module_that_cannot_be_swapped():
    model = models.net()
    model.layers[0].mlp.bottleneck = None
    with pytest.raises(ValueError, match=r"`layers.0.mlp` has an attribute `bottleneck` of its own, where the adapter"):
        method("pfeiffer").complete(model)
    assert method("pfeiffer", exclude=["layers.0.mlp"]).complete(model) == ["layers.1.mlp"]


def test_it_cannot_be_merged():
    model = adapted("houlsby")
    assert "cannot be merged" in method().never_merges(model)
    with pytest.raises(ValueError, match="`bottleneck` cannot be merged into the weights"):
        method().merge(model)


def test_another_configuration_is_refused():
    model = adapted("houlsby")
    with pytest.raises(ValueError, match=r"asks for `size=3` instead of `size=4`|`size=4` instead of `size=3`"):
        method(size=4).check_same(model)


@every_placement
def test_a_copy_that_comes_in_later_is_made_plain(placement):
    model = adapted(placement, trained=False)
    known = list(model.modules())
    model.teacher = copy.deepcopy(model.layers)
    assert method(placement).make_plain(model, known) == ["teacher"]
    assert not list(adapted_modules(model.teacher))
    method(placement).complete(model)
    assert not list(adapted_modules(model.teacher))
    assert torch.equal(model.teacher(X), models.net().layers(X))
