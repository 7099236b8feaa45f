"""Which attention blocks get a prefix, and what is said of those that cannot have one. Remedies are tried."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from lightning_lora.methods.prefix.config import PrefixConfig
from lightning_lora.methods.prefix.method import PrefixMethod
from tests.helpers import zoo
from tests.helpers.models import Attention, GroupedAttention


def complete(model: nn.Module, **arguments: object) -> list[str]:
    return PrefixMethod(PrefixConfig(length=2, **arguments)).complete(model)


def error_of(model: nn.Module, **arguments: object) -> str:
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError) as caught:
        complete(model, **arguments)
    assert classes == [type(module) for module in model.modules()]
    return str(caught.value)


def stack() -> nn.ModuleDict:
    return nn.ModuleDict({key: nn.ModuleList(GroupedAttention() for _ in range(2)) for key in ("encoder", "decoder")})


def test_every_attention_block():
    model = stack()
    expected = ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    assert complete(model) == expected == complete(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"{name}.prefix.{key}" for name in expected for key in "KV"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"targets": ["decoder"]}, ["decoder.0", "decoder.1"]),
        ({"targets": ["encoder.1", "re:decoder.0"]}, ["encoder.1", "decoder.0"]),
        ({"exclude": ["encoder"]}, ["decoder.0", "decoder.1"]),
        ({"exclude": ["*.0"]}, ["encoder.1", "decoder.1"]),
    ],
)
def test_names_choose_blocks(arguments, expected):
    assert complete(stack(), **arguments) == expected


def test_names_that_choose_nothing():
    assert error_of(stack(), targets=["encodr"]) == (
        "`targets` has 'encodr', which matches no attention block and no module around one. The nearest blocks are "
        "`encoder.*`, `decoder.*`."
    )
    assert "`exclude` has 'head', which matches no module" in error_of(stack(), exclude=["head"])
    assert error_of(stack(), exclude=["encoder", "decoder"]) == (
        "`targets='attn'` finds only blocks that `exclude=['encoder', 'decoder']` leave out."
    )


def test_a_model_without_attention():
    message = error_of(nn.Sequential(nn.Linear(4, 4)))
    assert message.startswith(
        "A prefix needs attention blocks, and none was found in Sequential. LoRACallback(targets='all')"
    )


def test_attention_without_the_kernel_and_the_rest_of_the_model():
    model = stack()
    model["old"] = Attention()
    assert error_of(model) == (
        "`old` computes attention without `F.scaled_dot_product_attention`, where a prefix cannot act. To leave it out "
        "write exclude=['old']."
    )
    assert len(complete(model, exclude=["old"])) == 4


class Fused(GroupedAttention):
    """As timm writes it."""

    fused_attn = False

    def forward(self, x):
        if self.fused_attn:
            return super().forward(x)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return q[..., :8] @ k.mT @ v


def test_a_switch_of_timm():
    model = nn.ModuleList([Fused()])
    message = error_of(model)
    assert message.endswith("where a prefix cannot act: set its attribute `fused_attn` to True.")
    model[0].fused_attn = True
    assert complete(model) == ["0"]


def llama(implementation: str) -> nn.Module:
    config = transformers.LlamaConfig(**zoo.GROUPED, attn_implementation=implementation)
    return transformers.LlamaForCausalLM(config)


def test_a_switch_of_transformers():
    model = llama("eager")
    message = error_of(model)
    assert message == (
        "`model.layers.0.self_attn` (and 1 more) computes attention by attn_implementation='eager', where a prefix "
        "cannot act: load the model with attn_implementation='sdpa', or call `model.set_attn_implementation('sdpa')`."
    )
    assert model.config._attn_implementation == "eager"  # what was tried was a copy
    assert len(complete(llama("sdpa"))) == 2
    model.set_attn_implementation("sdpa")
    assert len(complete(model)) == 2


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_kernels_that_cannot_run_here(implementation):
    model = llama("sdpa")
    model.config._attn_implementation_internal = implementation  # flash attention is not installed everywhere
    message = error_of(model)
    assert f"computes attention by attn_implementation={implementation!r}, where a prefix cannot act" in message
    model.set_attn_implementation("sdpa")
    assert len(complete(model)) == 2


def test_an_architecture_of_transformers_without_the_kernel():
    model, _ = zoo.build(zoo.CASES["gptj"])
    assert error_of(model) == (
        "`transformer.h.0.attn` (and 1 more) lies in a GPTJModel, for which transformers has no "
        "attn_implementation='sdpa'."
    )


def test_what_would_bypass_the_prefix():
    blocks = nn.ModuleList(GroupedAttention() for _ in range(2))
    blocks[0].forward = blocks[0].forward
    blocks[1].prefix = "text"
    first, second = error_of(blocks).splitlines()
    assert first.startswith("`0` has a `forward` set on the instance, which would bypass the adapter.")
    assert second.startswith("`1` has an attribute `prefix` of its own, where the adapter would go.")


def test_first_values_depend_on_the_name_and_the_seed_alone():
    models = [stack() for _ in range(3)]
    torch.manual_seed(5)
    for model, seed in zip(models, (1, 1, 2), strict=True):
        complete(model, seed=seed)
        torch.rand(1)
    first, again, other = (model["decoder"][0].prefix.K for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, models[0]["decoder"][1].prefix.K)


def test_sizes_that_differ_by_block():
    class Wide(nn.Module):
        def __init__(self, heads, features):
            super().__init__()
            self.heads, self.qkv = heads, nn.Linear(8, 3 * heads * features)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v)

    blocks = nn.ModuleList([Wide(2, 4), Wide(3, 6)])
    complete(blocks)
    assert [tuple(block.prefix.K.shape) for block in blocks] == [(2, 2, 4), (3, 2, 6)]
