"""Names of projections in the wild: what attention is called in libraries of models, and what only looks like it."""

import pytest
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.targets.select import preset


def attention(*names, make=nn.Linear):
    """An attention block whose query, key, value and output projections have these names; one name may be a path."""
    block = nn.Module()
    for name in names:
        *around, leaf = name.split(".")
        holder = block
        for part in around:
            if part not in holder._modules:
                holder.add_module(part, nn.ModuleList() if part.endswith("s") else nn.Module())
            holder = holder._modules[part]
        holder.add_module(leaf, make(4, 4))
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mixer": block})]), "last": nn.Linear(4, 2)})


SCHEMES = {
    "Informer": "query_projection key_projection value_projection out_projection",
    "Temporal Fusion Transformer": "q_layers.0 q_layers.1 k_layers.0 k_layers.1 v_layer",
    "Set Transformer": "fc_q fc_k fc_v fc_o",
    "TransformerLens": "W_Q W_K W_V W_O",
    "one class per head": "queries.0 keys.0 values.0 out",
    "plural with s": "w_qs w_ks w_vs w_o",
    "one word": "toqueries tokeys tovalues out",
    "project first": "project_q project_k project_v project_out",
    "project last": "q_project k_project v_project out",
    "Transformer-XL": "q_net kv_net o_net",
    "dense": "query_dense key_dense value_dense output_dense",
    "layers": "query_layer key_layer value_layer output_layer",
    "in a module with its norm": "q.norm_linear k.norm_linear v.norm_linear proj",
    "attn first": "attn_q attn_k attn_v attn_output",
    "DeepSeek": "wq_a wq_b wkv_a wkv_b wo",
    "long": "to_queries to_keys to_values to_out",
    "OpenFold": "linear_q linear_k linear_v linear_o",
}


@pytest.mark.parametrize("names", SCHEMES.values(), ids=SCHEMES)
def test_attention_is_known_by_the_names_of_its_projections(names):
    expected = [f"layers.0.mixer.{name}" for name in names.split()]
    model = attention(*names.split())
    assert list(preset(model, "attn")) == expected
    assert apply_lora(model, LoRAConfig(r=1, targets="attn")) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [("qkv_linears out_proj", ["qkv_linears"]), ("q_layers.0 k_layers.0 v_layer w_h", ["q_layers.0", "v_layer"])],
)
def test_query_and_value_of_these(names, expected):
    assert list(preset(attention(*names.split()), "qv")) == [f"layers.0.mixer.{name}" for name in expected]


def annotated():
    """Four projections in a list, without names."""

    class MultiHeadedAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    return nn.ModuleList([MultiHeadedAttention()])


def test_projections_in_a_list_are_known_by_the_module_around_it():
    assert list(preset(annotated(), "attn")) == [f"0.linears.{index}" for index in range(4)]


@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d])
def test_projections_may_be_convolutions_of_one_position(make):
    def pointwise(in_features, out_features):
        return make(in_features, out_features, 1)

    names = ["query_conv", "key_conv", "value_conv"]
    model = attention(*names, make=pointwise)
    assert list(preset(model, "attn")) == [f"layers.0.mixer.{name}" for name in names]
    assert preset(attention(*names, make=lambda a, b: make(a, b, 3)), "attn") == {}


@pytest.mark.parametrize("ending", ["qkv", "qkv.1"])
def test_the_rows_of_a_fused_convolution_are_not_known(ending):
    def pointwise(in_features, out_features):
        layer = nn.Conv2d(in_features, 3 * out_features, 1)
        return layer if ending == "qkv" else nn.Sequential(nn.BatchNorm2d(in_features), layer)

    model = attention("qkv", "proj", make=pointwise)
    words = rf"`layers.0.mixer.{ending}` fuses query, key and value, .* to adapt all of it write targets=\['{ending}'\]"
    with pytest.raises(ValueError, match=words):
        apply_lora(model, LoRAConfig(targets="qv"))
    assert apply_lora(model, LoRAConfig(targets=[ending])) == [f"layers.0.mixer.{ending}"]


@pytest.mark.parametrize(
    "names",
    ["token values head", "quality kind vote", "value_head.0 value_head.1 policy", "key value receptance", "keys vals"],
)
def test_other_words_are_no_attention(names):
    assert preset(attention(*names.split()), "attn") == {}


def test_which_of_these_are_query_and_value_is_not_known():
    with pytest.raises(
        ValueError, match=r"found attention in ModuleList, but no name .* Take targets='attn', or .*'0.li"
    ):
        apply_lora(annotated(), LoRAConfig(targets="qv"))
    assert apply_lora(annotated(), LoRAConfig(targets=["0.linears.0"])) == ["0.linears.0"]
    assert "0.linears.0" in apply_lora(annotated(), LoRAConfig(targets="attn"))
