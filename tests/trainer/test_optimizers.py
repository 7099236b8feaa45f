"""Any optimizer that the user has, restricted to what LoRA trains."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn, optim

from lightning_lora import LoRACallback, lora_state_dict
from tests.helpers.models import Lit, checkpoints, data, net, trainer
from tests.helpers.selection import slow_except

DECAY = lambda m: [p for p in m.parameters() if p.ndim > 1]  # noqa: E731
NO_DECAY = lambda m: [p for p in m.parameters() if p.ndim < 2]  # noqa: E731
SCHEDULERS = {
    "lambda": lambda o: optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "one cycle": lambda o: optim.lr_scheduler.OneCycleLR(o, [1e-2] * len(o.param_groups), total_steps=16),
    "cosine": lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 16),
}


def groups(m: nn.Module) -> list[dict]:
    layers = [list(block.parameters()) for block in m.net.layers]
    return [{"params": layers[0], "lr": 1e-3}, {"params": layers[1]}, {"params": m.net.head.parameters()}]


CASES = {
    "all": lambda m: optim.AdamW(m.parameters(), 1e-2),
    "named": lambda m: optim.AdamW(m.named_parameters(), 1e-2),
    "filtered": lambda m: optim.SGD([p for p in m.parameters() if p.requires_grad], 1e-2, momentum=0.9),
    "head only": lambda m: optim.AdamW(m.net.head.parameters(), 1e-2),
    "head filtered": lambda m: optim.AdamW([p for p in m.net.head.parameters() if p.requires_grad], 1e-2),
    "no decay": lambda m: optim.AdamW([{"params": DECAY(m)}, {"params": NO_DECAY(m), "weight_decay": 0.0}], 1e-2),
    "layer-wise": lambda m: optim.AdamW(groups(m), 1e-2),
    "list": lambda m: [optim.RMSprop(m.parameters(), 1e-2)],
    "dict": lambda m: {"optimizer": optim.NAdam(m.parameters(), 1e-2)},
    "two lists": lambda m: ([o := optim.AdamW(m.parameters(), 1e-2)], [SCHEDULERS["cosine"](o)]),
    "tuple of dicts": lambda m: (
        {"optimizer": (o := optim.AdamW(groups(m), 1e-2)), "lr_scheduler": SCHEDULERS["lambda"](o)},
    ),
    "one cycle by step": lambda m: {
        "optimizer": (o := optim.AdamW(groups(m), 1e-2)),
        "lr_scheduler": {"scheduler": SCHEDULERS["one cycle"](o), "interval": "step"},
    },
    "adagrad": lambda m: optim.Adagrad(m.net.head.parameters(), 1e-2, initial_accumulator_value=0.1),
    "adadelta": lambda m: optim.Adadelta(m.parameters()),
    "adafactor": lambda m: optim.Adafactor(m.parameters()),
    "lbfgs": lambda m: optim.LBFGS(m.parameters(), 1e-2),
}


def copied(group: dict) -> dict:
    return {key: list(value) if isinstance(value, list) else value for key, value in group.items()}


class Look(Callback):
    def on_train_start(self, trainer, pl_module):
        self.first = [[len(group["params"]) for group in o.param_groups] for o in trainer.optimizers]
        for optimizer in trainer.optimizers:
            optimizer.state_dict()

    def on_train_end(self, trainer, pl_module):
        self.groups = [copied(group) for o in trainer.optimizers for group in o.param_groups]
        self.states = [dict(o.state) for o in trainer.optimizers]
        self.inside = [p for group in self.groups for p in group["params"]]
        self.trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        self.base = {n: p.detach().clone() for n, p in pl_module.named_parameters() if ".lora." not in n}
        self.moved = [n for n, p in self.trained.items() if n.endswith("B") and p.abs().max() > 0]


def run(configure, module=None, callback=None, **kwargs) -> Look:
    module, look = module or Lit(), Look()
    module.configure_optimizers = lambda: configure(module)
    trainer(callback or LoRACallback(r=4, merge=False), look, max_epochs=1, **kwargs).fit(module, data(), data(1))
    return look


FAST = ["named", "head filtered", "layer-wise", "list", "two lists", "one cycle by step", "adagrad"]


@pytest.mark.parametrize("case", slow_except(FAST, CASES))
def test_the_union_of_the_groups_is_what_is_trained(case):
    look = run(CASES[case])
    assert {id(p) for p in look.inside} == {id(p) for p in look.trained.values()}
    assert len(look.inside) == len(look.trained) == 16
    assert len(look.moved) == 8, "every B moved"
    for name, parameter in net().named_parameters():
        assert torch.equal(look.base[f"net.{name}"], parameter), name
    expected = CASES[case](Lit())
    first = expected[0] if isinstance(expected, (list, tuple)) else expected
    first = first["optimizer"] if isinstance(first, dict) else first
    first = first[0] if isinstance(first, list) else first
    assert len(look.groups) == len(first.param_groups)


def test_a_and_b_sit_in_the_group_of_their_weight():
    look = run(CASES["layer-wise"])
    where = {id(p): index for index, group in enumerate(look.groups) for p in group["params"]}
    assert {where[id(p)] for n, p in look.trained.items() if "layers.0" in n} == {0}
    assert {where[id(p)] for n, p in look.trained.items() if "layers.1" in n} == {1}
    assert [group["lr"] for group in look.groups] == [1e-3, 1e-2, 1e-2] and look.groups[2]["params"] == []


def test_rules_by_name_do_not_tear_the_adapter_from_its_weight():
    def configure(m):
        named = [p for n, p in m.named_parameters() if "weight" in n]
        rest = [p for n, p in m.named_parameters() if "weight" not in n]
        return optim.AdamW([{"params": rest, "weight_decay": 0.0}, {"params": named}], 1e-2)

    assert [len(group["params"]) for group in run(configure).groups] == [0, 16]


def test_param_names_follow():
    look = run(CASES["named"])
    assert look.groups[0]["param_names"] == list(look.trained)


def test_an_optimizer_made_in_init_is_restricted():
    class Early(Lit):
        def __init__(self):
            super().__init__()
            self.optimizer = optim.AdamW(self.parameters(), 1e-2)

    module = Early()
    look = run(lambda m: m.optimizer, module)
    assert len(look.inside) == 16 and len(look.moved) == 8


def test_gradients_required_as_without_lora_while_the_user_makes_the_optimizer():
    seen = {}

    def configure(m):
        seen.update({n: p.requires_grad for n, p in m.named_parameters()})
        return optim.AdamW(m.parameters(), 1e-2)

    module = Lit()
    module.net.layers[0].ln.weight.requires_grad_(False)
    run(configure, module)
    assert seen.pop("net.layers.0.ln.weight") is False and all(seen.values())


def test_weight_decay_leaves_frozen_parameters_as_they_are():
    look = run(lambda m: optim.SGD(m.parameters(), 0.1, weight_decay=0.5))
    for name, parameter in net().named_parameters():
        assert torch.equal(look.base[f"net.{name}"].view(torch.int32), parameter.view(torch.int32)), name


def test_states_of_optimizers_are_fp32_and_no_larger_than_the_adapters():
    [state] = run(CASES["all"]).states
    assert len(state) == 16
    assert {value["exp_avg"].dtype for value in state.values()} == {torch.float32}


class ZeroRedundancyOptimizer(optim.SGD):
    """By its name alone: the real one needs a process group."""


def test_optimizers_that_cannot_be_edited_are_refused():
    with pytest.raises(
        MisconfigurationException, match=r"`ZeroRedundancyOptimizer` divides its parameters.*plain optimizer"
    ):
        run(lambda m: ZeroRedundancyOptimizer(m.parameters(), 1e-2))
    with pytest.raises(MisconfigurationException, match="`SparseAdam` takes sparse gradients only"):
        run(lambda m: optim.SparseAdam(list(m.parameters()), 1e-2))


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_optimizer_is_warned_of():
    with pytest.warns(UserWarning, match="`configure_optimizers` returned None, so nothing trains the adapters"):
        module = Lit()
        module.configure_optimizers = lambda: None
        trainer(LoRACallback(r=4), max_epochs=1).fit(module, data())


class Early(Lit):
    """Has an optimizer, and perhaps a scheduler, before the run."""

    def make(self, make, schedule=None):
        self.made = make(self)
        self.schedule = schedule and schedule(self.made)
        return self

    def configure_optimizers(self):
        return [self.made], [self.schedule] if self.schedule else []


EARLY = {
    "one group": lambda m: optim.AdamW(m.parameters(), 1e-2),
    "named": lambda m: optim.AdamW(m.named_parameters(), 1e-2),
    "layer-wise": lambda m: optim.SGD(groups(m), 1e-2),
    "adagrad": lambda m: optim.Adagrad(m.parameters(), 1e-2),
}


@pytest.mark.parametrize("case", EARLY)
def test_an_optimizer_made_before_the_run_is_restored_after_it(case):
    module = Early().make(EARLY[case])
    before = [copied(group) for group in module.made.param_groups]
    trainer(LoRACallback(r=4, lr_scale=10.0), max_epochs=1).fit(module, data())
    for group, old in zip(module.made.param_groups, before, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in old["params"]]
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in old.items() if k != "params"}
    assert module.made.state.keys() <= set(module.parameters())
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer(max_epochs=1).fit(module, data())  # without the callback
    assert all(not torch.equal(p, weights[name]) for name, p in module.named_parameters() if "weight" in name)


def test_lr_scale_of_an_optimizer_made_before_the_run_does_not_compound():
    module, seen = Early().make(EARLY["one group"], lambda o: optim.lr_scheduler.LambdaLR(o, lambda step: 0.5)), []

    class Rates(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append((module.made.param_groups[0]["lr"], module.schedule.base_lrs))

    for _ in range(3):
        trainer(LoRACallback(r=4, lr_scale=10.0), Rates(), max_epochs=1).fit(module, data())
    assert seen == [(0.05, [0.1])] * 3
    assert (module.made.param_groups[0]["initial_lr"], module.schedule.base_lrs) == (1e-2, [1e-2])


def test_momentum_of_the_base_survives_the_run():
    module = Early().make(EARLY["one group"])
    trainer(max_epochs=1).fit(module, data())
    before = {p: state["exp_avg"].clone() for p, state in module.made.state.items()}
    trainer(LoRACallback(r=4), max_epochs=1).fit(module, data())
    assert len(before) == len(module.made.state) > 0
    assert all(torch.equal(module.made.state[p]["exp_avg"], value) for p, value in before.items())


@pytest.mark.parametrize("case", ["all", "named"])
def test_a_plain_run_continues_what_is_saved_after_the_merge(case, tmp_path):
    runner, module = trainer(LoRACallback(r=4, targets=["q"])), Lit()
    module.configure_optimizers = lambda: CASES[case](module)
    runner.fit(module, data())
    runner.save_checkpoint(tmp_path / "merged.ckpt")
    plain = Lit()
    plain.configure_optimizers = lambda: CASES[case](plain)
    resumed = trainer(max_epochs=runner.current_epoch + 1)
    resumed.fit(plain, data(), ckpt_path=tmp_path / "merged.ckpt")
    assert not torch.equal(plain.net.head.weight, module.net.head.weight)


class FewBits(Lit):
    """Trained by an optimizer of bitsandbytes."""

    def __init__(self, name: str, **arguments: object) -> None:
        super().__init__()
        self.optimizer_name, self.arguments = name, arguments

    def configure_optimizers(self):
        import bitsandbytes

        make = getattr(bitsandbytes.optim, self.optimizer_name)
        return make(self.parameters(), lr=1e-3, **self.arguments)


class Half(Lit):
    """Loaded in fp16, or in another dtype."""

    def __init__(self, dtype: torch.dtype = torch.float16, make: type = torch.optim.AdamW, **arguments: object) -> None:
        super().__init__()
        self.make, self.arguments, self.dtype_of_base = make, arguments, dtype
        self.net.to(dtype)

    def forward(self, x):
        return self.net(x.to(self.dtype_of_base)).float()

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=1e-3, **self.arguments)


def test_an_eps_that_is_zero_in_the_dtype_of_what_trains_is_refused():
    for make in (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad):
        with pytest.raises(MisconfigurationException, match=r"`net\.head\.weight` trains in float16, where"):
            trainer(LoRACallback(r=4, also_train=["head"])).fit(Half(make=make), data())
    with_fp32_states = pytest.importorskip("bitsandbytes").optim.AdamW
    for module in (Half(torch.bfloat16), Half(make=torch.optim.SGD), Half(make=with_fp32_states)):
        trainer(LoRACallback(r=4, also_train=["head"]), max_epochs=1).fit(module, data())
        assert all(parameter.isfinite().all() for parameter in module.parameters())
    trainer(LoRACallback(r=4), max_epochs=1).fit(Half(), data())  # A and B are fp32


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Adam8bit", "Lion8bit", "AdamW"])
def test_an_optimizer_of_few_bits_resumes_bit_for_bit(name, tmp_path):
    """Of what has fewer than 4,096 elements bitsandbytes keeps fp32 states, unless it is told otherwise."""
    pytest.importorskip("bitsandbytes")
    bits = {"optim_bits": 8} if name == "AdamW" else {}

    def run(folder: str, epochs: int, ckpt: object = None) -> dict:
        module, files = FewBits(name, min_8bit_size=1, **bits), checkpoints(tmp_path / folder, monitor=None)
        callback = LoRACallback(r=4, also_train=["head"], lr_scale=4.0)
        trainer(callback, files, max_epochs=epochs).fit(module, data(), ckpt_path=ckpt)
        (saved,) = torch.load(files.last_model_path, weights_only=True)["optimizer_states"]
        dtypes = {state["__bnb_optimizer_quant_state__"]["state1"].dtype for state in saved["state"].values()}
        assert dtypes == {torch.uint8} and len(saved["state"]) == len(lora_state_dict(module)) == 18
        return lora_state_dict(module)

    whole = {key: value.clone() for key, value in run("whole", 3).items()}
    run("half", 1)
    resumed = run("resumed", 3, tmp_path / "half" / "last.ckpt")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
