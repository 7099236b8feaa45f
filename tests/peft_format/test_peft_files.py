"""Directories in PEFT's format, with peft itself as the oracle: the same outputs both ways, or an error by name."""

from __future__ import annotations

import copy
import json
import logging
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    disable_lora,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
)
from tests.helpers.oracles import Scaled, ScaledEmbedding, StandardizedConv, same_bits, snapshot, train_by_hand
from tests.helpers.scripts import run_script

peft = pytest.importorskip("peft")
ROWS = torch.linspace(-1, 1, 12).reshape(3, 4)
INDEX = torch.tensor([[1, 5, 0, 3], [2, 2, 6, 4]])
IMAGES = {n: torch.linspace(-1, 1, 2 * 2 * 5**n).reshape(2, 2, *[5] * n) for n in (1, 2, 3)}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")
        warnings.filterwarnings(
            "ignore", message=r".*fan_in_fan_out|.*tie_word_embeddings|.*shared with another module"
        )
        yield
    logging.disable(logging.NOTSET)


class GroupedAttention(nn.Module):
    """Fused, with fewer keys and values than queries."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 8), nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).split([4, 2, 2], dim=-1)
        return self.proj(q * torch.cat([k, v], -1).sigmoid())


class GroupedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.norm = GroupedAttention(), nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))

    def forward(self, x):
        return x + self.mlp(self.norm(self.attn(x)))


class LM(nn.Module):
    """An embedding, two blocks, statistics and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(GroupedBlock() for _ in range(2))
        self.bn = nn.BatchNorm1d(4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, index):
        x = self.embed(index)
        for block in self.blocks:
            x = block(x)
        return self.head(self.bn(x.mean(1)))


class Biased(nn.Module):
    """Where biases have other names too."""

    def __init__(self):
        super().__init__()
        self.mix, self.body = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.body(self.mix(x, x, x)[0])


class Suffix(nn.Module):
    """Where one name is the tail of another."""

    def __init__(self):
        super().__init__()
        self.proj, self.out = nn.Linear(4, 4), nn.ModuleDict({"proj": nn.Linear(4, 4)})

    def forward(self, x):
        return self.out["proj"](self.proj(x))


class Shared(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.second = layer, layer

    def forward(self, x):
        return self.second(self.first(x))


def of(*layers, **named):
    def make():
        model = nn.Sequential(*[layer() for layer in layers])
        for name, layer in named.items():
            model.add_module(name, layer())
        return model

    return make


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=16))


class Lit(LightningModule):
    def __init__(self, make=LM):
        super().__init__()
        self.model, self.scale = make(), nn.Linear(2, 1)

    def forward(self, x):
        return self.model(x)


