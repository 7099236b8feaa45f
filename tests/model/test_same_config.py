"""Which arguments make two configurations mean different adapters, and where a model's own are found."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, lora_parameters, merge_lora, remove_lora
from lightning_lora.model.same_config import difference
from tests.helpers.models import Lit, data, net, trainer


class Around(Lit):
    """A LightningModule around a network that exists already."""

    def __init__(self, network: nn.Module) -> None:
        LightningModule.__init__(self)
        self.lr, self.net = 1e-2, network


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"r": 4}, "`r=4` instead of `r=8`"),
        ({"alpha": 16}, "`alpha=16` instead of `alpha=None`"),
        ({"targets": "qv"}, "`targets='qv'` instead of `targets='attn'`"),
        ({"bias": "all"}, "`bias='all'` instead of `bias='none'`"),
        ({"name": "de"}, "`name='de'` instead of `name='default'`"),
        ({"also_train": ["head"]}, r"`also_train=['head']` instead of `also_train=None`"),
    ],
)
def test_the_first_difference_is_named(arguments, expected):
    assert difference(LoRAConfig(), LoRAConfig(**arguments)) == expected


def test_what_a_file_holds_is_named_in_bounded_length():
    words = difference(LoRAConfig(targets=["q" * 99999]), LoRAConfig(targets=["k\x1b" + "v" * 99999]))
    assert len(words) < 1400 and words.isprintable()
    assert words.startswith("`targets=['k\\x1bvv") and " instead of `targets=['qq" in words


@pytest.mark.parametrize(
    "arguments", [{"dropout": 0.1}, {"seed": 3}, {"init": "gaussian"}, {"alpha": 8}, {"exclude": []}]
)
def test_what_changes_no_adapter_is_no_difference(arguments):
    assert difference(LoRAConfig(), LoRAConfig(**arguments)) is None


def test_alpha_none_equals_a_number_only_where_all_ranks_are_one():
    ranks = {"fc": 4}
    assert difference(LoRAConfig(rank_pattern=ranks), LoRAConfig(rank_pattern=ranks, alpha=8)) is not None


def test_the_order_of_patterns_counts():
    first, second = {"fc": 2, "fc1": 4}, {"fc1": 4, "fc": 2}
    assert "`rank_pattern=" in difference(LoRAConfig(rank_pattern=first), LoRAConfig(rank_pattern=second))


def adapted_in_two(merged: bool) -> tuple[nn.Module, nn.Module, LoRAConfig]:
    """Two models that have a network in common, adapted as a part of the first; and its configuration."""
    network, config = net(), LoRAConfig(r=2, alpha=2, targets=["q", "v"])
    first, second = (nn.ModuleDict({"net": network, "head": nn.Linear(3, 3)}) for _ in range(2))
    apply_lora(first, config)
    for name, parameter in lora_parameters(first):
        nn.init.constant_(parameter, 0.1 if name.endswith("B") else 1.0)
    if merged:
        merge_lora(first)
    return first, second, config


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("arguments", [{"r": 4}, {"alpha": 8}, {"targets": ["q"]}])
def test_other_arguments_are_an_error_in_every_model_that_holds_the_layers(merged, arguments):
    _, second, config = adapted_in_two(merged)
    with pytest.raises(ValueError, match=f"already has adapters{' .merged.' if merged else ''}, and this asks for"):
        apply_lora(second, replace(config, **arguments))
    with pytest.raises(ValueError, match="already has adapters"):
        trainer(LoRACallback(**{"r": 2, "alpha": 2, "targets": ["q", "v"], **arguments})).fit(
            Around(second["net"]), data()
        )


@pytest.mark.parametrize("merged", [False, True])
def test_the_ways_out_work_on_the_second_model(merged):
    first, second, config = adapted_in_two(merged)
    asked = replace(config, r=4)
    assert apply_lora(second, config) == [f"net.layers.{block}.{layer}" for block in (0, 1) for layer in "qv"]
    remove_lora(second)
    assert all(torch.equal(a, b) for a, b in zip(second["net"].parameters(), net().parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in second.parameters())
    apply_lora(second, asked)
    remove_lora(second)
    apply_lora(first, asked)  # the first model forgot its adapters, which the second one's verb removed

    first, second, config = adapted_in_two(merged)
    weights = merged_weights(second["net"])
    merge_lora(second, undo=False)
    assert all(torch.equal(weights[name], value) for name, value in second["net"].state_dict().items())
    apply_lora(second, asked)


def merged_weights(network: nn.Module) -> dict:
    network = copy.deepcopy(network)
    if any(".lora." in name for name, _ in network.named_parameters()):
        merge_lora(network)
    return network.state_dict()


def test_a_layer_that_the_configuration_does_not_mean_in_the_second_model():
    network, config = net(), LoRAConfig(r=2, targets=["first.q", "other"])
    first = nn.ModuleDict({"first": network.layers[0], "other": nn.Linear(2, 2)})
    apply_lora(first, config)
    second = nn.ModuleDict({"last": network.layers[0], "first": network.layers[1], "other": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"`last.q` has adapters \(1 such layer\), and in this model the config"):
        apply_lora(second, config)
    remove_lora(second["last"].q)
    assert apply_lora(second, config) == ["first.q", "other"]


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
def test_a_network_that_outlives_its_module_trains_on(merge):
    """Two runs of one epoch in two modules around one network give what one module gives in two runs."""
    results = []
    for modules in ([Around(net())] * 2, [Around(shared := net()), Around(shared)]):
        for module in modules:
            trainer(LoRACallback(r=2, targets=["q"], merge=merge), max_epochs=1).fit(module, data())
        results.append(dict(lora_parameters(modules[1])))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
