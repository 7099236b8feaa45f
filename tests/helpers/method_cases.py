"""One row for each method, for the cases that all of them go through: `tests/methods/test_life_of_a_run.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora import LoRACallback, TuneCallback
from lightning_lora.trainer.method_callback import MethodCallback
from tests.helpers.models import LitEncoder

NORMS = {f"net.layers.{n}.norm{m}.{key}" for n in (0, 1) for m in (1, 2) for key in ("weight", "bias")}
BATCH_NORM, HEAD = {"net.bn.weight", "net.bn.bias"}, {"net.head.weight", "net.head.bias"}
ALL = {name for name, _ in LitEncoder().named_parameters()}


@dataclass(frozen=True)
class MethodCase:
    """A method in the life of a run on `LitEncoder`.

    Args:
        name: of the case.
        make: makes the callback; it takes the arguments that all callbacks share.
        trained: the names of what trains.
        bare: whether the model starts as the base, bit for bit.
        merges: whether the end of `fit` takes everything off the module.
        skipped: a pattern of the message that names what was not reached where the second block does not run; empty
            where nothing of the method is in a block.
        other: another callback of the same method, whose files do not fit.
        flags: its arguments on the command line of LightningCLI.
    """

    name: str
    make: Callable[..., MethodCallback]
    trained: set[str]
    bare: bool = True
    merges: bool = False
    skipped: str = r"exclude=\['net.layers.1'\]"
    other: Callable[[], MethodCallback] | None = None
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def tune(train: str | list[str], trained: set[str], skipped: str = r"exclude=\['net.layers.1'\]") -> MethodCase:
    name = train if isinstance(train, str) else "patterns"
    other = "norm" if train == "bias" else "bias"
    return MethodCase(
        f"tune-{name}",
        lambda **shared: TuneCallback(train, **shared),
        trained,
        skipped=skipped,
        other=lambda: TuneCallback(other),
        flags=(f"train={train}" if isinstance(train, str) else f"train={json.dumps(train)}",),
    )


LORA = {f"net.layers.{n}.attn.{m}_proj.lora.default.{x}" for n in (0, 1) for m in "qkvo" for x in "AB"}
CASES = [
    MethodCase(
        "lora",
        lambda **shared: LoRACallback(r=2, dropout=0.1, also_train=["head"], **shared),
        LORA | HEAD,
        merges=True,
        skipped="'net.layers.1.attn.q_proj.weight'",
        other=lambda: LoRACallback(r=3, also_train=["head"]),
        flags=("r=2", "dropout=0.1", "also_train=[head]"),
    ),
    tune("bias", {name for name in ALL if name.endswith("bias")}),
    tune("norm", NORMS | BATCH_NORM),
    tune("head", HEAD, skipped=""),
    tune("all", ALL),
    tune(
        ["layers.1", "re:.*bn[.]weight"],
        {n for n in ALL if ".layers.1." in n} | {"net.bn.weight"},
        r"exclude=\['net.layers'\]",
    ),
]


FAST = [case for case in CASES if not case.name.startswith("tune") or case.name in ("tune-bias", "tune-all")]


def module(**kwargs: object) -> LitEncoder:
    """The module that every method adapts, the same at every call."""
    return LitEncoder(**kwargs)


def inputs(n: int = 8) -> Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(7))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@torch.no_grad()
def move(case_module: nn.Module, callback: MethodCallback, by: float = 0.05) -> None:
    """Train by hand: every parameter that trains moves."""
    for _, parameter in callback.method.trained_parameters(case_module):
        parameter += by
