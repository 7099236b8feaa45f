"""Task embeddings against their formula, and whose segments a call takes."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from lightning_lora import BottleneckConfig, adapt, remove_adapted, use_segments
from lightning_lora.methods.bottleneck.segments import acting_in
from tests.helpers.models import Encoder

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))  # five samples of four tokens
TOKENS = torch.tensor([[0, 0, 1, 2], [2, 2, 2, 2], [0, 1, 0, 1], [1, 1, 0, 0], [2, 0, 2, 0]])
SAMPLES = torch.tensor([2, 0, 1, 1, 0])
CONFIG = BottleneckConfig(size=3, placement="block", segment_count=3)


def encoder(config=CONFIG, trained=True, **arguments):
    """The same model every time, with bottlenecks in which nothing is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Encoder(**arguments).eval()
        if config is not None:
            adapt(model, config)
        for name, parameter in model.named_parameters():
            if "bottleneck" in name and trained:
                parameter.data.add_(torch.randn(parameter.shape))
    return model


def by_hand(model, index):
    """The encoder with its bottlenecks, written out; `index` has a number for each token."""
    x = model.embed(X.view(-1, 4, 4))
    for layer in model.layers:
        x = x + layer.attn(layer.norm1(x))
        x = x + layer.mlp(layer.norm2(x))
        b = layer.bottleneck
        inner = F.layer_norm(x + b.segment_embedding[index], (16,), b.norm, b.norm_bias)
        x = x + F.gelu(inner @ b.down.T + b.down_bias) @ b.up.T + b.up_bias
    return model.head(model.bn(x.mean(1)))


def transformer():
    """An adapted layer of torch's, in which nothing is zero."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    adapt(nn.ModuleDict({"layers": nn.ModuleList([layer])}), CONFIG)
    with torch.no_grad():
        for parameter in layer.bottleneck.parameters():
            parameter.add_(torch.randn(parameter.shape))
    return layer


@pytest.mark.parametrize(
    ("index", "of_tokens"),
    [
        (TOKENS, TOKENS),
        (TOKENS.tolist(), TOKENS),
        (SAMPLES.int(), SAMPLES[:, None].expand(5, 4)),
        (2, torch.full((5, 4), 2)),
    ],
    ids=["tokens", "lists", "samples", "batch"],
)
def test_the_embedding_of_its_segment_is_added_to_each_token(index, of_tokens):
    model = encoder()
    with use_segments(model, index):
        y = model(X)
    torch.testing.assert_close(y, by_hand(model, of_tokens))


def test_without_segments_nothing_is_added():
    model, plain = encoder(), encoder(BottleneckConfig(size=3, placement="block"))
    state = {name: value for name, value in model.state_dict().items() if "segment" not in name}
    plain.load_state_dict(state)
    with use_segments(model, None):
        assert torch.equal(model(X), plain(X))


def test_the_start_is_the_base():
    model = encoder(trained=False)
    with use_segments(model, TOKENS):
        assert torch.equal(model(X), encoder(None)(X))
    assert {p.shape for name, p in model.named_parameters() if name.endswith("segment_embedding")} == {(3, 16)}
    remove_adapted(model)
    assert torch.equal(model(X), encoder(None)(X))


def test_features_may_be_the_second_dimension():
    layer, x = transformer(), torch.randn(2, 8, 3)
    with use_segments(layer, [[0, 1, 2], [2, 2, 1]]):
        expected = layer.bottleneck(x.mT)
        layer.bottleneck.channel_dim = 1
        torch.testing.assert_close(layer.bottleneck(x).mT, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing_the_second_forward_has_the_segments_of_the_first(use_reentrant):
    gradients = []
    for checkpointed in (None, use_reentrant):
        model = encoder(checkpointed=checkpointed)
        with use_segments(model, TOKENS):
            first = model(X)
        with use_segments(model, SAMPLES):
            second = model(X)
            first.square().sum().backward()  # while others hold
        second.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(bool(g.any()) for g in gradients[0])


def test_blocks_nest_and_an_error_restores_them():
    model = encoder()
    with use_segments(model, TOKENS):
        expected = model(X)
        with pytest.raises(KeyError), use_segments(model, SAMPLES):
            raise KeyError
        assert torch.equal(model(X), expected)
    with pytest.raises(RuntimeError, match="no segments"):
        model(X)


def test_each_thread_has_its_own():
    model, outputs = encoder(), {}

    def run(name, index):
        with use_segments(model, index):
            outputs[name] = model(X)

    with use_segments(model, TOKENS):
        thread = threading.Thread(target=run, args=("other", SAMPLES))
        thread.start()
        thread.join()
        run("this", TOKENS)
    torch.testing.assert_close(outputs["other"], by_hand(model, SAMPLES[:, None].expand(5, 4)))
    torch.testing.assert_close(outputs["this"], by_hand(model, TOKENS))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_segments_of_its_own(make):
    model = encoder()
    with use_segments(model, SAMPLES):
        other = make(model)
        with use_segments(other, TOKENS):
            y = other(X)
        with pytest.raises(RuntimeError, match="no segments"):
            other(X)
    torch.testing.assert_close(y, by_hand(model, TOKENS))


def test_adapting_again_keeps_the_segments_that_hold():
    model = encoder()
    with use_segments(model, TOKENS):
        expected = model(X)
        adapt(model, CONFIG)
        assert torch.equal(model(X), expected)


@pytest.mark.slow
def test_other_segments_need_no_new_graph():
    layer, counter = transformer(), CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(5, 4, 8)
    for index in (TOKENS, TOKENS.flip(0), 2 - TOKENS):
        with use_segments(layer, index):
            torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_a_call_without_segments_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"`layers.0` has task embeddings, and this call has no segments. Call the"):
        encoder()(X)


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        ([0, 1, 2, 3, 0], ValueError, r"from 0 to 2 \(`segment_count=3`\), but got 3"),
        (-1, ValueError, "but got -1"),
        (torch.zeros(5), TypeError, "Segments must be integers, but got torch.float32"),
        ([True] * 5, TypeError, "Segments must be integers, but got torch.bool"),
        ("fr", TypeError, "Segments must be integers in one tensor or nested lists, but got 'fr'"),
    ],
)
def test_wrong_segments(index, error, words):
    model = encoder()
    with pytest.raises(error, match=words), use_segments(model, index):
        pass
    assert acting_in(model).choice is None


@pytest.mark.parametrize("shape", [(4,), (5, 3), (4, 5), (5, 4, 1)])
def test_segments_that_do_not_fit_the_input(shape):
    model = encoder()
    words = r"`layers.0` gets an input of shape \(5, 4, 16\), and the segments have shape"
    with pytest.raises(ValueError, match=words), use_segments(model, torch.zeros(shape, dtype=torch.int64)):
        model(X)


def test_a_batch_that_may_be_either_dimension_is_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    adapt(model, CONFIG)
    with use_segments(model, torch.zeros(3, 4, dtype=torch.int64)):
        layer(torch.ones(3, 4, 8))
    with pytest.raises(ValueError, match="so either dimension may be the batch"), use_segments(model, [0, 1, 2]):
        layer(torch.ones(3, 3, 8))


def test_a_model_without_task_embeddings():
    for model in (encoder(None), encoder(BottleneckConfig(size=3, placement="block"))):
        with pytest.raises(ValueError, match="`model` has no task embeddings"), use_segments(model, 0):
            pass
