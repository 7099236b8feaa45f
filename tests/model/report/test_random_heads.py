"""Which frozen heads are called random: those that were just drawn, and none that was trained or loaded."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, load_from_checkpoint
from lightning_lora.model.report.random_heads import is_random, random_heads
from tests.helpers.models import Lit, checkpoints, data, trainer

WORDS = r"Frozen output head `net.head`: the weights look as if .*also_train=\['net.head'\]"


def drawn(draw, bias=True, inputs=64, outputs=10):
    layer = nn.Linear(inputs, outputs, bias=bias)
    draw(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def trained(layer, steps=100):
    """After some steps of a classifier on noise."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
    for _ in range(steps):
        x = torch.randn(32, layer.in_features, generator=generator)
        y = torch.randint(layer.out_features, (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(x), y).backward()
        optimizer.step()
    return layer


FRESH = {
    "linear": lambda: nn.Linear(64, 10),
    "small": lambda: nn.Linear(16, 3),
    "without bias": lambda: nn.Linear(512, 1000, bias=False),
    "bf16": lambda: nn.Linear(256, 10).bfloat16(),
    "transformers": lambda: drawn(lambda w: nn.init.normal_(w, std=0.02)),
    "timm": lambda: drawn(lambda w: nn.init.trunc_normal_(w, std=0.02)),
    "zeros": lambda: drawn(nn.init.zeros_),
    "xavier": lambda: drawn(nn.init.xavier_uniform_),
}


@pytest.mark.parametrize("kind", FRESH)
def test_a_drawn_head_is_random(kind):
    for seed in range(20):
        torch.manual_seed(seed)
        assert is_random(FRESH[kind]())


@pytest.mark.slow
@pytest.mark.parametrize("kind", FRESH)
def test_a_trained_head_is_not(kind):
    torch.manual_seed(1)
    assert not is_random(trained(FRESH[kind]().float()))


@pytest.mark.parametrize(
    "layer",
    [
        drawn(lambda w: nn.init.normal_(w, std=0.02), bias=False),
        drawn(lambda w: nn.init.normal_(w, std=0.05)),
        nn.Linear(4, 4, device="meta"),
        nn.Bilinear(2, 2, 2),
    ],
    ids=["a language model's", "converted, with a bias of zeros", "meta", "no matrix"],
)
def test_where_nothing_shows_that_it_was_drawn_it_is_not_random(layer):
    assert not is_random(layer)


def messages(module, **arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(LoRACallback(r=2, **arguments), max_epochs=1, limit_train_batches=1).fit(module, data())
    return [str(each.message) for each in caught if "output head" in str(each.message)]


@pytest.mark.slow
def test_a_run_warns_of_a_random_head_and_of_no_other():
    [text] = messages(Lit())
    assert pytest.raises(AssertionError, match=WORDS).matches(AssertionError(text))
    assert messages(Lit(), also_train=["net.head"]) == messages(Lit(), targets=["q", "head"]) == []
    loaded = Lit()
    trained(loaded.net.head, 100)
    assert messages(loaded) == []


@pytest.mark.slow
def test_the_other_way_out_loads_the_checkpoint(tmp_path):
    class Draws(Lit):
        def __init__(self):
            super().__init__()
            self.net.head = nn.Linear(16, 3)

    module, files = Draws(), checkpoints(tmp_path)
    torch.save(module.state_dict(), tmp_path / "base.pt")
    trainer(LoRACallback(r=2, merge=False), files, max_epochs=1).fit(module, data(), data(1))
    with pytest.raises(ValueError, match=r"`net\.head\.weight` has other values"):
        load_from_checkpoint(Draws, files.last_model_path)
    loaded = load_from_checkpoint(Draws, files.last_model_path, base=tmp_path / "base.pt")
    x = data(5).dataset.tensors[0]
    assert torch.equal(loaded.eval()(x), module.eval()(x))


@pytest.mark.parametrize("first", ["net", "ref"])
@pytest.mark.parametrize(
    ("arguments", "reported"), [({}, 0), ({"also_train": ["net.2"]}, 0), ({"targets": ["net.0"]}, 1)]
)
def test_the_head_of_a_reference_is_reported_only_where_the_head_itself_is_frozen(first, arguments, reported):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    parts = {"net": net, "ref": copy.deepcopy(net)}
    model = nn.ModuleDict({name: parts[name] for name in (first, *({"net", "ref"} - {first}))})
    apply_lora(model, LoRAConfig(r=1, **{"targets": ["net.0", "net.2"], **arguments}))
    assert len(random_heads(model)) == reported
