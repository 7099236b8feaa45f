"""The dry run says what would be adapted, changes nothing, and its YAML means the same."""

import pytest
import torch
import yaml
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, TuneConfig, apply_lora, lora_parameters, plan_lora
from lightning_lora.methods.plan import plan
from tests.helpers import models, oracles
from tests.helpers.oracles import net


class Odd(nn.Module):
    """Names that are tails of other names, a fused map, several matrices in a layer, and a parameter."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"fc": nn.Linear(4, 2), "a.b".replace(".", "_"): nn.Linear(2, 2)})
        self.attn = nn.MultiheadAttention(4, 2)
        self.lstm = nn.LSTM(4, 3)
        self.table = nn.Parameter(torch.zeros(5, 6))
        self.experts = nn.ParameterDict({"w": torch.zeros(2, 3, 4)})


CONFIGS = [
    LoRAConfig(r=2, targets=["fc", "attn", "lstm", "table", "experts.w"]),
    LoRAConfig(r=3, targets=["attn.q", "re:fc", "weight_hh_l0"], rank_pattern={"attn.q": 1}, alpha=6, rslora=True),
    LoRAConfig(targets="all", bias="all", also_train=["table"]),
    LoRAConfig(targets="qv", bias="lora_only"),
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=str)


@every_config
def test_the_plan_is_what_is_then_done(config):
    model = Odd()
    before = oracles.snapshot(model), {type(module) for module in model.modules()}
    plan = plan_lora(model, config)
    assert (before[0].keys(), before[1]) == (model.state_dict().keys(), {type(module) for module in model.modules()})
    assert all(parameter.requires_grad for parameter in model.parameters())
    apply_lora(model, config)
    adapters = dict(lora_parameters(model))
    assert sum(row.parameters for row in plan.rows) == sum(matrix.numel() for matrix in adapters.values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(row.parameters for row in plan.rows) + sum(plan.in_full.values()) == trained
    names = [key.replace("lora.default.", "").removesuffix(".A") for key in adapters if key.endswith(".A")]
    assert [row.name for row in plan.rows] == names
    ranks = [matrix.shape[-2] for key, matrix in adapters.items() if key.endswith(".A")]
    assert [row.r for row in plan.rows] == ranks


@every_config
def test_its_yaml_means_the_same(config):
    plan = plan_lora(Odd(), config)
    targets = yaml.safe_load(plan.to_yaml())
    again = plan_lora(Odd(), LoRAConfig(r=config.r, targets=targets))
    assert [row.name for row in again.rows] == [row.name for row in plan.rows]


def test_a_name_that_is_the_tail_of_another_is_written_so_that_it_means_one():
    model = nn.ModuleDict(
        {"0": nn.Linear(2, 2), "b": nn.ModuleDict({"0": nn.Linear(2, 2), "c": nn.ModuleDict({"0": nn.Linear(2, 2)})})}
    )
    for names in (["re:0"], [r"re:b\.0"], [r"re:b\.c\.0"]):
        plan = plan_lora(model, LoRAConfig(targets=names))
        again = plan_lora(model, LoRAConfig(targets=yaml.safe_load(plan.to_yaml())))
        assert [row.name for row in again.rows] == [row.name for row in plan.rows]
        assert len(plan.rows) == 1


def test_an_edited_yaml_means_less():
    lines = plan_lora(Odd(), CONFIGS[0]).to_yaml().splitlines()
    fewer = yaml.safe_load("\n".join(line for line in lines if "lstm" not in line and "attn.k" not in line))
    names = [row.name for row in plan_lora(Odd(), LoRAConfig(targets=fewer)).rows]
    assert names == ["table", "fc", "inner.fc", "attn.q", "attn.v", "attn.out_proj", "experts.w"]


def test_it_reads_as_a_table():
    lines = str(plan_lora(net(), LoRAConfig(r=2, targets=["body.*"], also_train=["head"]))).splitlines()
    assert lines == [
        "LoRA would adapt",
        "  module  layers  kind    in -> out  r  scale  trainable  by",
        "  body.0  1       Linear  4 -> 6     2  1      20         'body.*'",
        "  body.2  1       Linear  6 -> 4     2  1      20         'body.*'",
        "and train in full: head.weight (8), head.bias (2)",
        "50 trainable parameters, 44.64% of the base's 112; 200 B in fp32",
    ]


def test_it_works_without_values_and_on_an_adapted_model():
    with torch.device("meta"):
        model = Odd()
    plan = plan_lora(model, CONFIGS[0])
    assert str(plan) == str(plan_lora(Odd(), CONFIGS[0]))
    assert all(parameter.is_meta for parameter in model.parameters())
    adapted = Odd()
    apply_lora(adapted, CONFIGS[0])
    assert str(plan_lora(adapted, CONFIGS[0])) == str(plan)


def test_it_raises_what_applying_would():
    with pytest.raises(ValueError, match=r"`targets` has 'fd', which matches no module\. The nearest names are `fc`"):
        plan_lora(Odd(), LoRAConfig(targets=["fd"]))


def test_the_model_itself_can_be_planned():
    plan = plan_lora(nn.Linear(3, 2), LoRAConfig(r=1, targets="all"))
    assert "(the model itself)" in str(plan)
    assert yaml.safe_load(plan.to_yaml()) == ["re:()"]
    assert apply_lora(nn.Linear(3, 2), LoRAConfig(targets=["re:()"])) == [""]


def test_a_plan_takes_a_callback_and_nothing_else():
    model, callback = nn.Sequential(nn.Linear(4, 4)), LoRACallback(r=2, targets="all")
    assert plan_lora(model, callback).rows == plan_lora(model, callback.config).rows
    with pytest.raises(TypeError, match="`config` must be a LoRAConfig or a LoRACallback, but got a dict"):
        plan_lora(model, {"r": 2})


def test_several_adapters():
    """Each has its rows, and the YAML is what `adapters` takes."""
    config = LoRAConfig(r=2, targets=["q"], adapters={"fr": {}, "de": {"r": 4, "targets": ["q", "mlp"]}})
    planned, model = plan_lora(models.net(), config), models.net()
    assert [(row.adapter, row.name, row.r) for row in planned.rows] == [
        ("fr", "layers.0.q", 2),
        ("fr", "layers.1.q", 2),
        ("de", "layers.0.q", 4),
        ("de", "layers.0.mlp", 4),
        ("de", "layers.1.q", 4),
        ("de", "layers.1.mlp", 4),
    ]
    apply_lora(model, config)
    assert sum(row.parameters for row in planned.rows) == sum(p.numel() for _, p in lora_parameters(model))
    again = LoRAConfig(r=2, adapters=yaml.safe_load(planned.to_yaml()))
    assert [row.name for row in plan_lora(models.net(), again).rows] == [row.name for row in planned.rows]


def test_quantized_weights_count_as_the_matrices_that_they_store():
    pytest.importorskip("bitsandbytes")
    from tests.helpers.quantized import WideNet, four_bits

    plain, quantized = WideNet(), WideNet()
    for block in quantized.layers:
        block.q = four_bits(block.q)
    expected = sum(parameter.numel() for parameter in plain.parameters())
    for config in (LoRAConfig(targets="all"), TuneConfig("bias")):
        assert plan(quantized, config).base == plan(plain, config).base == expected
