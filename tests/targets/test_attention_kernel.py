"""The sizes that a trial run finds, against those of a real forward or written by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora.targets.attention_kernel import KernelSizes, kernel_sizes
from lightning_lora.targets.roles import attention_blocks
from lightning_lora.targets.survey import Survey
from tests.helpers import zoo
from tests.helpers.models import Attention, FusedBlock, GroupedAttention


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {KernelSizes(2, 8, 8)}),  # grouped queries
        ("falcon", {KernelSizes(1, 8, 8)}),  # one key for all queries
        ("deepseek_v2", {KernelSizes(4, 12, 8)}),  # keys and values of different sizes, rotations as complex numbers
        ("bert_cross", {KernelSizes(4, 8, 8)}),
        ("t5", {KernelSizes(4, 8, 8)}),
        ("qwen2_vl", {KernelSizes(4, 8, 8), KernelSizes(2, 8, 8)}),  # packed images, and text
    ],
)
def test_sizes_of_hugging_face(name, expected):
    model, _ = zoo.build(zoo.CASES[name])
    assert {kernel_sizes(block) for block in attention_blocks(Survey(model)).values()} == expected


@pytest.mark.parametrize("repeat", [False, True])
def test_repeated_keys_count_once(repeat):
    assert kernel_sizes(GroupedAttention(repeat=repeat)) == KernelSizes(2, 4, 4)


def test_one_head_without_a_dimension_of_heads():
    assert kernel_sizes(FusedBlock(4)) == KernelSizes(1, 4, 4)


def test_a_block_without_the_kernel():
    assert kernel_sizes(Attention()) == "computes attention without `F.scaled_dot_product_attention`"


class HeadsInBatch(FusedBlock):
    def forward(self, x):
        q, k, v = (y.reshape(-1, 2, 2).transpose(0, 1) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v)


class Broken(FusedBlock):
    def forward(self, x):
        raise KeyError("no such key")


class ReadsWeight(FusedBlock):
    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


def test_a_weight_that_is_read():
    assert kernel_sizes(ReadsWeight(4)) == KernelSizes(2, 2, 2)


def test_what_cannot_be_known():
    assert kernel_sizes(HeadsInBatch(4)) == (
        "gives `F.scaled_dot_product_attention` keys of shape (2, 128, 2), where (batch, heads, length, features) is "
        "needed"
    )
    assert kernel_sizes(nn.Identity()) == "could not be run alone, so the sizes of its heads are not known"
    with_error = kernel_sizes(Broken(4))
    assert with_error == "could not be run alone, so the sizes of its heads are not known (KeyError: 'no such key')"


def test_the_trial_changes_nothing():
    block, state = GroupedAttention(), torch.get_rng_state()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    kernel_sizes(block.train())
    assert torch.equal(torch.get_rng_state(), state) and block.training
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_a_lazy_block():
    block = GroupedAttention()
    block.q_proj = nn.LazyLinear(16)
    assert kernel_sizes(block).startswith("has no shape yet (a lazy module)")


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        assert kernel_sizes(GroupedAttention()) == KernelSizes(2, 4, 4)
