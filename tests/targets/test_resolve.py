"""What a configuration means on a model, and the words where it means nothing or something that cannot be."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora
from lightning_lora.targets.resolve import find_targets
from tests.helpers import oracles
from tests.helpers.models import Attention


class DecoderBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(4), Attention()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(9, 4), nn.ModuleList([DecoderBlock(), DecoderBlock()])
        self.conv, self.head = nn.Conv1d(4, 4, 3), nn.Linear(4, 9)
        self.scale = nn.Parameter(torch.ones(4))


def found(model=None, **arguments):
    targets = find_targets(Model() if model is None else model, LoRAConfig(**arguments))
    targets.check()
    return targets.names()


def problem(model=None, **arguments):
    targets = find_targets(Model() if model is None else model, LoRAConfig(**arguments))
    with pytest.raises(ValueError) as caught:
        targets.check()
    return str(caught.value)


def in_both(*tails):
    return [f"layers.{index}.{tail}" for index in (0, 1) for tail in tails]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], in_both("attn.q_proj")),
        (["v_proj", "q_proj"], in_both("attn.q_proj", "attn.v_proj")),  # in the model's order
        (["layers.1.attn.q_proj"], ["layers.1.attn.q_proj"]),
        (["1.attn.*"], [f"layers.1.attn.{letter}_proj" for letter in "qkvo"]),
        (["layers.*.mlp.*"], in_both("mlp.0", "mlp.2")),
        (["[qv]_proj"], in_both("attn.q_proj", "attn.v_proj")),
        ([r"re:layers\.0\..*_proj"], [f"layers.0.attn.{letter}_proj" for letter in "qkvo"]),
        (["embed", "conv"], ["embed", "conv"]),
        (["q_proj", "re:.*q_proj"], in_both("attn.q_proj")),
        (["head", "*head"], ["head"]),
        (["mlp.*"], in_both("mlp.0", "mlp.2")),  # the activation between them is no layer
    ],
    ids=str,
)
def test_a_list_names_modules(targets, expected):
    assert found(targets=targets) == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (["layers.0"], ["layers.1.attn.q_proj", "layers.1.attn.v_proj"]),
        (["q_proj"], in_both("attn.v_proj")),
        (["layers.0.attn.q_proj"], ["layers.0.attn.v_proj", "layers.1.attn.q_proj", "layers.1.attn.v_proj"]),
        ([r"re:layers\.1"], ["layers.0.attn.q_proj", "layers.0.attn.v_proj"]),
        (["head", "0.attn"], ["layers.1.attn.q_proj", "layers.1.attn.v_proj"]),
        ([], in_both("attn.q_proj", "attn.v_proj")),
    ],
    ids=str,
)
def test_exclude_leaves_out_modules_with_all_that_is_inside(exclude, expected):
    assert found(targets=["q_proj", "v_proj"], exclude=exclude) == expected
    assert found(targets="qv", exclude=exclude) == expected


def test_what_trains_in_full_gets_no_adapter():
    assert found(targets=["head", "q_proj"], also_train=["head", "layers.0"]) == ["layers.1.attn.q_proj"]


def test_finding_changes_nothing():
    model = Model()
    before, classes = oracles.snapshot(model), [type(module) for module in model.modules()]
    found(model, targets="all")
    oracles.assert_same_values(model, before)
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in key for module in model.modules() for key in vars(module))


def test_what_is_adapted_already_is_found_again_and_its_adapter_is_not():
    model = Model()
    apply_lora(model, LoRAConfig(targets=["q_proj", "mlp.*"]))
    assert found(model, targets=["*"]) == found(targets=["*"])
    assert "lora" not in problem(model, targets=["lorra"])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_compiled_and_wrapped_models_keep_the_names_of_the_user():
    model = Model()
    model.layers[0] = torch.compile(model.layers[0])
    assert found(model, targets=["q_proj"]) == in_both("attn.q_proj")
    assert found(torch.compile(model), targets=["layers.0.attn.q_proj"]) == ["layers.0.attn.q_proj"]


UNMATCHED = [
    (
        {"targets": ["q_proj", "querry"]},
        r"`targets` has 'querry', which matches no module\. The nearest names are `",
    ),
    ({"targets": ["q_porj"]}, r"The nearest names are `layers\.\*\.attn\.q_proj`"),
    ({"targets": ["re:q_proj"]}, r"nearest names are `layers.*q_proj`.* A `re:` pattern must match the whole name\."),
    ({"targets": ["norm"]}, r"`targets` has 'norm', which names `layers\.0\.norm`, but that is a LayerNorm"),
    ({"targets": ["layers.0.attn"]}, r"that is a Attention; LoRA .*Name the layers in it, or .* 'layers\.0\.attn\.\*'"),
    ({"targets": "all", "exclude": ["haed"]}, r"`exclude` has 'haed', which matches no module.*`head`"),
    ({"targets": "all", "also_train": ["haed"]}, r"`also_train` has 'haed', which matches no module.*`head`"),
    ({"targets": "qv", "rank_pattern": {"k_proj": 2}}, r"`rank_pattern` has 'k_proj', which matches no"),
    ({"targets": "qv", "alpha_pattern": {"head": 2}}, r"`alpha_pattern` has 'head', which matches no"),
    (
        {"targets": ["head"], "exclude": ["head"]},
        r"`targets=\['head'\]` matched only modules that `exclude=\['head'\]` take out again: nothing is left",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), UNMATCHED, ids=[str(case[0]) for case in UNMATCHED])
def test_a_pattern_that_matches_nothing_is_named_with_what_is_near(arguments, words):
    with pytest.raises(ValueError, match=words):
        found(**arguments)


def test_every_problem_is_told_at_once():
    told = problem(targets=["nothing", "q_proj", "neither"], exclude=["nowhere"])
    assert [word in told for word in ("'nothing'", "'neither'", "'nowhere'", "'q_proj'")] == [True, True, True, False]


def test_also_train_and_exclude_may_name_what_cannot_be_adapted():
    expected = in_both("attn.q_proj")
    assert found(targets=["q_proj"], also_train=["norm", "scale", "layers.0.norm.bias"]) == expected
    assert found(targets=["q_proj"], exclude=["norm"]) == expected


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("attn", r"`targets='attn'` found no attention block in Sequential"),
        ("qv", r"`targets='qv'` found no attention block in Sequential"),
        ("mlp", r"`targets='mlp'` found no MLP in Sequential"),
    ],
)
def test_a_preset_that_finds_nothing_says_what_there_is(which, words):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    told = problem(model, targets=which)
    with pytest.raises(ValueError, match=words):
        find_targets(model, LoRAConfig(targets=which)).check()
    assert "Its linear layers are `0`, `2`" in told
    assert told.endswith("Take targets='all', or name those to adapt in a list, as in targets=['0'].")


def test_a_preset_on_a_model_without_linear_layers_says_so():
    told = problem(nn.Sequential(nn.LayerNorm(3)), targets="all")
    assert "`targets='all'` found no linear layer besides output heads in Sequential" in told
    assert "It has no linear layer." in told


def tied():
    model = Model()
    model.head = nn.Linear(4, 9, bias=False)
    model.head.weight = model.embed.weight
    return model


def tied_by_memory():
    model = Model()
    model.head = nn.Linear(4, 9, bias=False)
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    return model


def tied_turned():
    model = Model()
    model.encoder, model.decoder = nn.Linear(4, 7), nn.Linear(7, 4)
    model.decoder.weight = nn.Parameter(model.encoder.weight.detach().t())
    return model


@pytest.mark.parametrize("make", [tied, tied_by_memory, tied_turned])
def test_a_weight_that_two_modules_share_is_adapted_in_those_that_are_named(make):
    one, other = ("encoder", "decoder") if make is tied_turned else ("head", "embed")
    assert found(make(), targets=[one]) == [one]
    assert sorted(found(make(), targets=[one, other])) == sorted([one, other])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_without_memory_are_not_taken_for_shared():
    with torch.device("meta"):
        model = Model()
    assert found(model, targets=["q_proj"]) == in_both("attn.q_proj")
    assert found(nn.Sequential(nn.Linear(0, 3), nn.Linear(0, 3)), targets=["0", "1"]) == ["0", "1"]


def used_twice():
    model = Model()
    model.again = model.layers[0].attn
    return model


@pytest.mark.parametrize(
    "targets", [["layers.0.attn.q_proj"], ["again.q_proj"], ["layers.0.*.q_proj", "again.*q_proj"]]
)
def test_a_module_under_two_names_is_one_target_by_its_first_name(targets):
    assert found(used_twice(), targets=targets) == ["layers.0.attn.q_proj"]


@pytest.mark.parametrize("exclude", [["again"], ["layers.0"]])
def test_a_module_under_two_names_is_left_out_by_either(exclude):
    assert found(used_twice(), targets=["q_proj"], exclude=exclude) == ["layers.1.attn.q_proj"]


Q, K, V, ALL = {"attn": ["q"]}, {"attn": ["k"]}, {"attn": ["v"]}, {"attn": ["q", "k", "v"], "attn.out_proj": [""]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"targets": "attn"}, ALL),
        ({"targets": "all"}, ALL),
        ({"targets": "qv"}, {"attn": ["q", "v"]}),
        ({"targets": ["attn"]}, ALL),
        ({"targets": ["attn.*"]}, ALL),
        ({"targets": ["out_proj"]}, {"attn.out_proj": [""]}),
        ({"targets": ["attn.q"]}, Q),
        ({"targets": ["k"]}, K),
        ({"targets": [r"re:.*\.[qv]"]}, {"attn": ["q", "v"]}),
        ({"targets": ["attn.q", "attn.v"]}, {"attn": ["q", "v"]}),
        ({"targets": ["attn.q", "attn"]}, ALL),
        ({"targets": ["attn", "attn.q"]}, ALL),
        ({"targets": "attn", "exclude": ["out_proj", "attn.k"]}, {"attn": ["q", "v"]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 2}], ids=["packed", "apart"])
def test_the_matrices_of_a_multihead_attention_are_named_one_by_one(arguments, expected, sizes):
    model = nn.Sequential()
    model.add_module("attn", nn.MultiheadAttention(4, 2, **sizes))
    targets = find_targets(model, LoRAConfig(**arguments))
    targets.check()
    assert {site.name: [part.name for part in site.parts] for site in targets.sites} == expected


def test_what_cannot_be_adapted_can_be_left_out():
    model = nn.Sequential()
    model.add_module("attn", nn.MultiheadAttention(4, 2))
    model.add_module("fc", nn.Linear(4, 4))
    assert found(model, targets="all", exclude=["attn"]) == ["fc"]


def test_an_advice_that_is_followed_works():
    told = problem(targets=["0.attn", "1.attn"])
    assert "'0.attn.*'" in told
    assert found(targets=["0.attn.*", "1.attn.*"]) == in_both(*(f"attn.{letter}_proj" for letter in "qkvo"))


def test_many_problems_are_told_by_the_first_five():
    model = nn.ModuleList(nn.LazyLinear(4) for _ in range(9))
    told = problem(model, targets="all")
    assert told.startswith("`0` (and 8 more) has no shape yet") and "exclude" not in told
    told = problem(model, targets=["1000", "1001", "1002", "1003", "1004", "1005", "1006"])
    assert told.count("matches no module") == 5 and told.endswith("(2 more like these)")


def two_kinds():
    model = nn.Sequential()
    model.add_module("mha", nn.MultiheadAttention(4, 2))
    model.add_module("lstm", nn.LSTM(4, 4))
    model.add_module("fc", nn.Linear(4, 4))
    return model


def test_a_rank_for_a_layer_is_that_of_its_matrices_unless_they_have_their_own():
    model = two_kinds()
    arguments = {"rank_pattern": {"mha.v": 7, "mha": 5, "lstm": 3}, "alpha_pattern": {"lstm": 6}}
    apply_lora(model, LoRAConfig(r=2, targets=["mha", "lstm", "fc"], **arguments))
    assert [model.mha.lora.default[name].r for name in "qkv"] == [5, 5, 7]
    assert {pair.r for _, pair in model.lstm.lora.default.items()} == {3}
    assert {pair.scale for _, pair in model.lstm.lora.default.items()} == {2.0}
    assert model.fc.lora.default.r == 2


def test_a_matrix_of_a_layer_cannot_be_trained_in_full():
    with pytest.raises(ValueError, match=r"`also_train` has 'mha.q', which matches no module"):
        apply_lora(two_kinds(), LoRAConfig(targets=["mha"], also_train=["mha.q"]))


def test_a_parameter_that_is_named_and_left_out_leaves_nothing():
    model = nn.ParameterDict({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)})
    assert apply_lora(model, LoRAConfig(r=1, targets=["a", "b"], exclude=["a"])) == [""]
    assert list(model.lora.default) == ["b"]
    with pytest.raises(ValueError, match="nothing is left"):
        apply_lora(nn.ParameterDict({"a": torch.zeros(2, 2)}), LoRAConfig(targets=["a"], exclude=["a"]))


def test_a_parameter_and_matrices_in_it_are_not_both_named():
    with pytest.raises(ValueError, match=r"`mha` is named by its parameter `in_proj_weight` and by matrices in it"):
        apply_lora(two_kinds(), LoRAConfig(targets=["mha.q", "mha.in_proj_weight"]))


class Shadowing(nn.Linear):
    """Names of its own that adapted layers could hide, or be hidden by."""

    def __init__(self):
        super().__init__(4, 4)
        self.parts, self.keys = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4))
        self.register_buffer("mask", torch.ones(4))

    def forward(self, input):
        return self.parts(super().forward(input=input)) @ self.keys * self.mask


@pytest.mark.parametrize("targets", [["layer"], ["layer.keys"], ["layer", "parts"]], ids=str)
def test_names_of_the_users_are_not_hidden(targets):
    model = nn.ModuleDict({"layer": Shadowing()})
    x = torch.randn(2, 4)
    before = model.layer(x)
    apply_lora(model, LoRAConfig(r=2, targets=targets))
    oracles.assert_close(model.layer(input=x), before, torch.float32)
    oracles.train_by_hand(model)
    trained = model.layer(x)
    assert not torch.allclose(trained, before)
    merge_lora(model)
    oracles.assert_close(model.layer(x), trained, torch.float32)


def test_a_parameter_may_be_called_as_a_method_of_modules_is():
    model = nn.Module()
    model.values = nn.Parameter(torch.ones(3, 3))
    apply_lora(model, LoRAConfig(r=2, targets=["values"]))
    assert model.values.shape == (3, 3)


def test_a_recurrent_layer_with_weight_norm_is_refused():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    with pytest.raises(ValueError, match=r"`lstm` computes its weight"):
        apply_lora(nn.ModuleDict({"lstm": layer}), LoRAConfig(targets=["lstm"]))


class Called(nn.Module):
    """A model whose attention is a layer, and whose module `mlp` is one too."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "mlp": nn.Linear(4, 4)})
        self.other = nn.ModuleDict({"attention": Attention(), "ffn": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["attn", "mlp"], in_both(*(f"attn.{letter}_proj" for letter in "qkvo"), "mlp.0", "mlp.2")),
        (["qv", "head"], [*in_both("attn.q_proj", "attn.v_proj"), "head"]),
        (["all", "conv"], [*in_both(*(f"attn.{letter}_proj" for letter in "qkvo"), "mlp.0", "mlp.2"), "conv"]),
        ("all-linear", in_both(*(f"attn.{letter}_proj" for letter in "qkvo"), "mlp.0", "mlp.2")),
        (["all-linear", "head"], [*in_both(*(f"attn.{letter}_proj" for letter in "qkvo"), "mlp.0", "mlp.2"), "head"]),
    ],
    ids=str,
)
def test_presets_may_stand_in_a_list(targets, expected):
    assert found(targets=targets) == expected
    assert "all-linear" not in LoRAConfig(targets=targets).to_dict()["targets"]


