"""Copies of the module that callbacks keep, after the merge. The oracle is a plain run of a module that has A and B."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_lora import LoRACallback, lora_parameters, merge_lora
from lightning_lora.layers.adapter import initial_A, seed_of
from lightning_lora.layers.base import is_adapted
from tests.helpers.models import Lit, checkpoints, data, trainer
from tests.helpers.selection import slow_except

AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1),
}


class ByHand(nn.Linear):
    """``W x + B A x``, written out."""

    def __init__(self, layer: nn.Linear, name: str) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.requires_grad_(False)
        self.A = nn.Parameter(initial_A((2, layer.in_features), "kaiming", seed_of(None, name, "default")))
        self.B = nn.Parameter(torch.zeros(layer.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.A.T @ self.B.T


class Hand(Lit):
    def __init__(self, targets: tuple[str, ...]) -> None:
        super().__init__()
        self.requires_grad_(False)
        for index, block in enumerate(self.net.layers):
            for key in targets:
                setattr(block, key, ByHand(getattr(block, key), f"net.layers.{index}.{key}"))


class Constant(Lit):
    """Without the scheduler of `Lit`, which SWA replaces by its own."""

    def configure_optimizers(self) -> object:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class HandConstant(Hand, Constant):
    pass


def numbers(module: nn.Module, folder: object, *callbacks: object) -> list[float]:
    """What a user measures after `fit`, some of it twice: nothing that is measured may change the module."""
    runner, path = trainer(*callbacks, checkpoints(folder)), folder / "last.ckpt"
    runner.fit(module, data(), data(1))
    results = [runner.validate(module, data(1), verbose=False), runner.test(module, data(2), verbose=False)]
    for _ in range(2):
        results.append(runner.test(module, data(2), ckpt_path=path, verbose=False))
        results.append(runner.validate(module, data(1), ckpt_path=path, verbose=False))
    results += [runner.validate(module, data(1), verbose=False), runner.test(module, data(2), verbose=False)]
    return [value for (result,) in results for value in result.values()]


BOTH = [("ema", ("q", "v")), ("swa", ("mlp",))]


@pytest.mark.parametrize(("average", "targets"), slow_except(BOTH, product(AVERAGES, [("q", "v"), ("mlp",)])))
def test_every_measure_after_the_merge_is_that_of_the_plain_run(average, targets, tmp_path):
    make = AVERAGES[average]
    module, hand = Constant(), HandConstant(targets)
    seen = numbers(module, tmp_path / "lora", LoRACallback(r=2, targets=list(targets)), make())
    expected = numbers(hand, tmp_path / "hand", make())
    # In the plain run a file that is tested stays in the module: what comes after is compared with what came before.
    torch.testing.assert_close(seen[:6], expected[:6], rtol=1e-5, atol=1e-6)
    assert seen[6:] == seen[:2]


class Keeper(Callback):
    """Keeps a copy of the module as an attribute, and snapshots of a part of it in a list."""

    def __init__(self) -> None:
        self.best, self.others = None, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.best = copy.deepcopy(pl_module)
        self.others.append(copy.deepcopy(pl_module.net))


def test_snapshots_of_a_users_callback_are_plain_modules_after_the_merge():
    keeper, module = Keeper(), Lit()
    trainer(LoRACallback(r=2, targets=["q"]), keeper).fit(module, data())
    keys = module.state_dict().keys()
    assert keeper.best.state_dict().keys() == keys and not is_adapted(keeper.best)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in keeper.best.state_dict().items())
    assert all(is_adapted(each) for each in keeper.others)  # snapshots of a moment
    assert not torch.equal(keeper.others[0].layers[0].q.weight, module.net.layers[0].q.weight)
    module.load_state_dict(keeper.best.state_dict())


def test_without_a_merge_copies_keep_their_adapters():
    keeper, module = Keeper(), Lit()
    trainer(LoRACallback(r=2, targets=["q"], merge=False), keeper).fit(module, data())
    assert all(is_adapted(each) for each in (keeper.best, *keeper.others, module))
    merge_lora(keeper.best)


class Averaged(Lit):
    """An average as a part of the module, which the module updates itself."""

    def __init__(self) -> None:
        super().__init__()
        average = torch.optim.swa_utils.get_ema_avg_fn(0.9)
        self.ema = torch.optim.swa_utils.AveragedModel(self.net, avg_fn=average)

    def configure_optimizers(self) -> object:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)

    def on_train_batch_end(self, *_: object) -> None:
        self.ema.update_parameters(self.net)


@pytest.mark.filterwarnings("ignore:.*would not train without adapters", "ignore:2 of 4 adapters got no gradient")
def test_an_average_inside_the_module_moves_its_adapters_alone():
    module, path = Averaged(), []
    start = copy.deepcopy(module.net.state_dict())
    step = module.on_train_batch_end
    module.on_train_batch_end = lambda *_: (path.append(copy.deepcopy(dict(lora_parameters(module.net)))), step())
    trainer(LoRACallback(r=2, targets=["q"], merge=False), max_steps=6).fit(module, data())
    expected = path[0]
    for values in path[1:]:
        expected = {name: 0.9 * expected[name] + 0.1 * value for name, value in values.items()}
    for name, value in lora_parameters(module.ema.module):
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    for name, value in module.ema.module.named_parameters():
        assert ".lora." in name or torch.equal(value, start[name]), name
