"""A copy of the network inside the module: what the configuration does not mean behaves as in a plain run."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, lora_parameters, lora_state_dict, merge_lora
from lightning_lora.layers.base import is_adapted
from lightning_lora.model.copies import make_base, make_plain
from lightning_lora.model.several.strengths import set_strengths
from tests.helpers.models import Lit, checkpoints, data, net, trainer
from tests.helpers.selection import slow_except
from tests.helpers.several import THREE, fill, outputs

TARGETS = ["q", "k", "v", "o"]


class Reference(Lit):
    """Keeps a copy of its network, made in the hook of that name."""

    def __init__(self, hook: str, frozen: bool = True) -> None:
        super().__init__()
        self.hook, self.frozen, self.ref = hook, frozen, None

    def make(self, hook: str) -> None:
        if hook == self.hook:
            self.ref = copy.deepcopy(self.net).eval()
            self.ref.requires_grad_(not self.frozen)

    def setup(self, stage: str) -> None:
        self.make("setup")

    def on_fit_start(self) -> None:
        self.make("on_fit_start")

    def on_train_start(self) -> None:
        self.make("on_train_start")

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss(batch) + nn.functional.mse_loss(self(batch[0]), self.ref(batch[0])) / 10

    def configure_optimizers(self) -> object:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


def callback(hook: str) -> LoRACallback:
    return LoRACallback(r=2, targets=TARGETS, exclude=["ref"] if hook == "setup" else None)


def same_values(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


HOOKS = product(["setup", "on_fit_start", "on_train_start"], [True, False])


@pytest.mark.slow
@pytest.mark.parametrize(("hook", "frozen"), slow_except([("setup", True), ("on_fit_start", False)], HOOKS))
def test_a_reference_is_what_it_is_in_a_plain_run(hook, frozen, tmp_path):
    module, plain = Reference(hook, frozen), Reference(hook, frozen)
    trainer(callback(hook), checkpoints(tmp_path), num_sanity_val_steps=0).fit(module, data(), data(1))
    trainer(num_sanity_val_steps=0).fit(plain, data(), data(1))
    assert same_values(module.ref, plain.ref) and same_values(module.ref, net())
    flags = [[parameter.requires_grad for parameter in each.ref.parameters()] for each in (module, plain)]
    assert flags[0] == flags[1]
    assert [type(inner) for inner in module.ref.modules()] == [type(inner) for inner in plain.ref.modules()]
    assert not any("ref" in name for name in torch.load(tmp_path / "last.ckpt")["state_dict"])

    modules = [module, Reference(hook)] if hook == "setup" else [module]
    path = tmp_path / "last.ckpt"
    tested = [trainer(callback(hook)).test(each, data(2), ckpt_path=path, verbose=False) for each in modules]
    assert all(result == tested[0] for result in tested)
    assert same_values(module.ref, plain.ref) and not is_adapted(module)
    resumed = trainer(callback(hook), max_epochs=3, num_sanity_val_steps=0)
    resumed.fit(Reference(hook), data(), data(1), ckpt_path=path)
    assert resumed.global_step == 24


@pytest.mark.slow
def test_exclude_leaves_a_copy_alone_in_a_second_run_too():
    module = Reference("setup")
    for _ in range(2):
        start = copy.deepcopy(module.net)
        trainer(callback("setup")).fit(module, data(), data(1))
        assert same_values(module.ref, start)  # what the network was when `setup` copied it
        assert not same_values(module.net, start)
    assert {name.partition(".")[0] for name in lora_state_dict(module)} == {"net"}
    assert trainer(callback("setup")).validate(module, data(1), verbose=False)
    assert {name.partition(".")[0] for name in lora_state_dict(module)} == {"net"}  # `setup` copied a merged network


def test_a_copy_that_the_configuration_means_is_adapted_with_the_values_of_its_original():
    module, seen = Reference("setup", frozen=False), {}
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-2)
    module.on_fit_start = lambda: seen.update({n: p.detach().clone() for n, p in lora_parameters(module)})
    trainer(LoRACallback(r=2, targets=TARGETS), max_steps=1).fit(module, data())
    assert all(
        torch.equal(value, seen[f"ref{name.removeprefix('net')}"]) for name, value in seen.items() if name[:3] == "net"
    )
    assert any(name.startswith("ref") for name in seen)


def test_a_trained_update_stays_in_the_copy_as_merging_leaves_it():
    model = nn.ModuleDict({"net": net()})
    apply_lora(model, LoRAConfig(r=2, targets=TARGETS))
    for _, parameter in lora_parameters(model):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    known, merged = list(model.modules()), copy.deepcopy(model["net"])
    merge_lora(merged)
    model["ref"] = copy.deepcopy(model["net"])
    assert make_plain(model, known) == ["ref"]
    assert model["ref"].state_dict().keys() == net().state_dict().keys()
    assert same_values(model["ref"], merged)
    assert make_plain(model, known) == [] and is_adapted(model["net"])


def test_a_copy_computes_as_the_adapters_acted_that_it_had():
    """Of several one rests, and one acts with another strength."""
    model, x = nn.ModuleDict({"net": net()}), torch.linspace(-1, 1, 80).reshape(5, 16)
    for name, arguments in THREE.items():
        apply_lora(model, LoRAConfig(**arguments, name=name))
    fill(model)
    set_strengths(model, {"fr": 0.0, "de": 0.5})
    known, expected = list(model.modules()), outputs(model["net"], x)
    model["ref"] = copy.deepcopy(model["net"])
    assert make_plain(model, known) == ["ref"] and not is_adapted(model["ref"])
    assert torch.allclose(outputs(model["ref"], x), expected, atol=1e-5)
    assert torch.equal(outputs(model["net"], x), expected)


@pytest.mark.parametrize("is_merged", [False, True], ids=["live", "merged"])
def test_a_copy_becomes_the_base_where_no_update_is_to_stay(is_merged):
    model, base = nn.ModuleDict({"net": net()}), net()
    apply_lora(model, LoRAConfig(r=2, targets=TARGETS))
    for _, parameter in lora_parameters(model):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    known = list(model.modules())
    if is_merged:
        merge_lora(model)
    model["ref"] = copy.deepcopy(model["net"])
    assert make_base(model, known) == ["ref"]
    assert same_values(model["ref"], base) and not is_adapted(model["ref"])
    assert is_adapted(model["net"]) is not is_merged


def test_an_attention_module_that_reads_inner_weights_is_plain_in_the_copy():
    model = nn.ModuleDict({"net": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)})
    original = {name: type(module) for name, module in model["net"].named_modules()}
    apply_lora(model, LoRAConfig(r=2, targets=["self_attn", "linear1"]))
    known = list(model.modules())
    model["ref"] = copy.deepcopy(model["net"])
    assert make_plain(model, known) == ["ref"]
    assert {name: type(module) for name, module in model["ref"].named_modules()} == original
    assert not any(module._load_state_dict_pre_hooks for module in model["ref"].modules())


def test_what_is_wrapped_around_known_modules_is_no_copy():
    model = nn.ModuleDict({"net": net()})
    apply_lora(model, LoRAConfig(r=2, targets=TARGETS))
    known = list(model.modules())
    model["net"] = nn.Sequential(model["net"], copy.deepcopy(model["net"]))  # as a strategy wraps, and one real copy
    assert make_plain(model, known) == ["net.1"]
    assert is_adapted(model["net"][0]) and not is_adapted(model["net"][1])
