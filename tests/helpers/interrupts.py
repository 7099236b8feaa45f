"""Interrupt a call at any line of the package, and compare all that a verb may change in a model.

``python -m tests.helpers.interrupts [VERB ...]`` interrupts verbs at every line of the package that they run, where a
line runs often at its first, its middle and its last time, and prints what it saw.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import lightning_lora
from lightning_lora import (
    LoRAConfig,
    apply_lora,
    combine_adapters,
    disable_lora,
    load_adapter,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.layers.base import LoRALayer
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.model.record import records
from tests.helpers import oracles
from tests.helpers.models import EveryKind, Net, net
from tests.helpers.several import THREE, with_adapters

PACKAGE = str(Path(lightning_lora.__file__).parent)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def lines_in(call: Callable[[], object]) -> list[str]:
    """The lines of the package that ``call`` runs, as ``file:line``, in their order."""
    lines: list[tuple[str, int]] = []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        return trace

    with traced_by(trace):
        call()
    return [f"{file.removeprefix(PACKAGE)}:{line}" for file, line in lines]


def interrupt(call: Callable[[], object], at: int, error: type[BaseException] = KeyboardInterrupt) -> str:
    """Call it, and raise ``error`` in it at the line number ``at``; returns the file and the line of the package."""
    left, file, line = at, "", 0
    unraisable = sys.unraisablehook

    def trace(frame: FrameType, event: str, _: object) -> Any:  # runs at every line: it has to be short
        nonlocal left, file, line
        if event == "line":
            left -= 1
            if not left:
                sys.settrace(None)
                file, line = frame.f_code.co_filename, frame.f_lineno
                raise error
        return trace

    sys.unraisablehook = lambda _: None  # an interrupt in `__del__`
    try:
        with suppress(error), traced_by(trace):
            call()
    finally:
        sys.unraisablehook = unraisable
    return f"{file.removeprefix(PACKAGE)}:{line}"


@contextmanager
def traced_by(trace: Callable[[FrameType, str, object], Any]) -> Iterator[None]:
    """Call ``trace`` for every line of the package that runs."""
    before = sys.gettrace()
    sys.settrace(lambda frame, *_: trace if frame.f_code.co_filename.startswith(PACKAGE) else None)
    try:
        yield
    finally:
        sys.settrace(before)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a verb may change, as plain values; equal for equal models."""
    state: dict[str, Any] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"{name}/class"] = type(module)
        state[f"{name}/keys"] = [sorted(vars(module).keys() - {"enabled"}), list(module._modules), module.training]
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                tied = owners.setdefault(id(tensor), f"{name}.{key}")
                state[f"{name}.{key}"] = (tied, type(tensor), tensor.requires_grad, *bits(tensor))
        for hooks in HOOKS:
            state[f"{name}/{hooks}"] = [type(getattr(hook, "hook", hook)) for hook in getattr(module, hooks).values()]
        if isinstance(module, nn.RNNBase):
            flat = zip(module._flat_weights, module._flat_weights_names, strict=True)
            state[f"{name}/flat"] = [weight is module._parameters[key] for weight, key in flat]
        if isinstance(module, LoRALayer):
            state[f"{name}/enabled"] = (module.lora.enabled, dict(module.lora.strengths))
    for name, _, record in records(model):
        plain = {key: value for key, value in vars(record).items() if key not in ("merged", "originals", "load_hook")}
        originals = {key: bits(value) for key, value in record.originals.items()}
        state[f"{name}/record"] = (plain, originals, record.load_hook is None)
        if record.merged is not None:
            weights = {key: (w.checksum, w.original, w.shared is None) for key, w in record.merged.weights.items()}
            pairs = {key: bits(value) for key, value in record.merged.adapters.named_parameters()}
            state[f"{name}/merged"] = (weights, pairs)
    return state


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """The dtype, the shape and the bytes of ``tensor``."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), raw.numpy().tobytes()


def difference(present: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The names of what differs between two results of :func:`state_of`."""
    return [key for key in present.keys() | expected.keys() if present.get(key) != expected.get(key)]


TARGETS = ["embedding", "positions", "conv", "rnn", "attention", "fc", "head"]
CONFIG = LoRAConfig(r=2, targets=TARGETS, also_train=["extra"], bias="lora_only")
INDEX = torch.tensor([[0, 1, 2], [3, 4, 5]])


def trained(seed: int = 0) -> nn.Module:
    """A model with live adapters, of which everything that may change has changed."""
    model = subject("bare")
    apply_lora(model, CONFIG)
    oracles.train_by_hand(model, 0.3, seed=seed)
    with torch.no_grad():
        for tensor in (model.extra.weight, model.norm.running_mean, model.fc.bias):
            tensor.add_(1 + seed)
    return model


@cache
def _subject(kind: str) -> nn.Module:
    if kind == "bare":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return EveryKind().eval()
    if kind == "plain net":
        return net()
    if kind == "net with two":
        return with_adapters(net(), {"fr": THREE["fr"], "slot": {"r": 8, "targets": "all"}})
    model = trained()
    if kind == "merged":
        merge_lora(model)
    if kind == "two adapters":
        apply_lora(model, LoRAConfig(r=1, targets=["fc", "rnn"], also_train=["norm"], name="more"))
        with torch.no_grad():
            model.norm.weight.add_(1)
    return model


