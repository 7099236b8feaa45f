"""Prompts in models of Hugging Face, against the plain models on longer inputs with positions given by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora.methods.prompt.config import PromptConfig
from lightning_lora.methods.prompt.method import PromptMethod
from tests.helpers import zoo
from tests.helpers.selection import slow_except

LENGTH = 3
# What trains and what is refused, by architecture of `tests/helpers/zoo.py`; refused at the start or in the first step.
TRAINED = [
    *("gpt2", "gpt2_cross", "gptj", "gpt_neox", "falcon", "opt", "llama", "gemma3", "llama4", "deepseek_v3", "mixtral"),
    *("bert_cross", "distilbert", "modernbert", "bart", "marian", "vit", "whisper", "clip", "siglip", "albert"),
]
REFUSED = {
    "t5": "gets positions that are computed in a block, by",
    "swin": "gets positions that are computed in a block, by",
    "recurrent_gemma": "gets positions that are computed in a block, by",
    "segformer": "has a convolution, ",
    "mamba": "A prompt needs transformer blocks, and none was found in MambaForCausalLM",
    "falcon_rw": "gets `alibi`, which depends on the 8 tokens",
    "mpt": "gets `attention_mask`, which depends on the 8 tokens",
    "deberta_v2": "gets `relative_pos`, which depends on the 8 tokens",
    "detr": "gets `spatial_position_embeddings`, which depends on the 16 tokens",
    "timesformer": "fails with a prompt before its tokens, though it may run without one (shape",
    "patchtst": "must get a sequence of shape (batch, length, features) for a prompt",
}
# By name of timm: arguments, and the words of the refusal.
TIMM = {
    "vit_tiny_patch16_224": (zoo.SMALL_VIT, ""),
    "deit3_small_patch16_224": (zoo.SMALL_VIT, ""),
    "deit_tiny_distilled_patch16_224": (zoo.SMALL_VIT, ""),
    "eva02_tiny_patch14_224": (zoo.SMALL_VIT, "gets `rope`, which depends on the 17 tokens"),
    "beit_base_patch16_224": (zoo.SMALL_VIT, "gets positions that are computed in a block, by"),
    "swin_tiny_patch4_window7_224": (zoo.SMALL_SWIN, "gets positions that are computed in a block, by"),
    "resnet18": ({}, "A prompt needs transformer blocks, and none was found in ResNet"),
}
FAST = ["gpt2", "llama", "bert_cross", "t5", "mamba", "falcon_rw"]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of the architectures themselves
    pytest.mark.usefixtures("quiet_transformers"),
]


def adapted(name: str, deep: bool = False) -> tuple[nn.Module, dict]:
    """A model of the zoo with prompts large enough to matter."""
    model, inputs = zoo.build(zoo.CASES[name])
    PromptMethod(PromptConfig(length=LENGTH, deep=deep, seed=1)).complete(model)
    with torch.no_grad():
        for vectors in vectors_of(model):
            vectors *= 40
    return model, inputs


def vectors_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith(".prompt.vectors")]


def plain(name: str) -> nn.Module:
    return zoo.build(zoo.CASES[name])[0]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", slow_except(FAST, TRAINED))
def test_one_step_gives_every_prompt_a_gradient(name, deep):
    model, inputs = adapted(name, deep)
    zoo.output(model, inputs).square().sum().backward()
    assert vectors_of(model) and all(vectors.grad.any() for vectors in vectors_of(model))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", slow_except(FAST, REFUSED))
def test_what_a_prompt_cannot_pass_is_refused(name, deep):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        model, inputs = adapted(name, deep)
        zoo.output(model, inputs)
    assert REFUSED[name] in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, deep):
    timm = pytest.importorskip("timm")
    arguments, words = TIMM[name]
    model, method = timm.create_model(name, **arguments), PromptMethod(PromptConfig(length=LENGTH, deep=deep))
    if words:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            method.complete(model)
            model(torch.randn(2, 3, 32, 32))
        assert words in str(caught.value)
        return
    method.complete(model)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert vectors_of(model) and all(vectors.grad.any() for vectors in vectors_of(model))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_at_the_first_block_it_is_a_longer_input_whose_tokens_keep_their_positions(name, padded):
    model, inputs = adapted(name)
    tokens, mask = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    if padded:
        mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    base = plain(name)
    (vectors,) = vectors_of(model)
    if name == "gpt2":  # it adds the position of each input
        vectors = vectors - base.transformer.wpe.weight[0]
    longer = nn.functional.pad
    with torch.no_grad():
        output = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        expected = base(
            inputs_embeds=torch.cat([vectors.expand(len(tokens), -1, -1), base.get_input_embeddings()(tokens)], 1),
            attention_mask=longer(mask, (LENGTH, 0), value=1),
            position_ids=longer(positions, (LENGTH, 0)),
            use_cache=False,
        ).logits[:, LENGTH:]
    torch.testing.assert_close(output[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("deep", [False, True])
def test_an_image_model_by_its_blocks(deep):
    """VPT of Jia et al. 2022, equations 4 and 5 and equations 6 and 7."""
    model, inputs = adapted("vit", deep)
    vit = plain("vit").vit
    x = vit.embeddings(**inputs)
    vectors = [v.expand(len(x), -1, -1) for v in vectors_of(model)]
    for index, layer in enumerate(vit.layers):
        if deep or index == 0:
            x = torch.cat([vectors[index], x], 1)
        output = layer(x)
        x = output[0] if isinstance(output, tuple) else output
        if deep:
            x = x[:, LENGTH:]
    expected = vit.layernorm(x if deep else x[:, LENGTH:])
    output = model.vit(**inputs).last_hidden_state
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("deep", [False, True])
def test_padding_has_no_influence(deep):
    model, inputs = adapted("bert_masked", deep)
    tokens, mask = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    mask[:, 5:] = 0
    other = tokens.clone()
    other[:, 5:] = 7
    with torch.no_grad():
        output, changed = (model(ids, attention_mask=mask).logits[:, :5] for ids in (tokens, other))
        short = model(tokens[:, :5]).logits
    assert torch.equal(output, changed)
    torch.testing.assert_close(output, short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("deep", [False, True])
def test_generation_without_a_cache(deep):
    model, inputs = adapted("llama", deep)
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 97}
    with pytest.raises(RuntimeError, match=r"`model.layers.0` gets a cache with earlier tokens as `past_key_values`"):
        model.generate(inputs["input_ids"], **arguments)
    tokens = inputs["input_ids"]
    generated = model.generate(tokens, **arguments, use_cache=False)
    for _ in range(4):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("deep", [False, True])
def test_one_graph_of_a_whole_model_when_compiled(deep):
    model, inputs = adapted("llama", deep)
    expected = model(**inputs, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model, inputs = adapted("llama", deep=True)
        model.train().config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**inputs).logits.square().sum().backward()
        gradients.append([vectors.grad for vectors in vectors_of(model)])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_mixed_stack_is_passed_whole():
    """Layers without attention between those with it see the prompt too."""
    model, inputs = adapted("qwen3_next")
    zoo.output(model, inputs).square().sum().backward()
    assert all(vectors.grad.any() for vectors in vectors_of(model))


def test_remove_gives_the_base_back():
    model, inputs = adapted("llama")
    PromptMethod(PromptConfig(length=LENGTH)).remove(model)
    base = plain("llama")
    assert list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
