"""Models with several adapters, and peft with the directories of such."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, use_adapters
from lightning_lora.config import RunConfig
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.trainer.method_callback import MethodCallback

# Other ranks, targets and scales; the layers are those of `tests.helpers.models.net`.
THREE: dict[str, dict[str, Any]] = {
    "fr": {"r": 2, "alpha": 6, "targets": ["q", "v"]},
    "de": {"r": 4, "alpha": 3, "rslora": True, "targets": ["q", "mlp"], "rank_pattern": {"layers.0.q": 3}},
    "es": {"r": 1, "targets": "all"},
}


def with_adapters(model: nn.Module, configs: Mapping[str, Mapping[str, Any]] = THREE) -> nn.Module:
    """``model`` with these adapters, whose A and B have values of their own."""
    for name, arguments in configs.items():
        apply_lora(model, LoRAConfig(**arguments, name=name))
    fill(model)
    return model


def fill(model: nn.Module, seed: int = 0) -> None:
    """Draw A and B of all adapters."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in lora_parameters(model):
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def callback_of(config: LoRAConfig, keep: Mapping[str, float] | None = None, **run: Any) -> MethodCallback:
    """A callback for these adapters, live after the run."""
    callback = MethodCallback(LoRAMethod(config, keep=keep), RunConfig(**{"merge": False, "liveness": False, **run}))
    callback.config = config  # type: ignore[attr-defined]
    return callback


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """What ``model`` computes in evaluation."""
    with torch.no_grad():
        y = model.eval()(x)
    return y if isinstance(y, Tensor) else y.logits


def mixed_as_alone(model: nn.Module, x: Tensor, entries: Sequence[Any]) -> Tensor:
    """The output for a batch whose samples use the adapters of ``entries``: that of each sample alone."""
    with use_adapters(model, entries):
        mixed: Tensor = model(x)
    for sample, y, entry in zip(x, mixed, entries, strict=True):
        with use_adapters(model, entry):
            torch.testing.assert_close(y, model(sample))
    return mixed


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warnings of peft."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def opened_by_peft(base: nn.Module, directories: Mapping[str, Path]) -> nn.Module:
    """``base`` with these directories as peft loads them, one by ``from_pretrained`` and the others beside it."""
    import peft

    (first, directory), *others = directories.items()
    with quiet_peft():
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(directory), adapter_name=first)
        for name, place in others:
            model.load_adapter(str(place), adapter_name=name)
    return model


def outputs_in_peft(model: Any, name: str, x: Tensor) -> Tensor:
    """What ``model`` of peft's computes with the adapter ``name``."""
    with quiet_peft():
        model.set_adapter(name)
    return outputs(model, x)


def written_by_peft(base: nn.Module, folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """Directories that peft wrote of adapters of its own on ``base``, one for each configuration."""
    import peft

    places = {}
    for seed, (name, arguments) in enumerate(configs.items()):
        with torch.random.fork_rng(), quiet_peft():
            torch.manual_seed(seed)
            model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**arguments))
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(str(folder / name))
        places[name] = folder / name
    return places
