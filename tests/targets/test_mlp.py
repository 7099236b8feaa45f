"""Which layers of a transformer block are its MLP."""

from torch import nn

from lightning_lora.targets.select import preset
from tests.helpers.models import Attention


def named(**children):
    return nn.ModuleDict(children)


def test_convolutions_of_one_position_in_a_block_are_its_mlp():
    block = named(attention=Attention(), conv1=nn.Conv1d(4, 8, 1), conv2=nn.Conv1d(8, 4, 1))
    distill = named(conv=nn.Conv1d(4, 4, 3), mix=nn.Conv1d(4, 4, 1))
    model = named(layers=nn.ModuleList([block]), distill=distill, head=nn.Linear(4, 2))
    assert list(preset(model, "mlp")) == ["layers.0.conv1", "layers.0.conv2"]
    attention = [f"layers.0.attention.{leaf}_proj" for leaf in "qkvo"]
    assert list(preset(model, "all")) == [*attention, "layers.0.conv1", "layers.0.conv2"]


def test_those_of_a_convolution_module_are_not():
    conformer = named(
        attention=Attention(),
        conv=named(
            pointwise1=nn.Conv1d(4, 8, 1), depthwise=nn.Conv1d(8, 8, 3, groups=8), pointwise2=nn.Conv1d(8, 4, 1)
        ),
        squeeze=named(wide=nn.Conv2d(4, 4, 3), se=named(fc1=nn.Conv2d(4, 1, 1), fc2=nn.Conv2d(1, 4, 1))),
        ffn=named(w_in=nn.Conv1d(4, 8, 1), depthwise=nn.Conv1d(8, 8, 3, groups=8), w_out=nn.Conv1d(8, 4, 1)),
    )
    model = named(layers=nn.ModuleList([conformer]))
    assert list(preset(model, "mlp")) == ["layers.0.ffn.w_in", "layers.0.ffn.w_out"]


def test_a_convolutional_network_has_no_mlp():
    bottleneck = named(conv1=nn.Conv2d(4, 2, 1), conv2=nn.Conv2d(2, 2, 3), conv3=nn.Conv2d(2, 4, 1))
    model = named(layers=nn.ModuleList([bottleneck]), fc=nn.Linear(4, 2))
    assert preset(model, "mlp") == {}
    assert list(preset(model, "all")) == [f"layers.0.conv{index}" for index in (1, 2, 3)]


def test_attention_and_mlp_may_be_wrapped_entries_of_one_list():
    pair = nn.ModuleList([named(fn=Attention()), named(fn=nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)))])
    model = named(layers=nn.ModuleList([pair]))
    assert list(preset(model, "mlp")) == ["layers.0.1.fn.0", "layers.0.1.fn.1"]
