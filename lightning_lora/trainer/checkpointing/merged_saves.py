"""``save="merged"``: a checkpoint holds the merged state dict, which any loader takes, and in addition the adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lora.methods.base import Method
from lightning_lora.names import clean
from lightning_lora.trainer.checkpointing import contents
from lightning_lora.trainer.imports import MisconfigurationException


def check_merged_saves(method: Method, module: Any) -> None:
    """Raise before the first step if no file could hold the merged state dict of ``module``.

    Raises:
        MisconfigurationException: saying why, and naming the argument.
    """
    reason, present = method.never_merges(module), {clean(key) for key in module.state_dict()}
    missing = [name for name, _ in method.adapted_weights(module).values() if name not in present]
    if reason is None and missing:
        reason = (
            f"`{type(module).__name__}.state_dict()` has no entry `{missing[0]}`, an adapted weight, so a file has no "
            "place for the merged value. Leave this entry in it under this name."
        )
    if reason is not None:
        raise MisconfigurationException(f"`save='merged'` cannot write its files. {reason} Or use save='adapter'.")


def with_merged_state(
    checkpoint: dict[str, Any],
    whole: Mapping[str, Any],
    seen_by_hooks: Mapping[str, Any] | None,
    method: Method,
    module: Any,
) -> dict[str, Any]:
    """``checkpoint`` with the merged state dict, and with its adapters under the package's own key.

    Args:
        checkpoint: as it is written with ``save="adapter"``.
        whole: the state dict that the hooks left: with the base, under keys that they may have changed.
        seen_by_hooks: the state dict that the hooks got.
        method: of the adapters.
        module: which is adapted or merged, and stays as it is.
    """
    tensors = ((key, value) for key, value in (seen_by_hooks or {}).items() if isinstance(value, Tensor))
    seen, adapter = {id(value): clean(key) for key, value in tensors}, checkpoint["state_dict"]
    names = {key: seen.get(id(value), clean(key)) for key, value in whole.items()}
    own = {seen.get(id(value), key): value for key, value in adapter.items()}
    merged = method.merged_state(module, whole, own, names)
    about = {**checkpoint[contents.KEY], "state_dict": adapter}
    return {**checkpoint, "state_dict": merged, contents.KEY: about}
