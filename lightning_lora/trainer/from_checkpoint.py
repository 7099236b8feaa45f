"""Load an adapter-only checkpoint into a module that is ready to use, without a Trainer."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightning_lora.config import LoRAConfig
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.merge import merge_lora
from lightning_lora.model.same_config import check_same
from lightning_lora.model.state import load_lora_state_dict
from lightning_lora.names import clean
from lightning_lora.trainer import checkpoints
from lightning_lora.trainer.callback import LoRACallback
from lightning_lora.trainer.checkpoint_contents import check_room
from lightning_lora.trainer.compatibility import overrides
from lightning_lora.trainer.hyperparameters import with_callbacks
from lightning_lora.trainer.imports import rank_zero_warn

Module = TypeVar("Module", bound=torch.nn.Module)


def load_from_checkpoint(
    cls: type[Module],
    checkpoint_path: str | Path,
    *,
    map_location: Any = None,
    hparams_file: str | Path | None = None,
    merge: bool = False,
    strict_base: bool = True,
    weights_only: bool | None = None,
    **kwargs: Any,
) -> Module:
    """The module that a LoRA run trained, from the adapters in its checkpoint and the base that ``cls`` makes.

    Lightning's own ``cls.load_from_checkpoint(path, strict=False)`` gives the base without the adapters, and a random
    one if ``cls`` draws it. Here the base has to be the one that the adapters were trained on. The module's
    ``on_load_checkpoint`` is called twice, first by Lightning with no weights in the checkpoint, then with all of it.

    Args:
        cls: class of the LightningModule; its base is made in ``__init__`` or ``configure_model``.
        checkpoint_path: file that a Trainer with LoRACallback wrote.
        map_location: where to put the module, as for ``torch.load``; ``None`` leaves it where ``cls`` makes it.
        hparams_file: as for Lightning's ``load_from_checkpoint``.
        merge: whether to merge the adapters into the weights, so that the module is the plain one.
        strict_base: whether another base is an error; ``False`` makes it a warning.
        weights_only: as for ``torch.load``; ``False`` for hyperparameters that are objects, of a file that you trust.
        kwargs: arguments of ``cls`` in place of the saved hyperparameters.

    Raises:
        ValueError: if the file is no adapter's or is damaged, or does not fit the module or its base.

    Example:
        >>> module = load_from_checkpoint(LitModel, "last.ckpt", merge=True)  # doctest: +SKIP
    """
    checkpoint = checkpoints.read(checkpoints.on_cpu, checkpoint_path, weights_only is not False)
    checkpoint = with_callbacks(checkpoint, {"LoRACallback": LoRACallback})
    config, trained_on = checkpoints.facts_in(checkpoint, checkpoint_path)
    module = _bare(cls, checkpoint, hparams_file=hparams_file, **kwargs)
    if map_location is not None:
        module.to(map_location)
    _adapt(module, config, checkpoint["state_dict"])
    try:
        checkpoints.check_base(trained_on, fingerprint(module), checkpoint_path)
    except ValueError as error:
        if strict_base:
            raise
        rank_zero_warn(str(error))
    if overrides(module, "on_load_checkpoint"):
        module.on_load_checkpoint(checkpoint)  # type: ignore[operator]
    load_lora_state_dict(module, {clean(key): value for key, value in checkpoint["state_dict"].items()})
    if merge:
        merge_lora(module)
    return module


def _bare(cls: type[Module], checkpoint: dict[str, Any], **kwargs: Any) -> Module:
    """The module that Lightning makes from the hyperparameters in the file, with no weights loaded yet."""
    file = io.BytesIO()
    kept = {key: value for key, value in checkpoint.items() if key not in ("optimizer_states", "callbacks", "loops")}
    torch.save({**kept, "state_dict": {}}, file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*contains no parameters")
        warnings.filterwarnings("ignore", message=".*in the model state dict but not in the checkpoint")
        # `weights_only` was minded when the checkpoint was read; these bytes were written here.
        return cls.load_from_checkpoint(file, strict=False, weights_only=False, **kwargs)  # type: ignore[attr-defined, no-any-return]


def _adapt(module: torch.nn.Module, config: LoRAConfig, state: dict[str, Any]) -> None:
    check_same(module, config)
    try:
        check_room(module, config, state)
        apply_lora(module, config)
    except ValueError as error:
        if not overrides(module, "setup"):
            raise
        raise ValueError(
            f"The checkpoint's targets are not in {type(module).__name__}: {error} It has a `setup`, which only a "
            "Trainer calls: if that makes the model, use Trainer(...).test(module, ckpt_path=...), or make it in "
            "`__init__` or `configure_model`."
        ) from error