def test_in_a_list_a_layer_of_that_name_comes_before_the_preset():
    assert found(Called(), targets=["attn", "mlp"]) == ["block.attn", "block.attn.out_proj", "block.mlp"]
    everything = [*found(Called(), targets="attn"), "block.mlp"]
    assert sorted(found(Called(), targets=["*.attn", "attention.*", "mlp"])) == sorted(everything)


def test_a_preset_in_a_list_that_finds_nothing_says_so():
    told = problem(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), targets=["attn", "0"])
    assert told.startswith("`targets='attn'` found no attention block in Sequential")


def test_a_parameter_that_is_named_itself_stays_when_its_layer_is_chosen_too():
    for targets in (["all", "0.attn.q_proj.weight"], ["0.attn.q_proj.weight", "q_proj"]):
        targets = find_targets(Model(), LoRAConfig(targets=targets))
        targets.check()
        reads = {site.name: site.parts[0].read for site in targets.sites}
        assert reads["layers.0.attn.q_proj"] and not reads["layers.1.attn.q_proj"]


@pytest.mark.parametrize("pattern", [r"layers\.0\..*_proj", "(q|v)_proj", r".*\.(q|v)_proj", "[qv]_proj|head"])
def test_an_expression_without_its_mark_is_told_how_to_write_it(pattern):
    told = problem(targets=[pattern])
    advice = told.rpartition("the whole name: '")[2].removesuffix("'.").replace("\\\\", "\\")
    assert advice.startswith("re:") and found(targets=[advice])