def made(make):
    """The same model at every call, in evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().eval()


def trained(make, **arguments):
    """That model with adapters, all that trains moved."""
    model = made(make)
    apply_lora(model, LoRAConfig(**arguments))
    train_by_hand(model)
    own = {id(parameter) for _, parameter in lora_parameters(model)}
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in own:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def out(model, x):
    with torch.no_grad():
        y = model.eval()(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def in_peft(make, directory):
    """The base with the directory on it, as peft loads it."""
    return peft.PeftModel.from_pretrained(made(make), str(directory))


def contents(directory):
    """Everything that a directory says."""
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        values = {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118 - no mapping
        return (directory / "adapter_config.json").read_text(), values, file.metadata()


def close(one, other):
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def plain_qkv():
    return nn.Sequential(nn.Linear(4, 4), GroupedAttention(), nn.Linear(4, 2))


LINEAR = of(lambda: nn.Linear(4, 6), lambda: nn.Linear(6, 3))
CASES = {
    "linear": (LINEAR, ROWS, {"r": 2, "alpha": 6, "targets": "all"}),
    "one-of-two": (LINEAR, ROWS, {"r": 2, "alpha": 1, "targets": ["1"]}),
    "tail-of-another": (Suffix, ROWS, {"r": 2, "alpha": 6, "targets": [r"re:proj"]}),
    "tail-and-another": (Suffix, ROWS, {"r": 2, "targets": ["proj"], "rank_pattern": {"re:proj": 3}}),
    "ranks": (LM, INDEX, {"r": 2, "targets": ["mlp.*"], "rank_pattern": {"mlp.0": 3, "blocks.1.mlp.1": 5}}),
    "alphas": (LM, INDEX, {"r": 2, "alpha": 3, "targets": ["mlp.*"], "alpha_pattern": {"blocks.1.mlp.0": 7.5}}),
    "rslora": (LM, INDEX, {"r": 3, "alpha": 4, "rslora": True, "targets": ["mlp.*"], "rank_pattern": {"mlp.1": 5}}),
    "embedding": (LM, INDEX, {"r": 2, "alpha": 6, "targets": ["embed", "proj"]}),
    "conv1d": (of(lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1)), IMAGES[1], {"r": 2, "alpha": 6, "targets": ["0"]}),
    "conv2d": (of(lambda: nn.Conv2d(2, 3, (3, 2), padding="same")), IMAGES[2], {"r": 2, "alpha": 6, "targets": ["0"]}),
    "conv3d": (of(lambda: nn.Conv3d(2, 3, 2)), IMAGES[3], {"r": 2, "alpha": 6, "targets": ["0"]}),
    "hf-conv1d": (of(lambda: Conv1D(6, 4)), ROWS, {"r": 2, "alpha": 6, "targets": ["0"]}),
    "both-linears": (of(lambda: Conv1D(6, 4), lambda: nn.Linear(6, 3)), ROWS, {"r": 2, "alpha": 6, "targets": "all"}),
    "also-train": (LM, INDEX, {"r": 2, "targets": ["mlp.*"], "also_train": ["head", "blocks.0.norm"]}),
    "also-train-one-parameter": (LM, INDEX, {"r": 2, "targets": ["mlp.*"], "also_train": ["head.2.weight"]}),
    "also-train-statistics": (LM, INDEX, {"r": 2, "targets": ["mlp.*"], "also_train": ["bn"]}),
    "biases-of-adapted": (LM, INDEX, {"r": 2, "targets": ["mlp.*", "proj"], "bias": "lora_only"}),
    "all-biases": (LM, INDEX, {"r": 2, "targets": ["mlp.*"], "bias": "all", "also_train": ["head.2"]}),
    "biases-by-other-names": (Biased, ROWS[None], {"r": 2, "targets": ["body"], "bias": "all"}),
    "fused-whole": (plain_qkv, ROWS, {"r": 2, "alpha": 6, "targets": ["qkv"]}),
    "fused-slices": (plain_qkv, ROWS, {"r": 2, "alpha": 6, "targets": "qv"}),
    "fused-ranks": (plain_qkv, ROWS, {"r": 2, "alpha": 6, "targets": "qv", "rank_pattern": {"qkv.v": 3}}),
    "fused-rslora": (plain_qkv, ROWS, {"r": 2, "alpha": 6, "targets": ["qkv.q", "qkv.k"], "rslora": True}),
    "gpt2": (gpt2, INDEX, {"r": 2, "alpha": 6, "targets": "all"}),
    "gpt2-qv": (gpt2, INDEX, {"r": 2, "alpha": 6, "targets": "qv"}),
    "gpt2-embedding": (gpt2, INDEX, {"r": 2, "targets": ["wte", "c_fc"]}),
    "bf16": (lambda: made(LINEAR).bfloat16(), ROWS.bfloat16(), {"r": 2, "alpha": 6, "targets": "all"}),
    "fp64": (lambda: made(LINEAR).double(), ROWS.double(), {"r": 2, "alpha": 6, "targets": ["0"], "also_train": ["1"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_peft_gives_the_same_outputs_and_both_ways_back_do(case, tmp_path):
    make, x, arguments = CASES[case]
    model = trained(make, **arguments)
    expected = out(model, x)
    assert not close(expected, out(made(make), x))
    save_adapter(model, tmp_path)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if case == "bf16" else {"rtol": 1e-5, "atol": 1e-6}
    assert torch.allclose(out(in_peft(make, tmp_path), x), expected, **tolerance)

    bare, adapted = made(make), made(make)
    names = load_adapter(bare, tmp_path)
    assert torch.allclose(out(bare, x), expected, **tolerance)
    assert names == apply_lora(adapted, LoRAConfig(**arguments))
    assert load_adapter(adapted, tmp_path) == names
    for name, value in lora_state_dict(adapted).items():
        assert torch.allclose(value, lora_state_dict(model)[name], rtol=1e-6, atol=0), name
    remove_lora(bare)
    assert torch.equal(out(bare, x), out(made(make), x))


PEFT_CASES = {
    "list": (LM, INDEX, {"target_modules": ["mlp.0", "proj"], "r": 3, "lora_alpha": 5}),
    "expression": (LM, INDEX, {"target_modules": r".*\.mlp\.\d", "r": 2}),
    "all-linear": (LM, INDEX, {"target_modules": "all-linear", "r": 2}),
    "all-linear-but-the-head": (gpt2, INDEX, {"target_modules": "all-linear", "r": 2}),
    "exclude-list": (LM, INDEX, {"target_modules": "all-linear", "exclude_modules": ["proj", "head.0"], "r": 2}),
    "exclude-expression": (LM, INDEX, {"target_modules": r".*\.mlp\.\d", "exclude_modules": r"blocks\.1|.*0\.mlp\.1"}),
    "layer": (LM, INDEX, {"target_modules": ["proj"], "layers_to_transform": 1, "layers_pattern": ["blocks"]}),
    "layers-of": (LM, INDEX, {"target_modules": ["mlp.0"], "layers_to_transform": [1], "layers_pattern": "blocks"}),
    "layer-without-pattern": (gpt2, INDEX, {"target_modules": ["c_fc"], "layers_to_transform": [1]}),
    "ranks": (
        LM,
        INDEX,
        {
            "target_modules": ["mlp.0", "mlp.1", "head.0"],
            "rank_pattern": {"^blocks.0.mlp.0": 3, "head.0": 5, "mlp.*": 4},
        },
    ),
    "alphas": (LM, INDEX, {"target_modules": ["mlp.0", "head.0"], "alpha_pattern": {"^blocks.0.mlp.0": 3, "0": 20.5}}),
    "rslora": (
        LM,
        INDEX,
        {"target_modules": ["mlp.0", "proj"], "use_rslora": True, "r": 5, "rank_pattern": {"mlp.0": 2}},
    ),
    "modules-to-save": (LM, INDEX, {"target_modules": ["proj"], "modules_to_save": ["head", "bn"], "r": 2}),
    "end-of-a-name-to-save": (LM, INDEX, {"target_modules": ["proj"], "modules_to_save": ["orm"], "r": 2}),
    "all-biases": (LM, INDEX, {"target_modules": ["proj"], "bias": "all", "r": 2}),
    "biases-by-other-names": (Biased, ROWS[None], {"target_modules": ["body"], "bias": "all", "r": 2}),
    "biases-of-adapted": (LM, INDEX, {"target_modules": ["mlp.0", "embed"], "bias": "lora_only", "r": 2}),
    "embedding": (gpt2, INDEX, {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "conv": (CASES["conv2d"][0], IMAGES[2], {"target_modules": ["0"], "init_lora_weights": "gaussian"}),
    "orthogonal": (LINEAR, ROWS, {"target_modules": ["0"], "init_lora_weights": "orthogonal", "r": 4}),
}


def moved_by_peft(make, directory, **arguments):
    """An adapter that peft made, everything that trains moved, saved by peft and loaded by it.

    What it loads can be another than what it saved: it sorts the patterns, of which the first that matches counts.
    """
    model = peft.get_peft_model(made(make), peft.LoraConfig(**arguments)).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(directory))
    return in_peft(make, directory)


@pytest.mark.slow
@pytest.mark.parametrize("case", PEFT_CASES)
def test_what_peft_wrote_gives_peft_s_outputs(case, tmp_path):
    make, x, arguments = PEFT_CASES[case]
    theirs = moved_by_peft(make, tmp_path, **arguments)
    model = made(make)
    load_adapter(model, tmp_path)
    assert close(out(model, x), out(theirs, x))
    assert not close(out(model, x), out(made(make), x))
    save_adapter(model, tmp_path / "again")
    assert close(out(in_peft(make, tmp_path / "again"), x), out(theirs, x))
    wrapped = Lit(lambda: made(make))
    assert load_adapter(wrapped, tmp_path)[0].startswith("model.")
    assert close(out(wrapped, x), out(theirs, x))


@pytest.mark.slow
def test_a_saved_base_embedding_is_compared_and_not_adopted(tmp_path):
    class Named(GPT2LMHeadModel):
        def __init__(self):
            super().__init__(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=16))

    theirs = peft.get_peft_model(made(Named), peft.LoraConfig(target_modules=["wte"], r=2))
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (key,) = [key for key in tensors if key.endswith("wte.base_layer.weight")]
    model = made(Named)
    load_adapter(model, tmp_path)
    assert torch.equal(model.transformer.wte.weight, tensors[key])
    tensors[key][0, 0] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    bare = made(Named)
    with pytest.raises(ValueError, match=r"holds `transformer.wte.weight` of its base, and the model has other values"):
        load_adapter(bare, tmp_path)
    assert type(bare.transformer.wte) is nn.Embedding


def test_an_adapter_of_the_padding_index_is_refused(tmp_path):
    make = of(lambda: nn.Embedding(7, 4, padding_idx=2))
    save_adapter(trained(make, r=2, targets=["0"]), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not tensors["base_model.model.0.lora_embedding_A"][:, 2].any()
    load_adapter(made(make), tmp_path)
    tensors["base_model.model.0.lora_embedding_A"][:, 2] = 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="`0` has an adapter for its padding index, which has none here"):
        load_adapter(made(make), tmp_path)


def test_what_trains_in_fp64_keeps_every_bit(tmp_path):
    make, _, arguments = CASES["fp64"]
    model, bare = trained(make, **arguments), made(make)
    save_adapter(model, tmp_path)
    load_adapter(bare, tmp_path)
    assert torch.equal(bare[1].weight, model[1].weight) and bare[1].weight.dtype == torch.float64


def test_the_configuration_is_the_smallest(tmp_path):
    save_adapter(trained(LINEAR, r=2, alpha=6, targets="all"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": 2,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["0", "1"],
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "base_model.model.0.lora_A.weight": (2, 4),
        "base_model.model.0.lora_B.weight": (6, 2),
        "base_model.model.1.lora_A.weight": (2, 6),
        "base_model.model.1.lora_B.weight": (3, 2),
    }
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_a_tail_of_another_name_becomes_an_expression(tmp_path):
    save_adapter(trained(Suffix, targets=["re:proj"]), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "proj"
    assert in_peft(Suffix, tmp_path).base_model.targeted_module_names == ["proj"]


@pytest.mark.slow
def test_forty_targets_are_still_exact(tmp_path):
    """peft shortens long lists by itself."""
    make = of(*[lambda: nn.Linear(4, 4)] * 45)
    arguments = {"r": 1, "targets": [f"re:{index}" for index in range(0, 40)]}
    save_adapter(trained(make, **arguments), tmp_path)
    assert sorted(in_peft(make, tmp_path).base_model.targeted_module_names, key=int) == [str(i) for i in range(40)]


def test_fused_slices_are_one_pair_with_zero_rows(tmp_path):
    model = trained(plain_qkv, r=2, alpha=6, targets="qv")
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    B = tensors["base_model.model.1.qkv.lora_B.weight"]
    assert tuple(B.shape) == (8, 4)
    assert (B[:4, :2] != 0).all() and (B[6:, 2:] != 0).all()
    assert not B[4:].any(1)[:2].any() and not B[:4, 2:].any() and not B[6:, :2].any()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)


def test_a_pair_on_all_rows_does_not_fit_slices(tmp_path):
    save_adapter(trained(plain_qkv, r=4, alpha=12, targets=["qkv"]), tmp_path)
    model = made(plain_qkv)
    apply_lora(model, LoRAConfig(r=2, alpha=6, targets="qv"))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"`1.qkv` is adapted in rows that the adapters in the model do not change"):
        load_adapter(model, tmp_path)
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["embed", "proj"], ["mlp.*"]])
def test_a_merged_model_is_saved_from_its_record(targets, tmp_path):
    model = trained(LM, r=2, alpha=6, targets=targets, also_train=["head"])
    save_adapter(model, tmp_path / "live")
    merge_lora(model)
    merged = snapshot(model)
    save_adapter(model, tmp_path / "merged")
    assert all(same_bits(value, merged[key]) for key, value in model.state_dict().items())
    assert contents(tmp_path / "live") == contents(tmp_path / "merged")
    assert close(out(in_peft(LM, tmp_path / "merged"), INDEX), out(model, INDEX))
    load_adapter(made(LM), tmp_path / "merged")  # the base that the header tells of is the one before the merge


def test_a_merged_tied_model_tells_of_the_tied_base(tmp_path):
    model = trained(gpt2, r=2, targets=["wte"])
    save_adapter(model, tmp_path / "live")
    merge_lora(model)
    save_adapter(model, tmp_path / "merged")
    assert contents(tmp_path / "live") == contents(tmp_path / "merged")
    with pytest.raises(ValueError, match="merged adapters: call `unmerge_lora"):
        load_adapter(model, tmp_path / "live")


def test_statistics_that_moved_travel(tmp_path):
    model = trained(LM, r=2, targets=["mlp.*"])
    model.train()(INDEX)
    save_adapter(model, tmp_path)
    assert close(out(in_peft(LM, tmp_path), INDEX), out(model, INDEX))
    bare = made(LM)
    load_adapter(bare, tmp_path)
    assert torch.equal(bare.bn.running_mean, model.bn.running_mean)
    with disable_lora(bare):
        assert torch.equal(out(bare, INDEX), out(made(LM), INDEX))


@pytest.mark.slow
def test_names_are_relative_to_the_inner_model(tmp_path):
    for make, inner, expected in (
        (lambda: Lit(LM), None, "base_model.model.blocks.0.mlp.0"),
        (lambda: Lit(LM), "", "base_model.model.model.blocks.0.mlp.0"),
        (lambda: Lit(LM), "model.blocks", "base_model.model.0.mlp.0"),
        (lambda: nn.ModuleDict({"net": LM()}), None, "base_model.model.net.blocks.0.mlp.0"),
    ):
        model = trained(make, r=2, targets=["mlp.*"])
        save_adapter(model, tmp_path, inner=inner)
        assert f"{expected}.lora_A.weight" in load_file(tmp_path / "adapter_model.safetensors")
        bare = made(make)
        assert load_adapter(bare, tmp_path, inner=inner) == [n for n, _ in bare.named_modules() if hasattr(_, "lora")]
        assert all(
            torch.equal(a, b) for (_, a), (_, b) in zip(lora_parameters(model), lora_parameters(bare), strict=True)
        )


class OneLayer(LightningModule):
    def __init__(self, make):
        super().__init__()
        self.layer = make()


@pytest.mark.filterwarnings("ignore:peft 0.21 adds the update")
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.MultiheadAttention(4, 2)])
def test_an_adapted_layer_is_not_the_inner_model(make, tmp_path):
    save_adapter(trained(lambda: OneLayer(make), targets=["layer"]), tmp_path)
    assert "base_model.model.layer.lora_A.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert load_adapter(made(lambda: OneLayer(make)), tmp_path)[0] == "layer"


def test_the_whole_transformers_model_is_the_inner_one(tmp_path):
    model = trained(lambda: Lit(gpt2), r=2, targets="attn")
    save_adapter(model, tmp_path)
    assert close(out(in_peft(gpt2, tmp_path), INDEX), out(model.model, INDEX))
    with pytest.raises(ValueError, match=r"`inner` must name a module, but got 'modle'. The nearest names are `model`"):
        save_adapter(model, tmp_path, inner="modle")


def test_what_trains_outside_of_the_inner_model_is_not_left_behind(tmp_path):
    model = trained(lambda: Lit(LM), r=2, targets=["mlp.*"], also_train=["scale"])
    with pytest.raises(ValueError, match=r"`scale.weight` belongs to the adapter and does not lie inside `model`"):
        save_adapter(model, tmp_path, inner="model")
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=r"`scale.weight` .* lies outside of `model`, .* relative to the Lit,"):
        save_adapter(model, tmp_path)
    theirs, bare = in_peft(lambda: Lit(LM), tmp_path), made(lambda: Lit(LM))
    load_adapter(bare, tmp_path)
    for loaded in (theirs.base_model.model, bare):
        assert close(out(loaded, INDEX), out(model, INDEX))
        assert close(loaded.scale(torch.ones(2)), model.scale(torch.ones(2)))


def test_the_header_tells_where_it_comes_from(tmp_path):
    model = trained(LM, r=2, targets=["mlp.*"], also_train=["head"])
    save_adapter(model, tmp_path, metadata={"step": "100", "val_loss": "0.25"})
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        header = file.metadata()
    assert (header["step"], header["val_loss"], header["format"]) == ("100", "0.25", "pt")
    assert LoRAConfig(**json.loads(header["lightning_lora.config"])) == LoRAConfig(
        r=2, targets=["mlp.*"], also_train=["head"]
    )
    base = json.loads(header["lightning_lora.base"])
    assert "blocks.0.mlp.0.weight" in base and "head.0.weight" not in base
    with pytest.raises(TypeError, match=r"`metadata` must be a dict of strings, but got 'step': 100. Write str"):
        save_adapter(model, tmp_path, metadata={"step": 100})
    with pytest.raises(ValueError, match="`metadata` has 'format', which the file itself uses"):
        save_adapter(model, tmp_path, metadata={"format": "np"})


@pytest.mark.slow
def test_another_base_is_an_error_or_a_warning(tmp_path):
    save_adapter(trained(LM, r=2, targets=["mlp.*"], also_train=["head"]), tmp_path)
    other = made(LM)
    other.embed.weight.data[0, 0] += 1
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"another base: `embed.weight` has other values. Load that base"):
        load_adapter(other, tmp_path)
    assert all(same_bits(value, before[key]) for key, value in other.state_dict().items())
    with pytest.warns(UserWarning, match="another base: `embed.weight` has other values"):
        load_adapter(other, tmp_path, strict_base=False)
    with pytest.warns(UserWarning, match="differs in low bits"):
        load_adapter(made(LM).bfloat16(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(made(LM), tmp_path)


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.body = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4)

    def forward(self, x):
        return self.body(x + self.token)


class Alike(nn.Module):
    """peft reads the point in a name as any character."""

    def __init__(self):
        super().__init__()
        self.axb, self.a = nn.Linear(4, 4), nn.ModuleDict({"b": nn.Linear(4, 4)})


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.overhead = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)


def convolution(**arguments):
    return of(lambda: nn.Conv2d(2, 4, 3, **arguments)), {"targets": ["0"]}


REFUSED = {
    "lstm": (of(lambda: nn.LSTM(4, 4)), {"targets": ["0"]}, r"`0` is a LSTM, which PEFT's format has no place for"),
    "bilinear": (of(lambda: nn.Bilinear(4, 4, 2)), {"targets": ["0"]}, r"`0` is a Bilinear"),
    "transposed": (of(lambda: nn.ConvTranspose2d(2, 2, 3)), {"targets": ["0"]}, r"`0` is a ConvTranspose2d"),
    "bag": (of(lambda: nn.EmbeddingBag(7, 4)), {"targets": ["0"]}, r"`0` is a EmbeddingBag"),
    "parameter": (LINEAR, {"targets": ["0.weight"]}, r"`0` is adapted by its parameter `weight`"),
    "groups": (*convolution(groups=2), r"`0` has groups=2, which peft's adapter does not follow"),
    "dilation": (*convolution(dilation=2), r"`0` has dilation=\(2, 2\), which"),
    "circular": (*convolution(padding=1, padding_mode="circular"), r"`0` has padding_mode='circular', which"),
    "max-norm": (of(lambda: nn.Embedding(7, 4, max_norm=1)), {"targets": ["0"]}, r"`0` has `max_norm`, which"),
    "own-forward": (of(lambda: Scaled(4, 4)), {"targets": ["0"]}, r"`0` is a Scaled with its own forward"),
    "own-lookup": (
        of(lambda: ScaledEmbedding(7, 4)),
        {"targets": ["0"]},
        r"`0` is a ScaledEmbedding with its own forward",
    ),
    "own-convolution": (
        of(lambda: StandardizedConv(2, 4, 3)),
        {"targets": ["0"]},
        r"`0` is a StandardizedConv with its own",
    ),
    "point": (
        Alike,
        {"targets": ["axb"], "also_train": ["a.b"]},
        r"`a.b` trains in full, .* peft would match `axb` by that name",
    ),
    "two-names": (
        lambda: Shared(nn.Linear(4, 4)),
        {"targets": ["first"]},
        r"`first` is used in several places, of which peft",
    ),
    "itself": (lambda: nn.Linear(4, 4), {"targets": "all"}, r"The model is the adapted layer itself"),
    "root-parameter": (
        Alone,
        {"targets": ["body"], "also_train": ["token"]},
        r"A parameter of the model itself trains",
    ),
    "heads": (Heads, {"targets": ["body"], "also_train": ["head"]}, r"peft would match `overhead` by that name too"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_express_is_refused_by_name(case, tmp_path):
    make, arguments, words = REFUSED[case]
    model = trained(make, **arguments)
    with pytest.raises(ValueError, match=words):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_goes_to_or_comes_from_the_meta_device(tmp_path):
    save_adapter(trained(LINEAR, r=2, targets="all"), tmp_path)
    with torch.device("meta"):
        empty, adapted = LINEAR(), LINEAR()
        apply_lora(adapted, LoRAConfig(r=2, targets="all"))
    with pytest.raises(ValueError, match=r"`0` is on the meta device, without values: load the base first"):
        load_adapter(empty, tmp_path, strict_base=False)
    with pytest.raises(ValueError, match=r"`0` is on the meta device, without values: load the base first"):
        save_adapter(adapted, tmp_path)


def test_a_fast_path_past_peft_is_told(tmp_path):
    model = trained(lambda: nn.ModuleDict({"layer": nn.TransformerEncoderLayer(4, 2, 8)}), r=2, targets=["linear1"])
    with pytest.warns(UserWarning, match=r"`layer.linear1` lies in an nn.TransformerEncoderLayer"):
        save_adapter(model, tmp_path)


def test_a_part_that_was_adapted_and_a_part_of_what_was(tmp_path):
    lit = made(lambda: Lit(LM))
    apply_lora(lit.model, LoRAConfig(r=2, targets=["re:blocks.0.mlp.0"], also_train=["re:head.2"]))
    train_by_hand(lit)
    save_adapter(lit, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head.2"]
    assert close(out(in_peft(LM, tmp_path), INDEX), out(lit, INDEX))
    with pytest.raises(ValueError, match=r"not adapted as one: a module around it was. Save what `apply_lora`"):
        save_adapter(lit.model.blocks, tmp_path)
    apply_lora(lit.scale, LoRAConfig(r=2, targets="all"))
    with pytest.raises(ValueError, match="not adapted as one: several parts of it were"):
        save_adapter(lit, tmp_path)


@pytest.mark.slow
def test_wrapped_modules_keep_their_names(tmp_path):
    model = trained(lambda: Lit(LM), r=2, targets=["mlp.*", "embed"], also_train=["head"], bias="lora_only")
    expected = out(model, INDEX)
    model.model = torch.compile(model.model, backend="eager")
    save_adapter(model, tmp_path)
    assert close(out(in_peft(LM, tmp_path), INDEX), expected)
    bare = made(lambda: Lit(LM))
    inner = bare.model
    bare.model = torch.compile(bare.model, backend="eager")
    assert load_adapter(bare, tmp_path)[0] == "model.embed"
    assert close(out(inner, INDEX), expected)


def test_a_file_is_no_directory_and_the_error_says_what_reads_it(tmp_path):
    (tmp_path / "last.ckpt").write_text("")
    with pytest.raises(ValueError, match=r"`directory` must be .* is a file. .* load_from_checkpoint\(cls, path\) or"):
        load_adapter(made(LINEAR), tmp_path / "last.ckpt")


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="The model has no adapters, so there is nothing to save"):
        save_adapter(made(LINEAR), tmp_path)
    with pytest.raises(ValueError, match="`flavor` must be one of 'peft', 'vllm', but got 'gguf'"):
        save_adapter(trained(LINEAR, targets="all"), tmp_path, flavor="gguf")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`directory` must be a directory"):
        save_adapter(trained(LINEAR, targets="all"), tmp_path / "file")


@pytest.mark.parametrize("arguments", [{}, {"rslora": True}, {"alpha_pattern": {"0": 3.0}, "rank_pattern": {"1": 9}}])
def test_vllm_gets_one_rank_and_one_scale(arguments, tmp_path):
    model = trained(LINEAR, r=2, alpha=6, targets="all", **arguments)
    save_adapter(model, tmp_path, flavor="vllm")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"} & config.keys()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert config["r"] == (16 if "rank_pattern" in arguments else 8)
    x = ROWS
    for name, layer in made(LINEAR).named_children():
        A, B = (tensors[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
        assert A.shape[0] == B.shape[1] == config["r"]
        x = layer(x) + config["lora_alpha"] / config["r"] * x @ A.T @ B.T
    assert close(x, out(model, ROWS))
    assert close(out(in_peft(LINEAR, tmp_path), ROWS), out(model, ROWS))


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (LM, {"targets": ["mlp.*"], "also_train": ["head"]}, r"`head.0.weight` is not part of a pair, and vLLM"),
        (LM, {"targets": ["mlp.*"], "bias": "lora_only"}, r"`blocks.0.mlp.0.base_layer.bias` is not part of a pair"),
        (LM, {"targets": ["embed"]}, r"`embed` is no linear layer"),
        (CASES["conv2d"][0], {"targets": ["0"]}, r"`0` is no linear layer"),
        (LINEAR, {"r": 600, "targets": ["0"]}, r"rank 600, and vLLM takes ranks up to 512"),
    ],
)
def test_what_vllm_refuses(make, arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        save_adapter(trained(make, **arguments), tmp_path / "new", flavor="vllm")
    assert not (tmp_path / "new").exists()


MISFITS = {
    "targets": ({"targets": ["mlp.0"]}, r"`blocks.0.mlp.1` has adapters in the file and not in the model"),
    "more": ({"targets": ["mlp.*", "proj"]}, r"`blocks.0.attn.proj` has adapters in the model and not in the file"),
    "rank": ({"r": 3, "alpha": 9}, r"`blocks.0.mlp.0` has rank 2 in the file and 3 in the model"),
    "alpha": ({"alpha": 4}, r"`blocks.0.mlp.0` has the scale 3 in the file and 2 in the model"),
    "also-train": ({"also_train": None}, r"holds `head.0.bias` of its base, and the model has other values"),
    "more-trained": ({"also_train": ["head", "bn"]}, r"it lacks `bn.weight`"),
}


@pytest.mark.filterwarnings("ignore:The adapter was trained on another base")
@pytest.mark.parametrize("case", MISFITS)
def test_a_configuration_that_does_not_fit(case, tmp_path):
    arguments = {"r": 2, "alpha": 6, "targets": ["mlp.*"], "also_train": ["head"]}
    save_adapter(trained(LM, **arguments), tmp_path)
    other, words = MISFITS[case]
    model = trained(LM, **{**arguments, **other})
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path, strict_base=False)
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())


def test_an_error_after_the_adapters_are_in_leaves_a_bare_model(tmp_path, monkeypatch):
    save_adapter(trained(LM, r=2, targets=["mlp.*"], also_train=["head"]), tmp_path)
    model = made(LM)
    model.embed.weight.requires_grad_(False)
    before, flags = snapshot(model), [parameter.requires_grad for parameter in model.parameters()]
    attributes = [set(vars(module)) for module in model.modules()]
    monkeypatch.setattr("lightning_lora.model.loading._load", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_adapter(model, tmp_path)
    assert list(model.state_dict()) == list(before)
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert type(model.blocks[0].mlp[0]) is nn.Linear


def test_training_goes_on_from_a_loaded_adapter(tmp_path):
    save_adapter(trained(LM, r=2, targets=["mlp.*"], also_train=["head"]), tmp_path)
    model = made(LM)
    load_adapter(model, tmp_path)
    copied = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(INDEX).square().sum().backward()
    optimizer.step()
    moved = {
        n for (n, a), (_, b) in zip(model.named_parameters(), copied.named_parameters(), strict=True) if (a != b).any()
    }
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in moved} == {"blocks", "head"}


@pytest.mark.slow
def test_two_processes_write_one_sharded_adapter(tmp_path):
    done = run_script("peft_two_processes.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
