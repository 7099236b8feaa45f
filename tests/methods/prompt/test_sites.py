"""Which blocks a prompt passes, and what is said of those that it cannot pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora.methods.prompt.config import PromptConfig
from lightning_lora.methods.prompt.method import PromptMethod
from tests.helpers import zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of the architectures themselves
    pytest.mark.usefixtures("quiet_transformers"),
]


def complete(model: nn.Module, **arguments: object) -> list[str]:
    return PromptMethod(PromptConfig(length=2, **arguments)).complete(model)


def error_of(model: nn.Module, **arguments: object) -> str:
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError) as caught:
        complete(model, **arguments)
    assert classes == [type(module) for module in model.modules()]
    return str(caught.value)


def two_stacks() -> nn.Transformer:
    return nn.Transformer(8, 2, 3, 2, 16)


def test_the_first_block_of_every_stack():
    model = two_stacks()
    assert complete(model) == ["encoder.layers.0", "decoder.layers.0"] == complete(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name: tuple(p.shape) for name, p in trained.items()} == {
        "encoder.layers.0.prompt.vectors": (2, 8),
        "decoder.layers.0.prompt.vectors": (2, 8),
    }
    passed = [name for name, module in model.named_modules() if hasattr(module, "prompt")]
    blocks = [f"encoder.layers.{n}" for n in range(3)] + [f"decoder.layers.{n}" for n in range(2)]
    assert passed == ["encoder", *blocks]  # torch's encoder would make nested tensors
    PromptMethod(PromptConfig(length=2)).remove(model)
    assert not any(hasattr(module, "prompt") for module in model.modules())


def test_every_block():
    assert complete(two_stacks(), deep=True) == [
        *(f"encoder.layers.{n}" for n in range(3)),
        *(f"decoder.layers.{n}" for n in range(2)),
    ]


def test_names_leave_blocks_out():
    assert complete(two_stacks(), exclude=["decoder"]) == ["encoder.layers.0"]
    assert complete(two_stacks(), exclude=["encoder.layers.0", "decoder"]) == ["encoder.layers.1"]
    assert complete(two_stacks(), exclude=["*.0"], deep=True) == [
        "encoder.layers.1",
        "encoder.layers.2",
        "decoder.layers.1",
    ]
    assert error_of(two_stacks(), exclude=["encoder", "decoder"]) == (
        "All blocks of Transformer are left out by `exclude=['encoder', 'decoder']`."
    )


def test_a_model_without_blocks():
    message = error_of(nn.Sequential(nn.Linear(4, 4)))
    assert message.startswith("A prompt needs transformer blocks, and none was found in Sequential. LoRACallback(")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "t5",
            "computed in a block, by `encoder.block.0.layer.0.SelfAttention.relative_attention_bias`",
        ),
        (
            "swin",
            "positions that are computed in a block, by `swin.encoder.layers.0.blocks.0.attention.relative_position",
        ),
        ("idefics", "positions that are computed in a block, by `model.layers.0.self_attn.rotary_emb`"),
        (
            "convbert",
            "has a convolution, `attention.self.key_conv_attn_layer.depthwise`, which would mix the prompt with",
        ),
    ],
)
def test_blocks_that_a_prompt_cannot_pass(name, words):
    model, _ = zoo.build(zoo.CASES[name])
    for deep in (False, True):
        assert words in error_of(model, deep=deep)


def test_no_part_of_a_stack_with_inner_positions_is_offered():
    model, _ = zoo.build(zoo.CASES["t5"])
    message = error_of(model, deep=True)
    assert "`encoder.block.0` (and 1 more) gets positions" in message and "exclude" not in message
    assert "`encoder.block.1` gets positions" in error_of(model, deep=True, exclude=["*.block.0"])


def test_what_lies_beside_the_blocks_may_know_positions():
    model = nn.Sequential(nn.Sequential(), *(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)))
    model[0].add_module("position_embeddings", nn.Embedding(4, 8))
    assert complete(model) == ["1"]


def test_blocks_that_training_may_skip():
    model, _ = zoo.build(zoo.CASES["wav2vec2"])
    message = error_of(model)
    assert "may be skipped in training, as `layerdrop` of Wav2Vec2Config is not 0" in message
    assert "set that to 0, or take deep=True" in message
    assert len(complete(model, deep=True)) == 2
    PromptMethod(PromptConfig(length=2)).remove(model)
    model.config.layerdrop = 0.0
    assert len(complete(model)) == 1


def test_what_would_bypass_the_prompt():
    model = two_stacks()
    model.encoder.layers[1].forward = model.encoder.layers[1].forward
    assert "`encoder.layers.1` has a `forward` set on the instance" in error_of(model)


@pytest.mark.parametrize("key", ["pos", "pos_table", "positions", "pe"])
def test_a_block_with_a_table_of_positions_of_its_own(key):
    """Such a block takes the first rows of the table, one for each vector of its input: a prompt would get them."""
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)))
    model[1].register_parameter(key, nn.Parameter(torch.ones(4, 8)))
    assert f"gets positions that are computed in a block, by `1.{key}`; the prompt would" in error_of(model, deep=True)
