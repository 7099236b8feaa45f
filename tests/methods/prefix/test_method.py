"""Prefix tuning of models of Hugging Face, against a cache that holds the prefix, and against peft."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lightning_lora.methods.prefix.config import PrefixConfig
from lightning_lora.methods.prefix.method import PrefixMethod
from tests.helpers import zoo
from tests.helpers.selection import slow_except

LENGTH = 3
# What trains and what is refused, by architecture of `tests/helpers/zoo.py`.
TRAINED = [
    *("gpt2", "gpt2_cross", "gpt_neox", "falcon", "falcon_40b", "opt", "llama", "gemma3", "deepseek_v3", "mixtral"),
    *(
        "bert_cross",
        "distilbert",
        "modernbert",
        "t5",
        "bart",
        "vit",
        "swin",
        "whisper",
        "clip",
        "qwen2_vl",
        "diffllama",
    ),
]
NO_KERNEL = "for which transformers has no attn_implementation='sdpa'"
REFUSED = {
    "gptj": NO_KERNEL,
    "bloom": NO_KERNEL,
    "gemma2": NO_KERNEL,
    "deberta_v2": NO_KERNEL,
    "longformer": NO_KERNEL,
    "minimax": "`model.layers.0.self_attn` computes attention without `F.scaled_dot_product_attention`",
    "deformable_detr": "could not be run alone, so the sizes of its heads are not known",
    "mamba": "A prefix needs attention blocks, and none was found in MambaForCausalLM",
}
# By name of timm: arguments, and the words of the refusal.
TIMM = {
    "vit_tiny_patch16_224": (zoo.SMALL_VIT, ""),
    "deit3_small_patch16_224": (zoo.SMALL_VIT, ""),
    "eva02_tiny_patch14_224": (zoo.SMALL_VIT, ""),
    "beit_base_patch16_224": (zoo.SMALL_VIT, ""),
    "swin_tiny_patch4_window7_224": (zoo.SMALL_SWIN, "cannot act: set its attribute `fused_attn` to True"),
    "cait_xxs24_224": (zoo.SMALL_VIT, "computes attention without `F.scaled_dot_product_attention`"),
    "resnet18": ({}, "A prefix needs attention blocks, and none was found in ResNet"),
}
FAST = ["gpt2", "llama", "bert_cross", "gptj", "mamba"]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of the architectures themselves
    pytest.mark.usefixtures("quiet_transformers"),
]


def adapted(name: str) -> tuple[nn.Module, dict]:
    """A model of the zoo with prefixes large enough to matter."""
    model, inputs = zoo.build(zoo.CASES[name])
    PrefixMethod(PrefixConfig(length=LENGTH, seed=1)).complete(model)
    with torch.no_grad():
        for module in prefixes(model):
            module.K *= 40
            module.V *= 40
    return model, inputs


def prefixes(model: nn.Module) -> list[nn.Module]:
    return [module.prefix for module in model.modules() if hasattr(module, "prefix")]


def cache_of(model: nn.Module, batch: int) -> transformers.DynamicCache:
    """What a cache holds that has seen the prefix."""
    cache = transformers.DynamicCache()
    for layer, prefix in enumerate(prefixes(model)):
        keys, values = (p.detach().expand(batch, -1, -1, -1) for p in (prefix.K, prefix.V))
        cache.update(keys, values, layer)
    return cache


def plain(name: str) -> nn.Module:
    return zoo.build(zoo.CASES[name])[0]


@pytest.mark.parametrize("name", slow_except(FAST, TRAINED))
def test_one_step_gives_every_prefix_a_gradient(name):
    model, inputs = adapted(name)
    zoo.output(model, inputs).square().sum().backward()
    idle = [key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == [] and prefixes(model)


@pytest.mark.parametrize("name", slow_except(FAST, REFUSED))
def test_what_cannot_have_a_prefix_is_refused(name):
    model, _ = zoo.build(zoo.CASES[name])
    with pytest.raises(ValueError) as caught:
        PrefixMethod(PrefixConfig()).complete(model)
    assert REFUSED[name] in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    arguments, words = TIMM[name]
    model = timm.create_model(name, **arguments)
    if words:
        with pytest.raises(ValueError) as caught:
            PrefixMethod(PrefixConfig(length=LENGTH)).complete(model)
        assert words in str(caught.value)
        blocks = [module for module in model.modules() if getattr(module, "fused_attn", None) is False]
        if "fused_attn" not in words:
            return
        for block in blocks:
            block.fused_attn = True
    PrefixMethod(PrefixConfig(length=LENGTH)).complete(model)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert prefixes(model) and all(
        parameter.grad.any() for prefix in prefixes(model) for parameter in (prefix.K, prefix.V)
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_equals_a_cache_that_holds_the_prefix(name, padded):
    model, inputs = adapted(name)
    tokens, mask = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    if padded:
        mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    base = plain(name)
    with torch.no_grad():
        output = model(tokens, attention_mask=mask, position_ids=positions).logits
        # A cache shifts the positions of the tokens by its length, unless they are given.
        expected = base(
            tokens,
            attention_mask=torch.cat([mask.new_ones(len(mask), LENGTH), mask], 1),
            position_ids=positions,
            past_key_values=cache_of(model, len(tokens)),
        ).logits
        assert not torch.allclose(output, base(tokens, attention_mask=mask, position_ids=positions).logits, atol=1e-3)
    torch.testing.assert_close(output[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", slow_except(["llama"], ["llama", "gpt2", "falcon", "gemma3", "deepseek_v3"]))
def test_generation_with_a_cache_sees_the_prefix_once(name):
    model, inputs = adapted(name)
    tokens, arguments = inputs["input_ids"], {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, **arguments, return_dict_in_generate=True, output_logits=True)
    whole = model.generate(tokens, **arguments, use_cache=False, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-5)
    assert cached.past_key_values.get_seq_length() == cached.sequences.shape[1] - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bart", "t5", "marian"])
def test_generation_with_a_cache_of_cross_attention(name):
    model, inputs = adapted(name)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 1, "do_sample": False}
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    runs = [model.generate(inputs["input_ids"], **arguments, use_cache=cache) for cache in (True, False)]
    torch.testing.assert_close(*(torch.stack(run.logits) for run in runs), rtol=1e-4, atol=1e-5)


def test_it_equals_peft_where_positions_are_the_same():
    """peft's prefix is in a cache, so the positions of the tokens that it is given make up for its length."""
    peft = pytest.importorskip("peft")
    model, inputs = adapted("llama")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    other = peft.get_peft_model(plain("llama"), config)
    rows = [p.transpose(0, 1).flatten(1) for prefix in prefixes(model) for p in (prefix.K, prefix.V)]
    other.prompt_encoder["default"].embedding.weight.data = torch.cat(rows, 1)
    tokens = inputs["input_ids"]
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    base = other.get_base_model()
    with torch.no_grad():
        cache = other.get_prompt(batch_size=len(tokens))
        expected = base(tokens, past_key_values=cache, position_ids=positions).logits
        output = model(tokens).logits
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_one_graph_of_a_whole_model_when_compiled():
    model, inputs = adapted("llama")
    expected = model(**inputs, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(use_reentrant):
    grads = []
    for checkpointing in (False, True):
        model, inputs = adapted("llama")
        model.train().config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**inputs).logits.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None and p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True)) and grads[0]


def test_a_switch_to_eager_attention_is_an_error():
    model, inputs = adapted("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"`model.layers.0.self_attn` computed its output without"):
        model(**inputs)


def test_remove_gives_the_base_back():
    model, inputs = adapted("llama")
    PrefixMethod(PrefixConfig(length=LENGTH)).remove(model)
    base = plain("llama")
    assert list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
