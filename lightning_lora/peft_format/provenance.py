"""The header of an adapter's file: the base it was trained on, its configuration, and a digest of its values."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig
from lightning_lora.distributed.sharded import is_sharded, shape_of
from lightning_lora.files.json_files import parse_object, shown
from lightning_lora.layers.base import parameter_of
from lightning_lora.model.fingerprint import (
    Fingerprint,
    fingerprint,
    inexact,
    is_fingerprint,
    other_base,
    shape_alone,
)
from lightning_lora.model.merge import unmerge_lora
from lightning_lora.model.record import Merged, merged_layers, packed_layers
from lightning_lora.peft_format.config import difference
from lightning_lora.version import __version__

OWN = "lightning_lora"
BASE, DIGEST, INNER = f"{OWN}.base", f"{OWN}.digest", f"{OWN}.inner"
VERSION, STRENGTH = f"{OWN}.version", f"{OWN}.strength"
ADAPTER_CONFIG = f"{OWN}.adapter_config"  # what the file of that name held when the weights were written


def header(
    config: LoRAConfig,
    base: Fingerprint,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    inner: str,
    strength: float = 1.0,
) -> dict[str, str]:
    """The strings of the header.

    Args:
        config: the configuration of the adapter.
        base: the fingerprint of its base, by names relative to ``inner``.
        tensors: the tensors of the file.
        metadata: strings of the user.
        inner: name of the part of the model that the file's names are relative to.
        strength: with which the adapter acts where no choice is made; 0 if it rests.

    Raises:
        TypeError: if ``metadata`` is no mapping of strings.
        ValueError: if it has a key of ours.
    """
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"`metadata` must be a dict of strings, but got {metadata!r}.")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"`metadata` must be a dict of strings, but got {key!r}: {value!r}. Write str(...).")
        if key == "format" or key.startswith(OWN):
            raise ValueError(f"`metadata` has {key!r}, which the file itself uses: take another key.")
    ours = {
        VERSION: __version__,
        f"{OWN}.config": json.dumps(config.to_dict()),
        INNER: inner,
        BASE: json.dumps(base),
        DIGEST: digest(tensors),
        **({} if strength == 1 else {STRENGTH: repr(strength)}),
    }
    return {"format": "pt", **ours, **(metadata or {})}


def strength_in(metadata: Mapping[str, str]) -> float:
    """The strength with which an adapter acted when it was written.

    Raises:
        ValueError: if the header is damaged.
    """
    text = metadata.get(STRENGTH, "1.0")
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ValueError(f"The header of the adapter's file is damaged: its strength is {shown(text)}.")
    return strength


def check_config(metadata: Mapping[str, str], values: Mapping[str, Any], path: Path) -> None:
    """Compare the values of ``adapter_config.json`` with those in the header of the weights, if it has them.

    The two are separate files, so a reader may meet a new one and an old one. What has no effect on the outputs, as the
    base's name or the task, may have changed.

    Raises:
        ValueError: naming the first key that differs.
    """
    if ADAPTER_CONFIG not in metadata:
        return
    try:
        written = parse_object(metadata[ADAPTER_CONFIG].encode())
    except ValueError as error:
        raise ValueError(f"The header of `{path}` is damaged: its configuration is no JSON ({error}).") from error
    change = difference(values, written)
    if change is not None:
        raise ValueError(
            f"`{path}`: `adapter_config.json` does not belong to the weights, {change} when they were written. Was the "
            "write interrupted, or is it still going on? Copy or save both files again."
        )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the names, the types and every bit of ``tensors``."""
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        hasher.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def check_digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Compare ``tensors`` with the digest in the header, if there is one.

    Raises:
        ValueError: if a bit of them changed.
    """
    if DIGEST in metadata and metadata[DIGEST] != digest(tensors):
        raise ValueError("The adapter's file is damaged: its values are not those it was written with. Copy it again.")


def base_of(model: nn.Module) -> Fingerprint:
    """The fingerprint of the base, also where adapters are merged into it."""
    sums = fingerprint(model)
    merged = list(merged_layers(model))
    for name, _, packed in packed_layers(model):  # the values of the plain weight that took its place are no base's
        sums[names.join(name, "weight")] = shape_alone(packed.parameters["weight"])
    for name, layer, record in merged:
        sums |= {names.join(name, key): value for key, value in _unmerged(layer, record).items()}
    return {name: sums[name] for name in _first_names(model) if name in sums} if merged else sums


def _unmerged(layer: nn.Module, record: Merged) -> Fingerprint:
    if any(is_sharded(parameter_of(layer, key)) for key in record.weights):  # these cannot be copied
        return {key: [None, None, None, *shape_of(parameter_of(layer, key))] for key in record.weights}
    plain = copy.deepcopy(layer)
    unmerge_lora(plain)
    return {key: value for key, value in fingerprint(plain).items() if key in record.weights}


def _first_names(model: nn.Module) -> list[str]:
    """The first name of every parameter; a tied one that the merge separated counts once."""
    weights = {id(layer): merged.weights for _, layer, merged in merged_layers(model)}
    first: dict[int, str] = {}
    for name, module in names.named_modules(model):
        for key, parameter in module._parameters.items():
            weight = weights.get(id(module), {}).get(key)
            tied = parameter if weight is None or weight.shared is None else weight.shared
            first.setdefault(id(tied), names.join(name, key))
    return list(first.values())


def check_base(metadata: Mapping[str, str], own: Callable[[], Fingerprint], trained: set[str], strict: bool) -> None:
    """Compare a model with the fingerprint in the header, if there is one.

    Args:
        metadata: the header.
        own: gives the fingerprint of the model.
        trained: names that may be missing in the header's.
        strict: whether another base is an error.

    Raises:
        ValueError: if the bases differ, or the header is damaged.
    """
    if BASE not in metadata:
        return
    expected = base_in(metadata)
    present = {name: sums for name, sums in own().items() if name in expected or name not in trained}
    wrong = other_base(expected, present)
    if wrong is not None and strict:
        raise ValueError(
            f"The adapter was trained on another base: {wrong}. Load that base first; "
            "load_adapter(model, directory, strict_base=False) loads the adapter all the same."
        )
    if wrong is not None:
        warnings.warn(f"The adapter was trained on another base: {wrong}.", stacklevel=5)
        return
    warning = inexact(expected, present, "the adapter")
    if warning is not None:
        warnings.warn(warning, stacklevel=5)


def base_in(metadata: Mapping[str, str]) -> Fingerprint:
    """The fingerprint in a header that has one.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        base = parse_object(metadata[BASE].encode())
    except ValueError as error:
        raise ValueError(f"The header of the adapter's file is damaged: its base is no JSON ({error}).") from error
    if not is_fingerprint(base):
        raise ValueError(f"The header of the adapter's file is damaged: its base is {shown(base)}.")
    return base