def subject(kind: str) -> nn.Module:
    """A new model that is ``"bare"``, ``"live"``, ``"merged"`` or has ``"two adapters"``.

    Or it is one that PEFT's format can hold: a ``"plain net"``, or a ``"net with two"`` adapters.
    """
    return copy.deepcopy(_subject(kind))


@cache
def other_state() -> dict[str, Tensor]:
    """The state of another training."""
    return {key: value.detach().clone() for key, value in lora_state_dict(trained(1)).items()}


@cache
def peft_directory() -> tempfile.TemporaryDirectory[str]:
    """A directory for ``"plain net"``, in PEFT's format."""
    model: Net = net()
    apply_lora(model, LoRAConfig(r=2, targets=["q", "v"], also_train=["head"]))
    oracles.train_by_hand(model, 0.3)
    directory = tempfile.TemporaryDirectory()
    save_adapter(model, directory.name)
    return directory


@cache
def directory_of_three() -> tempfile.TemporaryDirectory[str]:
    """A directory of three adapters for ``"net with two"``."""
    directory = tempfile.TemporaryDirectory()
    save_adapter(with_adapters(net()), directory.name)
    return directory


def within(manager: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    """Run the model in a ``with`` block of ``manager``."""

    def run(model: nn.Module) -> None:
        with manager(model):
            model(INDEX)

    return run


# What each verb starts from, and the verb.
VERBS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "apply": ("bare", lambda model: apply_lora(model, CONFIG)),
    "apply to merged": ("merged", lambda model: apply_lora(model, CONFIG)),
    "merge": ("live", merge_lora),
    "merge for good": ("live", lambda model: merge_lora(model, undo=False)),
    "forget": ("merged", lambda model: merge_lora(model, undo=False)),
    "unmerge": ("merged", unmerge_lora),
    "remove": ("live", remove_lora),
    "remove merged": ("merged", remove_lora),
    "remove one": ("two adapters", lambda model: remove_lora(model, name="more")),
    "drop": ("live", LoRAMethod(CONFIG).drop),
    "load": ("live", lambda model: load_lora_state_dict(model, other_state())),
    "load into merged": ("merged", lambda model: model.load_state_dict(dict(other_state()))),
    "load a directory": ("plain net", lambda model: load_adapter(model, peft_directory().name)),
    "load several": ("net with two", lambda model: load_adapter(model, directory_of_three().name)),
    "swap": ("net with two", lambda model: load_adapter(model, f"{directory_of_three().name}/de", into="slot")),
    "combine": ("live", lambda model: combine_adapters(model, {"default": 0.5}, "mix", "ties")),
    "disable": ("live", within(disable_lora)),
    "as found": ("live", within(LoRAMethod(CONFIG).as_found)),
    "forward": ("live", lambda model: model(INDEX)),
}


ONCE = ("merge for good", "forget", "combine", "remove one")  # done twice they are an error


def lines_of(verb: str) -> list[str]:
    """The lines of the package that the verb runs."""
    kind, call = VERBS[verb]
    call(subject(kind))  # once before: classes and patterns are made at their first use
    model = subject(kind)
    return lines_in(lambda: call(model))


def first_middle_last(lines: list[str]) -> list[int]:
    """For each line the numbers, from 1, of its first, its middle and its last time in ``lines``."""
    times: dict[str, list[int]] = {}
    for number, line in enumerate(lines, 1):
        times.setdefault(line, []).append(number)
    return sorted({number for each in times.values() for number in (each[0], each[len(each) // 2], each[-1])})


def check_lines(verb: str, lines: Iterable[int], error: type[BaseException] = KeyboardInterrupt) -> list[str]:
    """Interrupt the verb at each of ``lines``; returns what was wrong.

    The model must be as before the verb or as after it, and the verb must then work.
    """
    kind, call = VERBS[verb]
    before, wrong = state_of(subject(kind)), []
    done = subject(kind)
    call(done)
    after = state_of(done)
    for at in lines:
        model = subject(kind)
        place = interrupt(lambda model=model: call(model), at, error)  # type: ignore[misc]
        present = state_of(model)
        if present not in (before, after):
            wrong.append(f"{place}: between, {difference(present, before)}")
        if present != after or verb not in ONCE:
            call(model)
        if state_of(model) != after:
            wrong.append(f"{place}: not again, {difference(state_of(model), after)}")
    return wrong


if __name__ == "__main__":
    for name in sys.argv[1:] or VERBS:
        run = lines_of(name)
        chosen = first_middle_last(run)
        wrong = check_lines(name, chosen)
        print(f"{name}: {len(run)} lines run, {len(set(run))} lines of code, interrupted {len(chosen)} times")
        print(f"    {len(wrong)} wrong", *wrong, sep="\n    ", flush=True)
