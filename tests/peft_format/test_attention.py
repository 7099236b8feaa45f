"""``nn.MultiheadAttention`` in PEFT's format: peft's outputs both ways, or an error by name."""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, load_adapter, lora_state_dict, merge_lora, save_adapter
from lightning_lora.cli.merge import merge_files
from lightning_lora.peft_format.attention import ranks_of_projections
from tests.helpers.oracles import train_by_hand
from tests.helpers.selection import slow_except

peft = pytest.importorskip("peft")
X = torch.linspace(-1, 1, 48).reshape(2, 3, 8)
TWICE = "ignore:peft 0.21 adds the update"


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")
        yield
    logging.disable(logging.NOTSET)


class AttentionBlock(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(8, 2, batch_first=True, **sizes), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.mlp(self.attn(x, x, x, need_weights=False)[0])


def made(make=lambda: nn.Sequential(AttentionBlock(), AttentionBlock())):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().eval()


def adapted(**arguments):
    model = made()
    return model, apply_lora(model, LoRAConfig(**{"r": 2, "alpha": 6, **arguments}))


def trained(**arguments):
    model, _ = adapted(**arguments)
    train_by_hand(model)
    return model


def move(named, factor):
    generator = torch.Generator().manual_seed(3)
    for _, parameter in named:
        parameter.data += factor * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def out(model):
    return model.eval()(X)


def in_peft(directory):
    return peft.PeftModel.from_pretrained(made(), str(directory))


def shapes(directory):
    return {key: tuple(value.shape) for key, value in load_file(directory / "adapter_model.safetensors").items()}


CASES = {
    "whole": {"targets": ["attn"]},
    "query-and-value": {"targets": "qv"},
    "one-projection": {"targets": ["attn.k"]},
    "output-alone": {"targets": ["out_proj"]},
    "ranks-and-scales": {
        "targets": "attn",
        "rank_pattern": {"attn.k": 3, "out_proj": 9},
        "alpha_pattern": {"attn.v": 7, "out_proj": 3},
    },
    "rslora": {"targets": ["attn"], "rslora": True, "alpha": 1},
    "biases": {"targets": ["attn", "mlp"], "bias": "all"},
    "biases-of-adapted": {"targets": ["attn"], "bias": "lora_only"},
    "also-train": {"targets": ["attn"], "also_train": ["1.mlp"]},
}


@pytest.mark.filterwarnings(TWICE)
@pytest.mark.parametrize("case", slow_except(["whole", "ranks-and-scales", "biases", "also-train"], CASES))
def test_peft_gives_the_same_outputs_and_both_ways_back_do(case, tmp_path):
    model = trained(**CASES[case])
    move(((n, p) for n, p in model.named_parameters() if p.requires_grad and ".lora." not in n), 0.1)
    expected = out(model)
    assert not torch.allclose(expected, out(made()), atol=1e-3)
    save_adapter(model, tmp_path / "first")
    torch.testing.assert_close(out(in_peft(tmp_path / "first")), expected, rtol=1e-5, atol=1e-5)

    bare, (fitting, names) = made(), adapted(**CASES[case])
    assert load_adapter(bare, tmp_path / "first") == names == load_adapter(fitting, tmp_path / "first")
    for loaded in (bare, fitting):
        torch.testing.assert_close(out(loaded), expected, rtol=1e-5, atol=1e-6)
        state = lora_state_dict(loaded)
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in lora_state_dict(model).items()
        }
    for key, value in lora_state_dict(model).items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=0)
    save_adapter(bare, tmp_path / "again")
    assert shapes(tmp_path / "again") == shapes(tmp_path / "first")


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": ["attn"]},
        {"target_modules": r"1\.attn", "use_rslora": True},
        {"target_modules": ["attn", "mlp"], "rank_pattern": {"0.attn": 4}, "alpha_pattern": {"1.attn": 3}},
    ],
)
@pytest.mark.filterwarnings(TWICE)
def test_what_peft_wrote_gives_peft_s_outputs(arguments, tmp_path):
    theirs = peft.get_peft_model(made(), peft.LoraConfig(r=2, lora_alpha=5, **arguments))
    move(((n, p) for n, p in theirs.named_parameters() if p.requires_grad), 0.2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = made()
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(out(model), out(theirs), rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(out(in_peft(tmp_path / "ours")), out(theirs), rtol=1e-5, atol=1e-5)
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    with torch.no_grad():
        merge_lora(model)
    torch.testing.assert_close(out(model), out(theirs.merge_and_unload()), rtol=1e-5, atol=1e-5)


def test_adapters_that_are_there_take_what_peft_wrote(tmp_path):
    """Each of q, k and v has the rank of peft's pair, so each takes its A: as ``init_from`` does."""
    theirs = peft.get_peft_model(made(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["attn"]))
    move(((n, p) for n, p in theirs.named_parameters() if p.requires_grad), 0.2)
    theirs.save_pretrained(str(tmp_path))
    model, _ = adapted(targets=["attn"])
    load_adapter(model, tmp_path)
    torch.testing.assert_close(out(model), out(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings(TWICE)
def test_files_merge_into_files(tmp_path):
    from safetensors.torch import save_file

    model = trained(targets="attn")
    save_adapter(model, tmp_path / "adapter")
    save_file(made().state_dict(), tmp_path / "base.safetensors")
    merge_files(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    merged = made()
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(out(merged), out(model), rtol=1e-5, atol=1e-6)


def test_one_warning_names_all_halved_updates(tmp_path):
    with pytest.warns(UserWarning) as caught:
        save_adapter(trained(targets=["attn"]), tmp_path)
    assert [str(warning.message) for warning in caught] == [
        "peft 0.21 adds the update of `0.attn.out_proj` (and 1 more) twice, so the file has half of it, and peft's "
        "outputs are those of the model. A later peft that adds it once would apply half of it."
    ]


def test_a_file_of_a_later_peft_gives_a_warning(tmp_path):
    theirs = peft.get_peft_model(made(), peft.LoraConfig(target_modules=["attn"]))
    theirs.save_pretrained(str(tmp_path))
    load_adapter(made(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": "0.22.0.dev0"}))
    with pytest.warns(UserWarning, match=r"peft 0\.22 wrote an adapter of an nn.MultiheadAttention"):
        load_adapter(made(), tmp_path)


def test_a_target_that_peft_bypasses_is_refused(tmp_path):
    peft.get_peft_model(made(), peft.LoraConfig(target_modules=["out_proj"])).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"`0.attn.out_proj` lies in an nn.MultiheadAttention, which bypasses peft's"):
        load_adapter(made(), tmp_path)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, query):
        return super().forward(query, query, query)[0]


REFUSED = {
    "sizes": (lambda: nn.Sequential(AttentionBlock(kdim=8, vdim=6)), {}, r"with another `kdim` or `vdim`, which peft"),
    "own-forward": (
        lambda: nn.Sequential(OwnAttention(8, 2)),
        {},
        r"`0` belongs to a OwnAttention with its own forward",
    ),
    "output-in-full": (
        lambda: nn.Sequential(AttentionBlock()),
        {"targets": ["attn.q"], "also_train": ["out_proj"]},
        r"`0.attn.out_proj` trains in full inside an nn.MultiheadAttention with adapters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_express_is_refused_by_name(case, tmp_path):
    make, arguments, words = REFUSED[case]
    model = made(make)
    apply_lora(model, LoRAConfig(**{"targets": "attn", **arguments}))
    with pytest.raises(ValueError, match=words):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("targets", ["attn", ["out_proj"]])
def test_the_attention_itself_is_no_model(targets, tmp_path):
    model = made(lambda: nn.MultiheadAttention(8, 2))
    apply_lora(model, LoRAConfig(targets=targets))
    with pytest.raises(ValueError, match="The model is the adapted layer itself"):
        save_adapter(model, tmp_path / "new")


@pytest.mark.filterwarnings(TWICE)
def test_vllm_takes_no_attention(tmp_path):
    with pytest.raises(ValueError, match=r"`0.attn` is no linear layer"):
        save_adapter(trained(targets=["attn"]), tmp_path / "new", flavor="vllm")


def test_columns_show_whose_they_are():
    q, v, zero = torch.eye(6)[:, :1], torch.eye(6)[:, 5:], torch.zeros(6, 1)
    assert ranks_of_projections(torch.cat([q, q, v], 1)) == {"q": 2, "v": 1}
    for mixed in ([v, q], [q + v], [q, zero, v]):
        B = torch.cat(mixed, 1)
        assert ranks_of_projections(B) == {"q": B.shape[1], "k": B.shape[1], "v": B.shape[1]}
