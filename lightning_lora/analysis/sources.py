"""A and B of each layer from wherever they are: a model, a directory in PEFT's format, or a state dict."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from lightning_lora.analysis.updates import chosen_name, updates_of
from lightning_lora.ops.low_rank import DeltaFactors
from lightning_lora.peft_format.stored import open_adapter

Source: TypeAlias = "nn.Module | str | Path | Mapping[str, Tensor]"
SHOWN = 3  # layers of each side in an error
_KEY = re.compile(r"(?:(?P<layer>.*)\.)?lora\.(?P<name>[^.]+)\.(?:(?P<part>.+)\.)?(?P<matrix>[AB])")


def factors_of(source: nn.Module | str | Path, name: str | None = None) -> dict[str, DeltaFactors]:
    """``scale * B`` and A of each layer, in fp64.

    Args:
        source: a module with adapters, live or merged; or a directory in PEFT's format, or its safetensors file.
        name: of the adapter in a module; ``None`` is the only one.

    Raises:
        ValueError: if there are no such adapters, or a file is damaged.
        FileNotFoundError: if there is nothing at the path.
        TypeError: if ``source`` is something else.
    """
    if isinstance(source, nn.Module):
        return {update.name: update.factors() for update in updates_of(source, name)}
    if isinstance(source, (str, Path)):
        return _stored(Path(source))
    more = " A state dict has no scale: load it into the model first." if isinstance(source, Mapping) else ""
    raise TypeError(f"Expected a module or the path of a PEFT directory, but got a {type(source).__name__}.{more}")


def matrices_of(source: Source, name: str | None = None) -> dict[str, DeltaFactors]:
    """B and A of each layer up to a factor, in fp64, as :func:`factors_of`; also of a state dict."""
    return _in_state_dict(source, name) if isinstance(source, Mapping) else factors_of(source, name)


def _stored(path: Path) -> dict[str, DeltaFactors]:
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(
            f"`{path}` is no PEFT directory. Load a checkpoint of a run by load_from_checkpoint(cls, path), and give "
            "the module."
        )
    return {name: pair.read() for name, pair in open_adapter(path).pairs.items()}


def _in_state_dict(state: Mapping[str, Tensor], name: str | None) -> dict[str, DeltaFactors]:
    matches = [match for match in map(_KEY.fullmatch, state) if match is not None]
    chosen = chosen_name({match["name"] for match in matches}, name, "The state dict")
    layers: dict[str, dict[str, Tensor]] = {}
    for match in (match for match in matches if match["name"] == chosen):
        layer = ".".join(part for part in (match["layer"], match["part"]) if part)
        layers.setdefault(layer, {})[match["matrix"]] = state[match[0]].detach().double()
    for layer, both in layers.items():
        if both.keys() != {"A", "B"}:
            raise ValueError(f"The state dict has only {', '.join(both)} of `{layer}`, and a pair is A and B.")
    return {layer: (both["B"], both["A"]) for layer, both in layers.items()}


def same_layers(first: Iterable[str], second: Iterable[str]) -> list[tuple[str, str]]:
    """The names of each layer that both sides have.

    Names in a directory are relative to the module that peft wraps, so those of one side may lack a common head.

    Raises:
        ValueError: if no layer is on both sides.
    """
    ours, theirs = list(first), dict.fromkeys(second)
    both = [(name, name) for name in ours if name in theirs]
    heads = Counter((side, head) for head, side in _heads(ours, theirs))
    if not both and heads:
        side, head = heads.most_common(1)[0][0]
        both = [
            (name, other)
            for name in ours
            for other in [name.removeprefix(head) if side == "first" else head + name]
            if other in theirs and (side == "second" or name.startswith(head))
        ]
    if not both:
        raise ValueError(
            f"No layer is adapted on both sides. The first has {_some(ours)}; the second has {_some(theirs)}. An "
            "nn.MultiheadAttention has other pairs in a PEFT directory: load that into a model, and give the model."
        )
    return both


def _heads(ours: Iterable[str], theirs: Iterable[str]) -> list[tuple[str, str]]:
    """What one side may have in front of the names of the other, and which side that is."""
    pairs = [(name, other) for name in ours for other in theirs]
    longer = [(name[: -len(other)], "first") for name, other in pairs if name.endswith(f".{other}")]
    return longer + [(other[: -len(name)], "second") for name, other in pairs if other.endswith(f".{name}")]


def _some(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in list(names)[:SHOWN])
