"""``save="merged"``: a checkpoint holds the merged state dict, which any loader takes, and in addition the adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lora.layers.quantized.formats import quantized_modules
from lightning_lora.methods.base import Method
from lightning_lora.names import clean, each_module_once, join
from lightning_lora.targets.survey import memory_of
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
    if reason is None and quantized_modules(module):
        reason = "Its base is quantized, and is merged once, at the end of fit: `merged=PATH` writes that."
    reason = _why_tied(method, module) if reason is None else reason
    if reason is not None:
        raise MisconfigurationException(f"`save='merged'` cannot write its files. {reason} Or use save='adapter'.")


def _why_tied(method: Method, module: Any) -> str | None:
    """Why a plain module would load the file wrong: it puts the values of all tied names into one parameter."""
    adapted = {name for name, _ in method.adapted_weights(module).values()}
    holders: dict[tuple[int, bool], list[str]] = {}
    for name, inner in each_module_once(module):
        for key in inner._parameters:
            holders.setdefault(memory_of(inner, key), []).append(join(clean(name), key))
    tied = next((group for group in holders.values() if len(group) > 1 and not adapted.isdisjoint(group)), None)
    if tied is None:
        return None
    first, *others = sorted(tied, key=lambda name: name not in adapted)
    leave_out = [name.rpartition(".")[0] for name in tied if name in adapted]
    return (
        f"`{first}` is adapted and tied to {', '.join(f'`{name}`' for name in others)}. Merged, they differ, and a "
        f"module that ties them would load one value into all. Leave it out, exclude={leave_out!r}, or give each a "
        "weight of its own in `__init__`."
    )


def with_merged_state(
    checkpoint: dict[str, Any],
    whole: Mapping[str, Any],
    seen_by_hooks: Mapping[str, Any] | None,
    method: Method,
    module: Any,
) -> dict[str, Any]:
    """``checkpoint`` with the merged state dict, and with all that only our run can load under the package's own key.

    A run without the callback would load the optimizers' states of adapters into optimizers of the whole module. So it
    finds none, and Lightning raises that the file holds only the model.

    Args:
        checkpoint: as it is written with ``save="adapter"``.
        whole: the state dict that the hooks left: with the base, under keys that they may have changed.
        seen_by_hooks: the state dict that the hooks got.
        method: of the adapters.
        module: which is adapted or merged, and stays as it is.
    """
    tensors = ((key, value) for key, value in (seen_by_hooks or {}).items() if isinstance(value, Tensor))
    seen = {id(value): clean(key) for key, value in tensors}
    names = {key: seen.get(id(value), clean(key)) for key, value in whole.items()}
    own = {seen.get(id(value), key): value for key, value in checkpoint["state_dict"].items()}
    merged = method.merged_state(module, whole, own, names)
    own_entries = {key: checkpoint[key] for key in contents.ENTRIES_OF_RUN if key in checkpoint}
    rest = {key: value for key, value in checkpoint.items() if key not in own_entries}
    return {**rest, "state_dict": merged, contents.KEY: {**checkpoint[contents.KEY], **own_entries}}
