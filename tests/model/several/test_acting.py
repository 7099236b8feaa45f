"""``use_adapters``: one adapter, several with weights, none, or one for each sample of the batch."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    disable_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
    unmerge_lora,
    use_adapters,
)

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
RANKS = {"fr": 2, "de": 3}
MIXED = ["fr", "de", None, "fr", {"fr": 0.5, "de": -1.0}]


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def several(*, rslora=False):
    model = base()
    for name, r in RANKS.items():
        apply_lora(model, LoRAConfig(r=r, alpha=5, rslora=rslora, targets="all", name=name))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in lora_parameters(model):
        if name.endswith("B"):
            nn.init.normal_(parameter, generator=generator)
    return model


def written_out(model, x, weights, dtype=torch.float64):
    """``W + scale * c * B @ A`` of one sample, in fp64."""
    for place, layer in ((0, model[0]), (2, model[2])):
        W = layer.weight.detach().to(dtype)
        for name, c in weights.items():
            pair = layer.lora[name]
            W = W + c * (5 / pair.r) * pair.B.detach().to(dtype) @ pair.A.detach().to(dtype)
        x = F.linear(x.to(dtype), W, layer.bias.detach().to(dtype))
        x = x.relu() if place == 0 else x
    return x


@pytest.mark.parametrize(
    ("chosen", "weights"),
    [("fr", {"fr": 1}), ({"fr": 0.7, "de": 0.3}, {"fr": 0.7, "de": 0.3}), (None, {}), ({"de": -2}, {"de": -2})],
)
def test_a_choice_for_the_whole_batch(chosen, weights):
    model = several()
    with use_adapters(model, chosen):
        y = model(X)
    torch.testing.assert_close(y.double(), written_out(model, X, weights), atol=1e-5, rtol=1e-5)


def test_a_choice_for_each_sample_gives_what_the_sample_gives_alone():
    model = several()
    with use_adapters(model, MIXED):
        y = model(X)
    for row, chosen in enumerate(MIXED):
        weights = {} if chosen is None else {chosen: 1} if isinstance(chosen, str) else chosen
        torch.testing.assert_close(y[row].double(), written_out(model, X[row], weights), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(RANKS))
def test_one_chosen_adapter_has_the_bits_of_that_adapter_alone(name):
    model, alone = several(), several()
    remove_lora(alone, name=next(other for other in RANKS if other != name))
    with use_adapters(model, name):
        assert torch.equal(model(X), alone(X))
    with use_adapters(model, [name] * len(X)):
        assert torch.equal(model(X), alone(X))


def test_none_has_the_bits_of_the_base():
    model = several()
    with torch.no_grad():
        model[0].lora.fr.A.fill_(float("nan"))
    with use_adapters(model, None):
        assert torch.equal(model(X), base()(X))


def test_blocks_nest_and_an_error_leaves_the_choice_as_it_was():
    model = several()
    before = model(X)
    with use_adapters(model, "fr"):
        fr = model(X)
        with pytest.raises(RuntimeError), use_adapters(model, None):
            raise RuntimeError
        with use_adapters(model[2], None):
            part = model(X)
        assert torch.equal(model(X), fr)
    assert torch.equal(model(X), before)
    with use_adapters(model, "fr"):
        hidden = model[0](X).relu()
    assert torch.equal(part, F.linear(hidden, model[2].weight, model[2].bias))


def test_threads_choose_for_themselves():
    model, given, barrier = several(), {}, threading.Barrier(2)

    def run(name):
        with use_adapters(model, name):
            barrier.wait()
            given[name] = [model(X) for _ in range(50)]
            barrier.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in RANKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in RANKS:
        with use_adapters(model, name):
            assert all(torch.equal(y, model(X)) for y in given[name])


def test_what_no_sample_used_gets_no_gradient():
    model = several()
    with use_adapters(model, ["fr", None, None, "fr", "fr"]):
        model(X).sum().backward()
    assert all(parameter.grad is None for _, parameter in lora_parameters(model, name="de"))
    assert all(parameter.grad is not None for _, parameter in lora_parameters(model, name="fr"))


def gradients(model):
    return {name: parameter.grad for name, parameter in lora_parameters(model)}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_choice_of_the_forward(reentrant):
    """Three forwards with three choices, backward after all of them: gradients as without checkpointing."""
    found = []
    for call in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=reentrant)):
        model, x = several(), X.clone().requires_grad_()
        with use_adapters(model, "fr"):
            first = call(model, x)
        with use_adapters(model, MIXED):
            second = call(model, x)
        third = call(model, x)
        with use_adapters(model, None):  # backward inside of another block
            (first.square().sum() + 2 * second.square().sum() + 3 * third.square().sum()).backward()
        found.append({**gradients(model), "x": x.grad})
    for name, expected in found[0].items():  # a reentrant checkpoint adds the three up in another order
        torch.testing.assert_close(
            found[1][name], expected, atol=1e-6 if reentrant else 0, rtol=1e-6 if reentrant else 0
        )


@pytest.mark.slow
def test_one_compiled_graph_serves_every_choice():
    model, graphs = several(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X), atol=1e-5, rtol=1e-5)
    for chosen in ("fr", "de", None, {"fr": 0.5, "de": 0.2}, MIXED, ["fr"] * 5):
        with use_adapters(model, chosen):
            torch.testing.assert_close(compiled(X), model(X), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled(X), model(X), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
    with use_adapters(model, MIXED[:3]):
        assert compiled(X).isnan().all(), "a batch of another size"


def test_the_strength_of_a_single_adapter():
    model = base()
    apply_lora(model, LoRAConfig(r=2, targets="all"))
    nn.init.ones_(model[0].lora.default.B)
    full = model(X)
    with use_adapters(model, {"default": 1.0}):
        assert torch.equal(model(X), full)
    with use_adapters(model, {"default": 0.5}):
        half = model(X)
    W = model[0].weight + 0.5 * model[0].lora.default.B @ model[0].lora.default.A
    expected = F.linear(F.linear(X, W, model[0].bias).relu(), model[2].weight, model[2].bias)
    torch.testing.assert_close(half, expected)


def test_a_base_inside_disable_lora_whatever_is_chosen():
    model = several()
    with use_adapters(model, "fr"), disable_lora(model):
        assert torch.equal(model(X), base()(X))


def test_a_copy_made_inside_acts_by_default():
    model = several()
    with use_adapters(model, "fr"):
        copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))


def test_recurrent_layers_take_one_choice_for_the_batch():
    model = nn.LSTM(6, 4, batch_first=True)
    for name in RANKS:
        apply_lora(model, LoRAConfig(r=2, targets=["*"], name=name))
    x = X.unsqueeze(1)
    with use_adapters(model, "fr"):
        model(x)
    words, mixed = "computes with its weight, which is one for the whole batch", ["fr", "de", None, None, "fr"]
    with pytest.raises(ValueError, match=words), use_adapters(model, mixed):
        model(x)


@pytest.mark.parametrize(
    ("chosen", "error", "words"),
    [
        ("frr", ValueError, r"`adapters` has 'frr', which is no adapter of the model. It has `fr`"),
        (["fr", "xx"], ValueError, "`adapters` has 'xx'"),
        ({"fr": "much"}, TypeError, "must be a name, a dict from names to numbers, None, or a list of these"),
        (3, TypeError, "must be a name"),
        ([], ValueError, "one entry for each sample of the batch, but got an empty list"),
        (["fr"] * 4, ValueError, r"by 4 entries .* one for each row, but `0` gets an input of shape \(5, 6\)"),
    ],
)
def test_what_is_no_choice(chosen, error, words):
    model = several()
    with pytest.raises(error, match=words), use_adapters(model, chosen):
        model(X)


def test_without_live_adapters_there_is_nothing_to_choose():
    with (
        pytest.raises(ValueError, match="no adapters to choose from: call `apply_lora` first"),
        use_adapters(base(), None),
    ):
        pass
    model = several()
    merge_lora(model)
    with (
        pytest.raises(ValueError, match=r"call `unmerge_lora\(model\)` before `use_adapters`"),
        use_adapters(model, "fr"),
    ):
        pass


def test_a_merge_with_weights_and_its_undoing():
    model = several(rslora=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with use_adapters(model, {"fr": 1.0, "de": 0.5}):
        expected = model(X)
    merge_lora(model, {"fr": 1.0, "de": 0.5})
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    assert type(model[0]) is nn.Linear
    merge_lora(model, {"de": 1.0})
    merged = model[0].weight.detach().clone()
    unmerge_lora(model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    pair = model[0].lora.de
    torch.testing.assert_close(merged, model[0].weight + pair.scale * pair.B @ pair.A)
    with pytest.raises(ValueError, match=r"`weights` must be the name of an adapter, but got 'es'"):
        merge_lora(model, {"es": 1.0})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", ["de", None, MIXED])
def test_one_checkpoint_around_two_choices(reentrant, inside):
    """The choice around it, which no block inside repeats, and the one of a block inside."""

    def distance(model, x):
        first = model(x)
        with use_adapters(model, inside):
            return (first - 2 * model(x)).square().sum()

    for outside in (None, "fr"):
        found = []
        for call in (distance, lambda model, x: checkpoint(distance, model, x, use_reentrant=reentrant)):
            model, x = several(), X.clone().requires_grad_()
            if outside is None:
                loss = call(model, x)
            else:
                with use_adapters(model, outside):
                    loss = call(model, x)
            loss.backward()
            found.append({**gradients(model), "x": x.grad})
        for name, expected in found[0].items():
            assert (found[1][name] is None) is (expected is None), name
            if expected is not None:
                torch.testing.assert_close(found[1][name], expected, atol=1e-6, rtol=1e-6)


def test_a_choice_that_began_without_gradients_is_repeated_too():
    found = []
    for call in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=True)):
        model, x = several(), X.clone().requires_grad_()
        with torch.no_grad():
            block = use_adapters(model, "fr")
            block.__enter__()
        y = call(model, x)
        block.__exit__(None, None, None)
        y.square().sum().backward()
        found.append(gradients(model))
    assert all((a is None) is (b is None) for a, b in zip(found[0].values(), found[1].values(), strict=True))
    assert found[1]["0.lora.de.B"] is None


def test_a_forward_in_inference_mode_before_one_with_gradients():
    model = several()
    with use_adapters(model, MIXED):
        with torch.inference_mode():
            expected = model(X)
        y = model(X)
        y.sum().backward()
    torch.testing.assert_close(y, expected)


@pytest.mark.slow
def test_in_a_compiled_copy_resting_adapters_rest():
    model = several()
    for layer in (model[0], model[2]):
        layer.lora.strengths = {"fr": 0.0}
        layer.lora.prepare_choices()
    copied = copy.deepcopy(model)
    compiled = torch.compile(copied, backend="eager")
    torch.testing.assert_close(compiled(X), model(X), atol=1e-5, rtol=1e-5)


def test_a_list_of_another_length_is_refused_where_nobody_chooses_an_adapter():
    model = several()
    with pytest.raises(ValueError, match="chosen by 4 entries"), use_adapters(model, [None] * 4):
        model(X)
