"""Remedies of messages about what does not train, moves though it is frozen, or is replaced during a run."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRACallback, load_from_checkpoint, lora_state_dict
from tests.helpers.models import Lit, net
from tests.helpers.remedies.case import Expected, fit, fit_to_file, outputs, remedy

LIVENESS = "trainer/watching/liveness.py"
FROZEN = "trainer/watching/frozen_watch.py"


class TwoWays(Lit):
    """Has one more layer, and a method for it."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        with torch.random.fork_rng():
            self.extra = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + getattr(self, self.way)(x))

    def plain(self, x: Tensor) -> Tensor:
        return self.extra(x)

    def raw(self, x: Tensor) -> Tensor:
        return F.linear(x, *weights(self.extra))

    def raw_in_evaluation(self, x: Tensor) -> Tensor:
        return self.plain(x) if self.training else self.raw(x)

    def without_gradients(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.extra(x)

    def reentrant(self, x: Tensor) -> Tensor:
        return checkpoint(self.extra, x, use_reentrant=True)  # type: ignore[no-any-return]

    def not_reentrant(self, x: Tensor) -> Tensor:
        return checkpoint(self.extra, x, use_reentrant=False)  # type: ignore[no-any-return]


def weights(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Reads where no source of the module's class shows it."""
    return layer.weight, layer.bias


TARGETS = ["q", "extra"]


def learned(module: nn.Module) -> bool:
    return bool(module.extra.lora.default.B.any())


@remedy(
    LIVENESS, "{} did not run: this batch took another branch", "`extra`", "targets=[..., 'extra.weight']", "`exclude`"
)
def a_weight_that_is_read_by_its_name(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(targets=TARGETS), module=TwoWays("raw"))
    module = fit(LoRACallback(targets=[*TARGETS, "extra.weight"], merge=False), module=TwoWays("raw"))
    assert any(value.any() for name, value in lora_state_dict(module).items() if "extra" in name and "B" in name)
    fit(LoRACallback(targets=TARGETS, exclude=["extra"]), module=TwoWays("raw"))


@remedy(LIVENESS, "{} ran where gradients are off", "exclude=['extra']", "call what trains outside of `torch.no_grad`")
def a_layer_under_no_grad(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(targets=TARGETS), module=TwoWays("without_gradients"))
    fit(LoRACallback(targets=TARGETS, exclude=["extra"]), module=TwoWays("without_gradients"))
    assert learned(fit(LoRACallback(targets=TARGETS, merge=False), module=TwoWays("plain")))


@remedy(LIVENESS, "{} ran in reentrant activation checkpointing", "`extra`", "use_reentrant=False")
def checkpointing_that_is_not_reentrant(message: Expected, folder: Path) -> None:
    class Hidden(TwoWays):
        def reentrant(self, x: Tensor) -> Tensor:
            return rematerialized(self.extra, x)

    with message:
        fit(LoRACallback(targets=TARGETS), module=Hidden("reentrant"))
    assert learned(fit(LoRACallback(targets=TARGETS, merge=False), module=TwoWays("not_reentrant")))


rematerialized = getattr(torch.utils.checkpoint, "checkpoint")  # noqa: B009  under a name that says nothing


@remedy(LIVENESS, "{} ran in training and did not run in the first evaluation", "`extra`", "'extra.weight'")
def an_evaluation_that_reads_the_weight(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(targets=TARGETS), module=TwoWays("raw_in_evaluation"))
    lora = LoRACallback(targets=[*TARGETS, "extra.weight"], merge=False)
    module = fit(lora, module=TwoWays("raw_in_evaluation"))
    live = outputs(module)
    assert not torch.allclose(live, outputs(without_adapters(module)))


def without_adapters(module: nn.Module) -> nn.Module:
    plain = TwoWays("raw_in_evaluation")
    state = {name: value for name, value in module.state_dict().items() if ".lora." not in name}
    plain.load_state_dict(state)
    return plain


class Takes(Callback):
    """Takes what trains of a layer out of the optimizer, or all but its adapter."""

    def __init__(self, leaves_adapters: bool = False) -> None:
        self.leaves_adapters = leaves_adapters

    def on_train_start(self, trainer: object, pl_module: nn.Module) -> None:
        layer = pl_module.net.layers[1].v
        taken = {id(p) for name, p in layer.named_parameters() if not (self.leaves_adapters and "lora" in name)}
        for group in trainer.optimizers[0].param_groups:  # type: ignore[attr-defined]
            group["params"][:] = [p for p in group["params"] if id(p) not in taken]


@remedy(
    LIVENESS, "No optimizer holds the {} of {}, so it would", "`net.layers.1.v`", "Leave the parameters", "`exclude`"
)
def an_adapter_that_is_left_in_its_group(message: Expected, folder: Path) -> None:
    with message:
        fit(Takes(), LoRACallback(targets=["q", "v"]))
    module = fit(Takes(leaves_adapters=True), LoRACallback(targets=["q", "v"], merge=False))
    assert module.net.layers[1].v.lora.default.B.any()
    fit(Takes(), LoRACallback(targets=["q", "v"], exclude=["layers.1.v"]))


@remedy(LIVENESS, "{} train without `dropout`", "layers are in eval mode", "Call `.train()`")
def dropout_in_train_mode(message: Expected, folder: Path) -> None:
    class Evaluates(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net.eval()

    class Trains(Evaluates):
        def __init__(self) -> None:
            super().__init__()
            self.net.train()

    with message:
        fit(LoRACallback(dropout=0.1), module=Evaluates())
    fit(LoRACallback(dropout=0.1), module=Trains())


class Moves(Lit):
    """Decays every parameter of its head by hand."""

    skips = False

    def on_train_batch_end(self, *_: object) -> None:
        with torch.no_grad():
            for parameter in self.net.head.parameters():
                if parameter.requires_grad or not self.skips:
                    parameter.mul_(0.9)


class Skips(Moves):
    skips = True


@remedy(
    FROZEN,
    "Frozen, but {}: {}. {}Checkpoints hold {}",
    "`net.head.weight`",
    "`also_train`",
    "if parameter.requires_grad",
)
def what_moves_trains_or_is_skipped(message: Expected, folder: Path) -> None:
    with message:
        fit_to_file(folder / "moves", LoRACallback(), module=Moves())
    for trained, arguments in ((Moves(), {"also_train": ["head"]}), (Skips(), {})):
        path = fit_to_file(folder / type(trained).__name__, LoRACallback(**arguments, merge=False), module=trained)
        assert torch.equal(outputs(load_from_checkpoint(Lit, path)), outputs(trained))


@remedy(FROZEN, "Frozen, but {}: {}. {}. To train {}", "requiring a gradient", "name them in `also_train`")
def what_unfreezes_itself_is_named(message: Expected, folder: Path) -> None:
    class Unfreezes(Lit):
        def on_train_batch_start(self, *_: object) -> None:
            self.net.head.requires_grad_(True)

    with message:
        fit(LoRACallback(), module=Unfreezes())
    module = fit(LoRACallback(also_train=["head"]), module=Unfreezes())
    assert not torch.equal(module.net.head.weight, net().head.weight)
