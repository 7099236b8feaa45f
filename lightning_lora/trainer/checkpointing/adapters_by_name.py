"""Files of several adapters: what they record of those that do not train, and which of them a module takes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig, MethodConfig
from lightning_lora.methods.base import Method
from lightning_lora.methods.known import method_of
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.model.fingerprint import Fingerprint
from lightning_lora.model.record import configs_of, kept_names
from lightning_lora.model.same_config import difference
from lightning_lora.model.several.strengths import strengths_of
from lightning_lora.model.state import lora_state_dict
from lightning_lora.trainer.checkpointing import reading
from lightning_lora.trainer.checkpointing.contents import KEY, WEIGHTS


@dataclass(frozen=True)
class AdapterFile:
    """A checkpoint of a run, opened.

    Args:
        path: of the file.
        content: what is in it.
        config: of the adapters that trained.
        base: the fingerprint of the base that they were trained on.
        kept: the configurations of its other adapters, by name.
    """

    path: str | Path
    content: dict[str, Any]
    config: MethodConfig
    base: Fingerprint
    kept: dict[str, LoRAConfig]

    @property
    def method(self) -> Method:
        """The method that its configuration belongs to."""
        if isinstance(self.config, LoRAConfig) and self.kept:
            return LoRAMethod(self.config, keep=self.strengths())
        return method_of(self.config)

    def strengths(self) -> dict[str, float]:
        """How strongly its other adapters act."""
        return {**dict.fromkeys(self.kept, 1.0), **reading.strengths_in(self.content)}


def kept_adapters(model: nn.Module) -> dict[str, Any]:
    """The configuration of each adapter of ``model`` that does not train, and the strength with which it acts."""
    kept = kept_names(model)
    if not kept:
        return {}
    strengths = strengths_of(model)
    configs = configs_of(model).items()
    return {
        name: {"config": config.to_dict(), "strength": strengths.get(name, 1.0)}
        for name, config in configs
        if name in kept
    }


def adapters_in(checkpoint: Mapping[str, Any]) -> set[str]:
    """The names of the adapters in the file of a LoRA run, which was checked."""
    trained = LoRAConfig.from_file(checkpoint[KEY]["config"]).each()
    return {*(config.name for config in trained), *reading.kept_in(checkpoint)}


def check_no_others(file: AdapterFile, module: nn.Module) -> None:
    """Raise if ``module`` has adapters that are not in ``file``, which would act in addition.

    Raises:
        ValueError: naming the first.
    """
    if not isinstance(file.config, LoRAConfig):
        return
    others = [name for name in configs_of(module) if name not in adapters_in(file.content)]
    if others:
        raise ValueError(
            f"The module has an adapter {others[0]!r}, which is not in {file.path}. load_from_checkpoint gives the "
            f"module that the run trained: call `remove_lora(module, name={others[0]!r})` first. To have both make a "
            "directory of the file by `lightning-lora export CKPT DIR`, and call `load_adapter(module, directory, "
            "name=...)`."
        )


def check_kept(checkpoint: Mapping[str, Any], path: Any, model: nn.Module) -> None:
    """Raise if an adapter that the file keeps has another configuration in ``model``.

    Raises:
        ValueError: naming the first difference.
    """
    present = configs_of(model)
    for name, config in reading.kept_in(checkpoint).items():
        own = present.get(name)
        change = difference(config, own) if isinstance(own, LoRAConfig) else None
        if change is not None:
            raise ValueError(
                f"{path} keeps an adapter {name!r} that has {change} in the module. To go on from the file make the "
                "module of it, too: load_from_checkpoint(cls, path)."
            )


def for_resume(checkpoint: dict[str, Any], method: Method, model: nn.Module) -> dict[str, Any]:
    """``checkpoint`` for a run with other adapters: those that only the file has are left out, new ones start fresh.

    Args:
        checkpoint: checked, with weights under clean names.
        method: of the run.
        model: its module, which is adapted.
    """
    if not isinstance(method.config, LoRAConfig):
        return checkpoint
    held = adapters_in(checkpoint)
    weights = {key: with_adapters(checkpoint[key], model, held, held) for key in WEIGHTS if key in checkpoint}
    return checkpoint | weights


def with_adapters(
    state: Mapping[str, Any], model: nn.Module, held: Collection[str], taken: Collection[str]
) -> dict[str, Any]:
    """``state`` with exactly the adapters of ``model``: ``taken`` from it, the others as they are in ``model``.

    Args:
        state: the weights in a file, under clean names.
        model: an adapted module.
        held: the names of the adapters in ``state``.
        taken: those of them that are taken, if ``model`` has them.
    """
    present = configs_of(model).keys()
    others = "|".join(map(re.escape, set(held) - present))
    entry = re.compile(rf"(?:.*\.)?lora\.(?:{others})\..+")
    kept = {key: value for key, value in state.items() if not (others and entry.fullmatch(key))}
    for name in present - set(taken):
        kept |= lora_state_dict(model, name)
    return kept
