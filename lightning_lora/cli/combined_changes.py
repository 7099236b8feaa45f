"""What several adapters together change in a base in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning_lora.cli.base_match import Changes, StoredTarget
from lightning_lora.files.json_files import shown
from lightning_lora.files.safetensors import StoredTensor
from lightning_lora.ops.exact_sum import same_bits


@dataclass
class CombinedChanges:
    """The changes of all adapters, by the names of the base's tensors.

    Args:
        pairs: for each tensor the updates that are added to it, in the order of the adapters.
        in_full: the tensors that are replaced, or are new.
        places: the adapter that each of ``in_full`` comes from.
    """

    pairs: dict[str, list[StoredTarget]] = field(default_factory=dict)
    in_full: dict[str, StoredTensor] = field(default_factory=dict)
    places: dict[str, Path] = field(default_factory=dict)


def combined(changes: Mapping[Path, Changes], factors: Mapping[Path, float]) -> CombinedChanges:
    """The sum of ``changes``, each times its factor; one whose factor is 0 changes nothing.

    Raises:
        ValueError: naming a tensor that two adapters have in full, with different values.
    """
    total = CombinedChanges()
    for path, change in changes.items():
        if factors[path]:
            _add(total, path, change, factors[path])
    for name in total.pairs.keys() & total.in_full.keys():
        raise _refused(name, total.places[name], "and another adapter has a pair for it")
    return total


def _add(total: CombinedChanges, path: Path, change: Changes, factor: float) -> None:
    for name, tensor in change.in_full.items():
        present = total.in_full.setdefault(name, tensor)
        if present is not tensor and not _is_same(present, tensor):
            raise _refused(name, total.places[name], f"with other values than in `{path}`")
        total.places.setdefault(name, path)
    for name, target in change.pairs.items():
        others = total.pairs.setdefault(name, [])
        if others and others[0].start is not target.start and not _is_same(others[0].start, target.start):
            raise _refused(name, path, "and another adapter was trained on other values of it")
        others.append(replace(target, factor=factor))


def _is_same(first: StoredTensor, second: StoredTensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and same_bits(first.read(), second.read())


def _refused(name: str, path: Path, why: str) -> ValueError:
    return ValueError(
        f"{shown(name)} is in `{path}` in full, {why}, and the merged model has one. Merge adapters that do not train "
        "it, or one of these."
    )
