"""Regular expressions of strangers: those that people write match as with `re`, and none takes for ever."""

from __future__ import annotations

import re
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora import LoRAConfig
from lightning_lora.patterns import expression as module
from lightning_lora.patterns.expression import Expression

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.v_proj",
    "blocks.3.attn.proj",
    "language_model.layers.3.self_attn.k_proj",
    "model.layers.1.attention.query_key_value",
    "model.layers.23.mlp.gate_proj",
    "model.language_model.layers.7.mlp.down_proj",
    "base.vision_tower.encoder.layers.3.self_attn.out_proj",
    "vision_model.blocks.2.attn.qkv",
    "visual.transformer.resblocks.4.mlp.c_fc",
    "decoder.block.1.layer.0.SelfAttention.q",
    "transformer_blocks.5.attn.to_out.0",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k",
    "encoder.mid_block.resnets.1.conv2",
    "multi_modal_projector.linear_1",
    "model.text_model.layers.0.mlp.up_proj",
    "transformer.h.10.attn.query_key_value",
    "perceiver_resampler.layers.0.k_proj",
    "custom_text_proj",
    "model.1.mlp.down_proj",
    "model.decoder.layers.4.fc1",
    "model.decoder.layers.4.self_attn.v_proj",
    "model.decoder.layers.5.fc1",
    "lm_head",
    "0",
]
# The kinds that the documentation of peft, its issues and the configurations of trainers built on it show.
WRITTEN = [
    r".*\.(q|v)_proj",
    r".*\.(q_proj|v_proj)$",
    r"^(?!.*lm_head).*proj$",
    r"model\.layers\.\d+\..*",
    r"model\.layers\.[0-3]\.(self_attn|mlp)\.(q_proj|k_proj|gate_proj)",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r".*\.(?!5\b)\d+\.fc1",
    r".*\.(?!11)\d+\.self_attn\.v_proj$",
    r"^blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))$",
    r".*visual\.transformer\.resblocks\.\d+\.(attn\.out_proj|mlp\.c_fc|mlp\.c_proj)",
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    r"language_model\.layers\.\d+\.self_attn\.(q|k|v)_proj",
    r"model.language_model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj",
    r"model\.language_model\.layers\.[\d]+\.(_checkpoint_wrapped_module\.)?(mlp|self_attn)\.(up|down|gate)_proj",
    r"^(model\.language_model(?=\.).*\.(down_proj|out_proj|up_proj))$",
    r"(.*(model.text_model).*(down_proj|gate_proj|up_proj).*$|.*(custom_text_proj).*$)",
    r".*(text_model|modality_projection|perceiver_resampler).*(down_proj|up_proj|k_proj).*$",
    r".*multi_modal_projector.*linear.*",
    r".*\.1.*query_key_value",
    r".*encoder.*(conv|conv1|conv2|to_q|to_k|to_v|to_out\.0)$",
    r".*\.(1|2)\..*(gate_proj|down_proj)",
    r".*lin.*",
    r"(?:.*?(?:vision|image|visual|patch_embed|img).*?(?:self_attn|attention|attn|mlp|dense).*?(?:out_proj|qkv|c_fc).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|v_proj|gate_proj)))",
    r"(?:.*\.)?attn[12]?\.to_(?:q|k|v|out\.0)$",
    r"transformer_blocks\.(?:[0-9]|1[0-8])\.attn\.(?:to_q|to_out\.0)",
    r"(?:down|up)_blocks\.\d\.attentions\.\d\.transformer_blocks\.\d\.attn1\.to_[kqv]",
    r"(?i).*selfattention\.Q",
    r"(?<!\w)model(?:\.\w+){0,3}\.\d{1,2}\..+",
    r".*(?<!vision_tower).*\.layers\.(?:0|1[0-9])\..*_proj",
    r"^(?=.*layers)(?!.*mlp).*proj$",
    r"[^.]+\.layers\.\d+\.(?:\w+\.)?mlp\.\w+",
    "|".join(re.escape(f"model.layers.{i}.mlp.gate_proj") for i in range(60)),
]


