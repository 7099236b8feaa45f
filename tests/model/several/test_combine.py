"""`combine_adapters`: the sum of deltas written out in fp64, on every kind of layer, and what the verb leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    combine_adapters,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
    use_adapters,
)
from lightning_lora.model.record import configs_of
from tests.helpers.interrupts import state_of
from tests.helpers.layer_cases import Subject
from tests.helpers.models import EveryKind, FusedBlocks, net
from tests.helpers.oracles import assert_close, assert_same_values, same_bits, snapshot, train_by_hand

KINDS_OF_LAYERS = [
    "linear",
    "hf-conv1d",
    "embedding-padding",
    "conv2d-circular",
    "transposed-conv-1d-groups",
    "embedding-bag-max",
    "bilinear-batch",
    "attention-self",
    "recurrent-lstm",
    "parameter-matrices",
    "parameter-transposed",
]
WEIGHTS = {"fr": 0.7, "de": -0.4}
X = torch.linspace(-1, 1, 64).view(4, 16)


def add(model, name, **arguments):
    """Another adapter, with values as after some training."""
    apply_lora(model, LoRAConfig(**({"r": 2, "targets": "all", "name": name} | arguments)))
    train_by_hand(model)
    return model


def two_adapters():
    """Of different ranks, scales and targets: one layer has only the first, one only the second."""
    model = net()
    add(model, "fr", r=2, alpha=6.0, targets=["q", "mlp", "0.v"])
    return add(model, "de", r=4, alpha=3.0, rslora=True, targets=["q", "mlp", "1.v"])


def deltas(model, layer, weights, scales):
    """The update of each adapter of a linear layer, written out in fp64."""
    values = {name: parameter.detach().double() for name, parameter in lora_parameters(model)}
    return [
        weight * scales[name] * values[f"{layer}.lora.{name}.B"] @ values[f"{layer}.lora.{name}.A"]
        for name, weight in weights.items()
        if f"{layer}.lora.{name}.A" in values
    ]


SCALES = {"fr": 3.0, "de": 1.5}
LAYERS = [f"layers.{block}.{key}" for block in (0, 1) for key in ("q", "mlp", "v")]


def delta_of(model, layer, name="mix"):
    pair = model.get_submodule(layer).lora[name]
    assert pair.scale == 1.0
    return pair.B.detach().double() @ pair.A.detach().double()


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("case", KINDS_OF_LAYERS)
def test_every_kind_of_layer(case, kind):
    subject = Subject(case)
    targets = [subject.case.targets] if isinstance(subject.case.targets, str) else subject.case.targets
    add(subject.model, "fr", alpha=4.0, targets=targets)
    add(subject.model, "de", r=3, alpha=9.0, rslora=True, targets=targets)
    values = {name: parameter.detach().double() for name, parameter in lora_parameters(subject.model)}
    expected = copy.deepcopy(subject.plain).double()
    for name, weight, scale in (("fr", 0.7, 2.0), ("de", -0.4, 9 / 3**0.5)):
        for key, matrix in subject.matrices.items():
            A, B = (values[f"layer.{key.replace('default', name)}.{side}"] for side in "AB")
            with torch.no_grad():
                delta = weight * scale * B @ A
                expected.get_parameter(matrix.parameter).add_(matrix.place(delta))
    lost = combine_adapters(subject.model, WEIGHTS, "mix", kind, r=5 if kind == "svd" else None)
    assert max(lost.values()) < 1e-6
    merge_lora(subject.model)
    for key, value in expected.named_parameters():
        assert_close(subject.layer.get_parameter(key), value, torch.float32)


@pytest.mark.parametrize("kind", ["cat", "svd", "ties", "dare"])
def test_the_padding_index_has_no_update(kind):
    model = nn.Sequential(nn.Embedding(100, 64, padding_idx=5))
    for name in WEIGHTS:
        add(model, name, targets=["0"])
    combine_adapters(model, WEIGHTS, "mix", kind)
    assert not bool(model[0].lora["mix"].A[:, 5].any())


def test_ranks_scales_and_targets_may_differ():
    model = two_adapters()
    expected = {layer: sum(deltas(model, layer, WEIGHTS, SCALES)) for layer in LAYERS}
    combine_adapters(model, WEIGHTS, "mix")
    for layer in LAYERS:
        assert_close(delta_of(model, layer), expected[layer], torch.float32)
    ranks = {layer: model.get_submodule(layer).lora["mix"].r for layer in LAYERS}
    assert list(ranks.values()) == [6, 6, 2, 6, 6, 4]


def test_svd_is_the_nearest_of_its_rank():
    model = two_adapters()
    expected = {layer: torch.linalg.svd(sum(deltas(model, layer, WEIGHTS, SCALES))) for layer in LAYERS}
    lost = combine_adapters(model, WEIGHTS, "mix", "svd", r=3)
    for layer, (U, S, V) in expected.items():
        assert_close(delta_of(model, layer), (U[:, :3] * S[:3]) @ V[:3], torch.float32)
        assert lost[layer] == pytest.approx(float(S[3:].norm() / S.norm()), abs=1e-6)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_it_is_what_peft_combines(kind):
    peft = pytest.importorskip("peft")
    ours, config = net(), {"target_modules": ["q", "mlp"]}
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, lora_alpha=6, **config), adapter_name="fr")
    theirs.add_adapter("de", peft.LoraConfig(r=3, lora_alpha=3, **config))
    add(ours, "fr", r=2, alpha=6.0, targets=["q", "mlp"])
    add(ours, "de", r=3, alpha=3.0, targets=["q", "mlp"])
    for name, layer in ours.named_modules():
        for adapter, pair in getattr(layer, "lora", {}).items():
            their_layer = theirs.base_model.model.get_submodule(name)
            their_layer.lora_A[adapter].weight.data = pair.A.detach().clone()
            their_layer.lora_B[adapter].weight.data = pair.B.detach().clone()
    rank = {} if kind == "cat" else {"svd_rank": 3}
    theirs.add_weighted_adapter(["fr", "de"], [0.7, 0.4], "mix", combination_type=kind, **rank)
    theirs.set_adapter("mix")
    combine_adapters(ours, {"fr": 0.7, "de": 0.4}, "mix", kind, r=rank.get("svd_rank"))
    assert_close(ours(X), theirs(X), torch.float32)


@pytest.mark.parametrize(("kind", "r"), [("svd", None), ("ties", None), ("dare", 5)])
def test_the_rank(kind, r):
    model = two_adapters()
    combine_adapters(model, WEIGHTS, "mix", kind, r=r)
    ranks = [model.get_submodule(layer).lora["mix"].r for layer in LAYERS]
    assert ranks == ([4, 4, 2, 4, 4, 4] if r is None else [r] * 6)


def test_ties_weighs_each_update_before_signs_are_elected():
    model = two_adapters()
    updates = deltas(model, "layers.0.q", {"fr": 1.0, "de": -2.0}, SCALES)
    combine_adapters(model, {"fr": 1.0, "de": -2.0}, "mix", "ties", r=16, density=0.25)
    kept = [torch.where(delta.abs() >= delta.abs().flatten().sort().values[-64], delta, 0.0) for delta in updates]
    sign = sum(kept).sign()
    agreeing = [torch.where(delta.sign() == sign, delta, 0.0) for delta in kept]
    expected = sum(agreeing) / sum((delta != 0).double() for delta in agreeing).clamp(min=1)
    assert_close(delta_of(model, "layers.0.q"), expected, torch.float32)


def test_dare_drops_the_same_elements_with_the_same_seed():
    def mixed(seed):
        model = two_adapters()
        combine_adapters(model, WEIGHTS, "mix", "dare", r=16, density=0.5, seed=seed)
        return model, delta_of(model, "layers.0.q")

    (model, delta), (_, again), (_, other) = mixed(0), mixed(0), mixed(1)
    assert torch.equal(delta, again)
    assert not torch.allclose(delta, other)
    parts = [2 * part for part in deltas(model, "layers.0.q", WEIGHTS, SCALES)]
    choices = torch.stack([torch.zeros_like(delta), *parts, sum(parts)])  # each update is dropped, or doubled
    assert float((choices - delta).abs().min(0).values.max()) < 1e-5


def test_the_combination_acts_alone_until_others_are_chosen():
    model = two_adapters()
    with use_adapters(model, WEIGHTS):
        expected = model(X)
    with use_adapters(model, "fr"):
        french = model(X)
    combine_adapters(model, WEIGHTS, "mix")
    assert_close(model(X), expected, torch.float32)
    with use_adapters(model, "fr"):
        assert same_bits(model(X), french)
    with use_adapters(model, None):
        assert same_bits(model(X), net()(X))


def test_a_second_combination_acts_alone_too():
    model = two_adapters()
    combine_adapters(model, WEIGHTS, "mix")
    combine_adapters(model, {"mix": 2.0, "fr": 1.0}, "more")
    with use_adapters(model, {"mix": 2.0, "fr": 1.0}):
        expected = model(X)
    assert_close(model(X), expected, torch.float32)


def test_the_combination_stays_when_its_sources_go():
    model = two_adapters()
    combine_adapters(model, WEIGHTS, "mix")
    expected = model(X)
    remove_lora(model, name="fr")
    remove_lora(model, name="de")
    assert_close(model(X), expected, torch.float32)


def test_it_can_be_merged_and_unmerged():
    model = two_adapters()
    before = snapshot(model)
    combine_adapters(model, WEIGHTS, "mix")
    expected = model(X)
    merge_lora(model)
    assert_close(model(X), expected, torch.float32)
    unmerge_lora(model)
    remove_lora(model, name="mix")
    assert_same_values(model, before)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_its_configuration_makes_the_same_adapter_again(kind):
    model = two_adapters()
    combine_adapters(model, WEIGHTS, "mix", kind)
    expected = model(X)
    remove_lora(model, name="fr")
    remove_lora(model, name="de")
    fresh = net()
    apply_lora(fresh, LoRAConfig(**configs_of(model)["mix"].to_dict()))
    load_lora_state_dict(fresh, lora_state_dict(model))
    assert same_bits(fresh(X), model(X))
    assert_close(fresh(X), expected, torch.float32)


def test_a_preset_that_all_have_stays_in_the_configuration():
    model = net()
    for name in ("fr", "de"):
        add(model, name, r=4, targets="attn", dropout=0.1, also_train=["head"])
    combine_adapters(model, WEIGHTS, "mix", "svd")
    assert configs_of(model)["mix"] == LoRAConfig(r=4, targets="attn", name="mix", dropout=0.1, also_train=["head"])


def test_what_trains_in_addition_is_named_where_the_sources_differ():
    model = net()
    add(model, "fr", targets=["q"], also_train=["head"])
    add(model, "de", targets=["k"], bias="lora_only")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    combine_adapters(model, WEIGHTS, "mix")
    now = {name for name, parameter in model.named_parameters() if parameter.requires_grad and ".mix." not in name}
    assert now == trained
    fresh = net()
    apply_lora(fresh, configs_of(model)["mix"])
    assert {name for name, p in fresh.named_parameters() if p.requires_grad and "lora" not in name} == {
        name for name in trained if "lora" not in name
    }


@pytest.mark.parametrize("first", [["qkv"], ["qkv.q", "qkv.v"]])
def test_slices_of_a_fused_projection(first):
    model = FusedBlocks()
    add(model, "fr", targets=first, alpha=4.0)
    add(model, "de", targets=["qkv.k", "qkv.v"])
    x = torch.linspace(-1, 1, 24).view(2, 3, 4)
    with use_adapters(model, WEIGHTS):
        expected = model(x)
    combine_adapters(model, WEIGHTS, "mix")
    assert_close(model(x), expected, torch.float32)
    whole = isinstance(model.blocks[0].qkv.lora["mix"], nn.ModuleDict) or hasattr(model.blocks[0].qkv.lora["mix"], "A")
    assert whole == (first == ["qkv"])


def test_rank_that_is_not_needed_can_still_train():
    model = add(nn.Sequential(nn.Linear(3, 5)), "fr", r=1)
    combine_adapters(model, {"fr": 1.0}, "mix", "svd", r=4)
    model(torch.ones(2, 3)).square().sum().backward()
    pair = model[0].lora["mix"]
    assert bool((pair.A.grad.any(1) | pair.B.grad.any(0)).all())


def test_the_model_itself_may_be_the_layer():
    model = nn.Linear(4, 2)
    add(model, "fr")
    add(model, "de", targets=["re:.*"])
    x = torch.ones(3, 4)
    with use_adapters(model, WEIGHTS):
        expected = model(x)
    combine_adapters(model, WEIGHTS, "mix")
    assert_close(model(x), expected, torch.float32)


def test_every_kind_of_layer_in_one_model():
    model = EveryKind().eval()
    add(model, "fr", targets=["conv", "rnn", "attention", "fc", "positions"])
    add(model, "de", r=3, targets=["rnn.weight_hh_l0", "attention.q", "fc", "embedding"])
    index = torch.tensor([[0, 1, 5]])
    with use_adapters(model, WEIGHTS):
        expected = model(index)
    combine_adapters(model, WEIGHTS, "mix")
    for value, wanted in zip(model(index), expected, strict=True):
        assert_close(value, wanted, torch.float32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": {"it": 1.0}}, "`weights` must be the name of an adapter, but got 'it'. The model has"),
        ({"weights": {}}, "`weights` must name at least one adapter"),
        ({"weights": {"fr": float("nan")}}, r"`weights\['fr'\]` must be finite, but got nan"),
        ({"name": "fr"}, "`name` must be that of a new adapter, but the model has 'fr' already"),
        ({"name": "a b"}, "`name` must be a Python identifier"),
        ({"kind": "linear"}, "`kind` must be one of 'cat', 'svd', 'ties', 'dare', but got 'linear'"),
        ({"kind": "svd", "r": 0}, "`r` must be at least 1, but got 0"),
        ({"r": 4}, "`r` must be None with kind='cat', whose rank is the sum of the ranks, but got 4"),
        ({"kind": "ties", "density": 0}, r"`density` must be a share of elements in \(0, 1\], but got 0"),
        ({"kind": "dare", "density": 1.5}, r"`density` must be a share of elements in \(0, 1\], but got 1.5"),
    ],
)
def test_refused_arguments(arguments, words):
    model = two_adapters()
    before = state_of(model)
    with pytest.raises(ValueError, match=words):
        combine_adapters(**({"model": model, "weights": WEIGHTS, "name": "mix"} | arguments))
    assert state_of(model) == before


@pytest.mark.parametrize("weights", ["fr", {"fr": "1"}, {"fr": True}])
def test_weights_of_another_type(weights):
    with pytest.raises(TypeError, match="`weights"):
        combine_adapters(two_adapters(), weights, "mix")


def test_refused_models():
    with pytest.raises(ValueError, match="The model has no adapters: call `apply_lora` first"):
        combine_adapters(net(), WEIGHTS, "mix")
    model = two_adapters()
    with pytest.raises(ValueError, match=r"`model` must be the module that `apply_lora` was called with"):
        combine_adapters(model.layers, WEIGHTS, "mix")
    merge_lora(model)
    with pytest.raises(ValueError, match=r"merged into the model: call `unmerge_lora\(model\)` before"):
        combine_adapters(model, WEIGHTS, "mix")
    sharded = two_adapters()
    sharded.layers[1].mlp.lora["de"].A._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"The adapters of `layers.1.mlp` are sharded over processes. Save them, load"):
        combine_adapters(sharded, WEIGHTS, "mix")
    diverged = two_adapters()
    diverged.layers[0].q.lora["fr"].B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"The adapters of `layers.0.q` hold NaN or infinity: the training diverged"):
        combine_adapters(diverged, WEIGHTS, "mix")
    with torch.device("meta"):
        on_meta = nn.Sequential(nn.Linear(4, 2))
    apply_lora(on_meta, LoRAConfig(r=1, targets="all", name="fr"))
    with pytest.raises(ValueError, match="The adapters of `0` are on the meta device, without values to combine"):
        combine_adapters(on_meta, {"fr": 1.0}, "mix")