@pytest.mark.parametrize("which", ["attn", "qv", "mlp", "all"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
        lambda: nn.ModuleDict({"body": nn.ModuleDict({"wa": nn.Linear(4, 4)}), "head": nn.Linear(4, 2)}),
        lambda: nn.ModuleDict({"rnn": nn.LSTM(4, 4), "head": nn.Linear(4, 2)}),
        lambda: nn.ModuleDict({"head": nn.Linear(4, 2)}),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)),
        lambda: nn.ParameterDict({"table": torch.zeros(4, 4)}),
    ],
)
def test_what_an_empty_preset_advises_works_and_is_no_head(make, which):
    targets = find_targets(make(), LoRAConfig(targets=which))
    if not targets.problems:
        return
    advice = targets.problems[0].rpartition("targets=[")[2].partition("]")[0].strip("'")
    chosen = found(make(), targets=[advice])
    assert chosen and ("head" not in chosen or list(dict(make().named_children())) == ["head"])


def test_an_empty_preset_on_a_model_without_layers_advises_nothing():
    assert problem(nn.Sequential(nn.LayerNorm(3)), targets="attn").endswith("It has no linear layer.")


def test_the_adapters_of_peft_are_refused_with_advice_that_works():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    told = problem(wrapped, targets="all")
    words = (
        "`base_model.model.layers.0.attn.q_proj` (and 1 more) is a Linear of peft, an adapter already: merge it into "
    )
    assert told.startswith(words + "the weights first, `model = model.merge_and_unload()`.")
    advice = told.rpartition("exclude=[")[2].partition("]")[0].replace("'", "").split(", ")
    assert not any("q_proj" in name for name in found(wrapped, targets="all", exclude=advice))
    assert found(wrapped, targets=["v_proj"]) == [f"base_model.model.{name}" for name in in_both("attn.v_proj")]
    assert in_both("attn.q_proj")[0] in found(wrapped.merge_and_unload(), targets="all")