@pytest.mark.parametrize("most", [0, module.FEW_WAYS], ids=["by places", "as it is"])
@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_people_write_matches_as_with_re(pattern, most, monkeypatch):
    monkeypatch.setattr(module, "FEW_WAYS", most)
    expression = Expression(pattern)
    assert [expression.fullmatch(name) for name in NAMES] == [bool(re.fullmatch(pattern, name)) for name in NAMES]
    assert [expression.match(name) for name in NAMES] == [bool(re.match(pattern, name)) for name in NAMES]


def test_the_patterns_match_something():
    assert len(WRITTEN) >= 30
    assert not [pattern for pattern in WRITTEN if not any(map(Expression(pattern).fullmatch, NAMES))]


# `re` needs more than a lifetime for some of these.
LONG = ["a" * 400, "a" * 399 + "b", "." * 400, "=".join("a" * 200)]
SLOW_IN_RE = {
    r"(a|a)*$": [True, False, False, False],
    r"(a|aa)+$": [True, False, False, False],
    r"(.*a){20}": [True, False, False, True],
    r".*.*.*.*.*.*.*.*=.*": [False, False, False, True],
    r"(?:.*?a.*?a.*?a.*?a.*?a.*?a.*?a)x": [False] * 4,
    r"(?:a?){200}a{400}": [True, False, False, False],
    r"(?=(?:.*a){9}b)(?:a|b)+": [False, True, False, False],
}


@pytest.mark.parametrize(("pattern", "expected"), SLOW_IN_RE.items())
def test_expressions_with_many_ways_through_them_end(pattern, expected):
    assert [Expression(pattern).fullmatch(name) for name in LONG] == expected


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a+)+$", "repeat without a bound inside another"),
        (r"(?:\w+\.)*q_proj", "write `.*` for both"),
        ("(?:(?:a*)b|c){2,}", "repeat without a bound inside another"),
        (r"(a)\1", "back-references are not allowed"),
        (r"(a)?(?(1)b|c)", "conditions are not allowed"),
        ("a{99999999999}", "repetition number is too large"),
        ("(?:ab){4000000000}", "would take too long"),
        ("(?:(?:ab){1000}c){2000}", "would take too long"),
        ("(" * 3000 + ")" * 3000, "nested too deeply"),
        ("a" * 200_001, "200,001 characters"),
        ("(?m)^a$", "only the flags"),
        ("(", "missing \\), unterminated"),
        ("a(\x1b", r"missing \)"),
        ("(?\x1b", "unknown extension"),
    ],
)
def test_what_is_not_allowed_is_said(pattern, words):
    with pytest.raises(ValueError, match=words) as caught:
        Expression(pattern)
    assert len(str(caught.value)) < 250 and str(caught.value).isprintable()


def test_the_user_reads_which_argument_has_it():
    with pytest.raises(ValueError, match=r"`targets` has 're:\(a\+\)\+\$', which cannot be used as a regular"):
        LoRAConfig(targets=["re:(a+)+$"])
    with pytest.raises(ValueError, match="`rank_pattern` has"):
        LoRAConfig(rank_pattern={r"re:(a)\1": 4})


characters = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\.", r"\d", r"\w", "0", "(?i:A)", "ab", r"\b", "^", "$"])
patterns = st.recursive(
    characters,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "*?", "+?", "{2,}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map(lambda text: f"(?={text})"),
        inner.map(lambda text: f"(?!{text})"),
        st.just("(?<!b)"),
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@given(patterns, st.lists(st.text("ab.0A", min_size=1, max_size=7), min_size=5, max_size=5))
def test_any_expression_that_is_allowed_matches_as_with_re(pattern, names):
    with mock.patch.object(module, "FEW_WAYS", 0):  # all by sets of places
        try:
            expression = Expression(pattern)
        except ValueError:
            return
    for name in names:
        assert expression.fullmatch(name) == bool(re.fullmatch(pattern, name))
        assert expression.match(name) == bool(re.match(pattern, name))
