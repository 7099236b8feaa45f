"""What the presets choose, against lists written by hand."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.targets.role_names import is_fused
from lightning_lora.targets.select import preset


def module(**children):
    """A module with these children."""
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made


def linears(*names):
    return module(**{name: nn.Linear(4, 4) for name in names})


def several(count, make):
    return nn.ModuleList([make() for _ in range(count)])


def gpt():
    """Projections inside the block itself, beside an mlp."""

    def block():
        made = linears("q", "k", "v", "o")
        made.add_module("mlp", nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        return made

    return module(embed=nn.Embedding(9, 4), blocks=several(2, block), lm_head=nn.Linear(4, 9))


def flat_gpt():
    """Projections and the maps of the MLP side by side in the block."""
    return module(blocks=several(1, lambda: linears("wq", "wk", "wv", "wo", "w1", "w2")), head=nn.Linear(4, 9))


def bert():
    def layer():
        attention = module(self=linears("query", "key", "value"), output=linears("dense"))
        return module(attention=attention, intermediate=linears("dense"), output=linears("dense"))

    return module(layer=several(1, layer), pooler=linears("dense"), classifier=nn.Linear(4, 2))


def t5():
    def block():
        attention = module(SelfAttention=linears("q", "k", "v", "o"))
        return module(layer=nn.ModuleList([attention, module(DenseReluDense=linears("wi_0", "wi_1", "wo"))]))

    shared = nn.Embedding(4, 4)
    model = module(shared=shared, encoder=module(block=several(1, block)), lm_head=nn.Linear(4, 4, bias=False))
    model.lm_head.weight = shared.weight
    return model


def fused():
    block = lambda: module(attn=linears("qkv", "proj"), mlp=linears("fc1", "fc2"))  # noqa: E731
    return module(blocks=several(1, block), head=nn.Linear(4, 9))


def perceiver():
    """Query apart, key and value in one."""
    block = lambda: module(attn=linears("to_q", "to_kv", "to_out"), ff=linears("net"))  # noqa: E731
    return module(layers=several(1, block))


def single_block():
    """No numbers in the names: what the attention lies in is the block."""
    return module(encoder=module(attention=linears("query", "value", "out"), up=nn.Linear(4, 8), down=nn.Linear(8, 4)))


def tied_head():
    """A head that only its weight gives away."""
    model = module(embed=nn.Embedding(9, 4), hidden=nn.Linear(4, 4), unembed=nn.Linear(4, 9, bias=False))
    model.unembed.weight = model.embed.weight
    return model


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def named_mlp():
    return module(fc1=nn.Linear(4, 8), fc2=nn.Linear(8, 8), out=nn.Linear(8, 2))


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1)))


def resnet():
    return module(conv1=nn.Conv2d(3, 4, 3), bn1=nn.BatchNorm2d(4), fc=nn.Linear(4, 10))


def headed():
    """A head of several maps: only its last one gives the output."""
    return module(
        body=nn.Linear(4, 4),
        head=nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)),
        heads=nn.ModuleDict({"age": nn.Linear(4, 1), "sex": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))}),
    )


def explorer():
    """Names that only look like others."""
    return module(exploration=nn.Linear(4, 4), header=nn.Linear(4, 4), quality=nn.Linear(4, 4), vote=nn.Linear(4, 4))


def prefixed(prefix, names):
    return [f"{prefix}.{name}" for name in names.split()]


GPT_ATTENTION = prefixed("blocks.0", "q k v o") + prefixed("blocks.1", "q k v o")
GPT_MLP = ["blocks.0.mlp.0", "blocks.0.mlp.2", "blocks.1.mlp.0", "blocks.1.mlp.2"]
GPT_ALL = prefixed("blocks.0", "q k v o mlp.0 mlp.2") + prefixed("blocks.1", "q k v o mlp.0 mlp.2")
BERT_ATTENTION = prefixed("layer.0.attention", "self.query self.key self.value output.dense")
BERT_MLP = prefixed("layer.0", "intermediate.dense output.dense")
T5_ATTENTION = prefixed("encoder.block.0.layer.0.SelfAttention", "q k v o")
T5_MLP = prefixed("encoder.block.0.layer.1.DenseReluDense", "wi_0 wi_1 wo")

CHOSEN = [
    (gpt, "attn", GPT_ATTENTION),
    (gpt, "qv", ["blocks.0.q", "blocks.0.v", "blocks.1.q", "blocks.1.v"]),
    (gpt, "mlp", GPT_MLP),
    (gpt, "all", GPT_ALL),
    (flat_gpt, "attn", prefixed("blocks.0", "wq wk wv wo")),
    (flat_gpt, "qv", prefixed("blocks.0", "wq wv")),
    (flat_gpt, "mlp", prefixed("blocks.0", "w1 w2")),
    (flat_gpt, "all", prefixed("blocks.0", "wq wk wv wo w1 w2")),
    (bert, "attn", BERT_ATTENTION),
    (bert, "qv", prefixed("layer.0.attention.self", "query value")),
    (bert, "mlp", BERT_MLP),
    (bert, "all", [*BERT_ATTENTION, *BERT_MLP, "pooler.dense"]),
    (t5, "attn", T5_ATTENTION),
    (t5, "qv", prefixed("encoder.block.0.layer.0.SelfAttention", "q v")),
    (t5, "mlp", T5_MLP),
    (t5, "all", [*T5_ATTENTION, *T5_MLP]),
    (fused, "attn", prefixed("blocks.0.attn", "qkv proj")),
    (fused, "mlp", prefixed("blocks.0.mlp", "fc1 fc2")),
    (fused, "all", prefixed("blocks.0", "attn.qkv attn.proj mlp.fc1 mlp.fc2")),
    (perceiver, "attn", prefixed("layers.0.attn", "to_q to_kv to_out")),
    (perceiver, "mlp", ["layers.0.ff.net"]),
    (single_block, "attn", prefixed("encoder.attention", "query value out")),
    (single_block, "mlp", prefixed("encoder", "up down")),
    (tied_head, "all", ["hidden"]),
    (mlp, "all", ["0", "2", "4"]),
    (mlp, "attn", []),
    (mlp, "qv", []),
    (mlp, "mlp", []),
    (named_mlp, "all", ["fc1", "fc2", "out"]),
    (named_mlp, "mlp", ["fc1", "fc2"]),
    (convolutions, "all", ["0", "2.0"]),
    (convolutions, "attn", []),
    (resnet, "all", ["conv1"]),
    (headed, "all", ["body", "head.0", "heads.sex.0"]),
    (explorer, "all", ["exploration", "header", "quality", "vote"]),
    (explorer, "attn", []),
]


@pytest.mark.parametrize(
    ("make", "which", "expected"), CHOSEN, ids=[f"{make.__name__}-{which}" for make, which, _ in CHOSEN]
)
def test_what_a_preset_chooses(make, which, expected):
    assert list(preset(make(), which)) == expected


@pytest.mark.parametrize(
    ("make", "which", "expected"),
    [case for case in CHOSEN if case[2]],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_a_preset_chooses_is_what_is_adapted_and_nothing_else_trains(make, which, expected):
    model = make()
    assert apply_lora(model, LoRAConfig(r=2, targets=which)) == expected
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"{name}.lora.default.{matrix}" for name in expected for matrix in "AB"]
    assert list(preset(model, which)) == expected  # an adapted model is seen as it was


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("attn.qkv", True),
        ("attn.qkv_proj", True),
        ("attn.Wqkv", True),
        ("attn.W_qkv", True),
        ("attn.query_key_value", True),
        ("h.0.attn.c_attn", True),
        ("attn.to_kv", True),
        ("attn.q_proj", False),
        ("attn.kvetch", False),
        ("qkv.out", False),
    ],
)
def test_the_leaf_of_a_name_tells_a_fused_map(name, expected):
    assert is_fused(name) is expected


def test_the_maps_of_a_multihead_attention_and_its_output():
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    assert preset(layer, "attn") == {"self_attn": None, "self_attn.out_proj": None}
    assert preset(layer, "qv") == {"self_attn": ("q", "v")}
    assert preset(nn.MultiheadAttention(4, 2), "attn") == {"": None, "out_proj": None}
    assert list(preset(layer, "mlp")) == ["linear1", "linear2"]
    assert list(preset(layer, "all")) == ["self_attn", "self_attn.out_proj", "linear1", "linear2"]


def test_a_module_under_two_names_is_chosen_once():
    model = gpt()
    model.again = model.blocks[0]
    assert list(preset(model, "attn")) == GPT_ATTENTION
    assert list(preset(model, "all")) == GPT_ALL


SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def huggingface(model, config, **arguments):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**arguments))


def hf_t5():
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "vocab_size": 32}
    return huggingface(
        "T5ForConditionalGeneration", "T5Config", d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, **tokens
    )


def hf_gpt2():
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 32}
    return huggingface("GPT2LMHeadModel", "GPT2Config", n_embd=8, n_layer=1, n_head=2, n_positions=16, **tokens)


def hf_vit():
    sizes = {"image_size": 8, "patch_size": 4, "intermediate_size": 16}
    return huggingface(
        "ViTForImageClassification", "ViTConfig", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, **sizes
    )


def hf_distilbert():
    return huggingface(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        dim=8,
        n_layers=1,
        n_heads=2,
        hidden_dim=16,
        vocab_size=32,
    )


def hf_opt():
    arguments = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    sizes = {"ffn_dim": 16, "word_embed_proj_dim": 8, "max_position_embeddings": 16}
    return huggingface("OPTForCausalLM", "OPTConfig", **arguments, **sizes)


def hf_bert():
    return huggingface("BertForSequenceClassification", "BertConfig", **SMALL)


def hf_bert_mlm():
    return huggingface("BertForMaskedLM", "BertConfig", **SMALL)


def hf_roberta():
    return huggingface("RobertaForSequenceClassification", "RobertaConfig", **SMALL)


def hf_llama():
    return huggingface("LlamaForCausalLM", "LlamaConfig", **SMALL, num_key_value_heads=1)


def bert_names(base):
    attention = prefixed(f"{base}.encoder.layer.0.attention", "self.query self.key self.value output.dense")
    return attention, prefixed(f"{base}.encoder.layer.0", "intermediate.dense output.dense")


def t5_names():
    encoder, decoder = "encoder.block.0.layer", "decoder.block.0.layer"
    own = prefixed(f"{encoder}.0.SelfAttention", "q k v o")
    cross = prefixed(f"{decoder}.0.SelfAttention", "q k v o") + prefixed(f"{decoder}.1.EncDecAttention", "q k v o")
    first, second = f"{encoder}.1.DenseReluDense", f"{decoder}.2.DenseReluDense"
    return own, prefixed(first, "wi wo"), cross, prefixed(second, "wi wo")


# A model, then what "attn", "mlp" and the rest of "all" are, in the model's order.
HUGGINGFACE = [
    (hf_bert, *bert_names("bert"), ["bert.pooler.dense"]),
    (hf_bert_mlm, *bert_names("bert"), ["cls.predictions.transform.dense"]),
    (hf_roberta, *bert_names("roberta"), []),
    (hf_gpt2, prefixed("transformer.h.0.attn", "c_attn c_proj"), prefixed("transformer.h.0.mlp", "c_fc c_proj"), []),
    (
        hf_llama,
        prefixed("model.layers.0.self_attn", "q_proj k_proj v_proj o_proj"),
        prefixed("model.layers.0.mlp", "gate_proj up_proj down_proj"),
        [],
    ),
    (
        hf_distilbert,
        prefixed("distilbert.transformer.layer.0.attention", "q_lin k_lin v_lin out_lin"),
        prefixed("distilbert.transformer.layer.0.ffn", "lin1 lin2"),
        ["pre_classifier"],
    ),
    (
        hf_vit,
        prefixed("vit.layers.0.attention", "q_proj k_proj v_proj o_proj"),
        prefixed("vit.layers.0.mlp", "fc1 fc2"),
        [],
    ),
    (
        hf_opt,
        prefixed("model.decoder.layers.0.self_attn", "k_proj v_proj q_proj out_proj"),
        prefixed("model.decoder.layers.0", "fc1 fc2"),
        [],
    ),
]


@pytest.mark.parametrize(
    ("make", "attention", "maps", "rest"), HUGGINGFACE, ids=[case[0].__name__ for case in HUGGINGFACE]
)
def test_presets_on_models_of_hugging_face(make, attention, maps, rest):
    model = make()
    assert list(preset(model, "attn")) == attention
    assert list(preset(model, "mlp")) == maps
    assert list(preset(model, "all")) == [*attention, *maps, *rest]
    query_and_value = [name for name in attention if name.rpartition(".")[2][0] in "qv"]
    assert list(preset(model, "qv")) == (query_and_value or ["transformer.h.0.attn.c_attn"])


def test_presets_on_an_encoder_and_decoder_of_hugging_face():
    own, first, cross, second = t5_names()
    model = hf_t5()
    assert list(preset(model, "attn")) == own + cross
    assert list(preset(model, "mlp")) == first + second
    assert list(preset(model, "all")) == own + first + cross + second
    assert list(preset(model, "qv")) == [name for name in own + cross if name[-1] in "qv"]


def test_all_on_a_convolutional_network_with_one_linear_layer_is_its_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    assert list(preset(model, "all")) == ["0", "2"]
    model.append(nn.Linear(2, 2))
    assert list(preset(model, "all")) == ["4", "5"]


class TinyExperts(nn.Module):
    """Experts in one parameter of three dimensions, as transformers keeps them."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 4))


def sparse():
    attention = linears("q_proj", "k_proj", "v_proj", "o_proj")
    return module(
        layers=nn.ModuleList([module(attn=attention, mlp=module(gate=nn.Linear(4, 4), experts=TinyExperts()))])
    )


def test_fused_experts_are_mlp_and_their_router_is_not():
    attention = [f"layers.0.attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert list(preset(sparse(), "attn")) == attention
    assert list(preset(sparse(), "mlp")) == ["layers.0.mlp.experts"]
    assert apply_lora(sparse(), LoRAConfig(targets="all")) == [*attention, "layers.0.mlp.experts"]
    assert apply_lora(sparse(), LoRAConfig(targets="all", exclude=["experts"])) == attention, "and no router"
