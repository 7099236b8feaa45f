"""One row for each method, for the cases that all of them go through: `tests/methods/test_life_of_a_run.py`."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora import (
    AdapterCallback,
    FusionCallback,
    LoRACallback,
    PrefixCallback,
    PromptCallback,
    SubspaceCallback,
    TuneCallback,
)
from lightning_lora.model.fingerprint import fingerprint
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
        gathers: whether a parameter gets its gradient from several modules, in an order that checkpointing changes.
        without_fsdp1: words of the message that refuses FSDP1; empty where it works.
        other: another callback of the same method, whose files do not fit.
        kept: the names of frozen buffers that files hold too.
        flags: gives its arguments on the command line of LightningCLI.
    """

    name: str
    make: Callable[..., MethodCallback]
    trained: set[str]
    bare: bool = True
    merges: bool = False
    skipped: str = r"exclude=\['net.layers.1'\]"
    gathers: bool = False
    without_fsdp1: str = ""
    other: Callable[[], MethodCallback] | None = None
    kept: frozenset[str] | set[str] = frozenset()
    flags: Callable[[], tuple[str, ...]] = tuple

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
        without_fsdp1="everything trains, so that nothing would be sharded" if train == "all" else "",
        other=lambda: TuneCallback(other),
        flags=lambda: (f"train={train}" if isinstance(train, str) else f"train={json.dumps(train)}",),
    )


SITES = {
    "houlsby": [f"net.layers.{n}.{site}" for n in (0, 1) for site in ("attn.o_proj", "mlp.fc2")],
    "pfeiffer": [f"net.layers.{n}.mlp.fc2" for n in (0, 1)],
    "parallel": [f"net.layers.{n}.mlp.fc2" for n in (0, 1)],
    "block": [f"net.layers.{n}" for n in (0, 1)],
}


def bottleneck(placement: str) -> MethodCase:
    keys = ["down", "down_bias", "up", "up_bias", *(["norm", "norm_bias"] if placement == "block" else [])]
    return MethodCase(
        f"bottleneck-{placement}",
        lambda **shared: AdapterCallback(3, placement, also_train=["head"], **shared),
        {f"{site}.bottleneck.{key}" for site in SITES[placement] for key in keys} | HEAD,
        other=lambda: AdapterCallback(4, placement, also_train=["head"]),
    )


@cache
def trained_bottlenecks(placement: str) -> dict[str, str]:
    """Checkpoints of two bottlenecks on the module, by name; every process writes the same."""
    checkout = hashlib.blake2b(__file__.encode(), digest_size=8).hexdigest()  # another one may be tested beside it
    folder = Path(tempfile.gettempdir()) / f"bottlenecks-of-tests-{checkout}" / placement
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.ckpt" for name in ("fr", "de")}
    for by, (name, path) in enumerate(paths.items(), 1):
        own, callback = module(), AdapterCallback(3, placement, name=name)
        callback.method.complete(own)
        move(own, callback, 0.1 * by)
        facts = {"method": "bottleneck", "config": callback.config.to_dict(), "base": fingerprint(own)}
        part = path.with_suffix(f".{os.getpid()}")
        torch.save({"state_dict": callback.method.state(own), "lightning_lora": facts}, part)
        part.replace(path)
    return {name: str(path) for name, path in paths.items()}


def fusion(placement: str) -> MethodCase:
    trained = ("query", "query_bias", "key", "key_bias", "value")
    kept = [f"adapters.{name}.{key}" for name in ("fr", "de") for key in ("down", "down_bias", "up", "up_bias")]
    return MethodCase(
        f"fusion-{placement}",
        lambda **shared: FusionCallback(trained_bottlenecks(placement), also_train=["head"], **shared),
        {f"{site}.fusion.{key}" for site in SITES[placement] for key in trained} | HEAD,
        bare=False,
        kept={f"{site}.fusion.{key}" for site in SITES[placement] for key in kept},
        other=lambda: FusionCallback({"fr": trained_bottlenecks(placement)["fr"]}, also_train=["head"]),
        flags=lambda: (f"adapters={json.dumps(trained_bottlenecks(placement))}", "also_train=[head]"),
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
        flags=lambda: ("r=2", "dropout=0.1", "also_train=[head]"),
    ),
    MethodCase(
        "prefix",
        lambda **shared: PrefixCallback(length=3, also_train=["head"], **shared),
        {f"net.layers.{n}.attn.prefix.{x}" for n in (0, 1) for x in "KV"} | HEAD,
        bare=False,
        other=lambda: PrefixCallback(length=4, also_train=["head"]),
    ),
    MethodCase(
        "prompt",
        lambda **shared: PromptCallback(length=3, **shared),
        {"net.layers.0.prompt.vectors"},
        bare=False,
        skipped="",
        other=lambda: PromptCallback(length=3, deep=True),
    ),
    MethodCase(
        "prompt-deep",
        lambda **shared: PromptCallback(length=3, deep=True, **shared),
        {f"net.layers.{n}.prompt.vectors" for n in (0, 1)},
        bare=False,
        other=lambda: PromptCallback(length=2, deep=True),
    ),
    MethodCase(
        "subspace",
        lambda **shared: SubspaceCallback(20, also_train=["head"], **shared),
        {"net.embed.subspace.z"} | HEAD,
        merges=True,
        gathers=True,
        without_fsdp1="puts pieces of a flat buffer there",
        other=lambda: SubspaceCallback(21, also_train=["head"]),
    ),
    MethodCase(
        "subspace-structured",
        lambda **shared: SubspaceCallback(20, structure=True, seed=1, **shared),
        {"net.embed.subspace.z"} | {f"{name.rpartition('.')[0]}.subspace.scale" for name in ALL},
        merges=True,
        gathers=True,
        without_fsdp1="puts pieces of a flat buffer there",
        other=lambda: SubspaceCallback(20, structure=True, seed=2),
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
    *map(bottleneck, SITES),
    fusion("houlsby"),
    fusion("parallel"),
]


# Other cases of the same callbacks are fast.
SLOW = {"tune-norm", "tune-head", "tune-patterns", "prompt-deep", "bottleneck-houlsby", "bottleneck-pfeiffer"}
SLOW |= {"bottleneck-block", "fusion-houlsby"}
FAST = [case for case in CASES if case.name not in SLOW]
# One case of each class of callbacks, where its arguments play no part; and what the fast selection takes of a table.
EACH = {"lora", "prefix", "prompt", "subspace", "tune-bias", "bottleneck-parallel", "fusion-parallel"}
OF_EACH_CALLBACK = [case for case in FAST if case.name in EACH]
QUICK = [case for case in FAST if case.name in ("prefix", "bottleneck-parallel")]
# Not among the others, which call the module without a batch: the segment of a sample is its class.
SEGMENTS = MethodCase(
    "bottleneck-segments",
    lambda **shared: AdapterCallback(3, "block", segments=1, segment_count=3, also_train=["head"], **shared),
    bottleneck("block").trained | {f"net.layers.{n}.bottleneck.segment_embedding" for n in (0, 1)},
)


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
