"""Twins: layers that are bit-identical copies of one layer start with the same A, so a teacher starts as its student.

Elsewhere A is seeded by the layer's own name. Twins share the name of one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from lightning_lora.distributed.sharded import is_partitioned, is_sharded, is_split, shape_of
from lightning_lora.layers.adapted import has_added
from lightning_lora.layers.base import parameter_of
from lightning_lora.names import clean
from lightning_lora.ops.exact_sum import as_integers, same_bits
from lightning_lora.ops.packed.quantized_tensors import stored_tensors
from lightning_lora.targets.survey import Site, Survey, memory_of

Agree = Callable[[dict[str, str]], dict[str, str]]
SAMPLE = 8  # values of a weight that are compared before all of it is


def own_answer(answer: dict[str, str]) -> dict[str, str]:
    """The answer of this process, where there is no other one to agree with."""
    return answer


def seed_names(survey: Survey, sites: Sequence[Site], agree: Agree = own_answer) -> dict[str, str]:
    """For each layer that is a twin of another one: the name of the layer whose seed it shares.

    Layers whose names differ in numbers alone, as the clones in ``nn.TransformerEncoder``, are no twins though they
    start equal. Nor are layers that hold one value everywhere, or the same memory.

    Args:
        survey: of the model.
        sites: what is to be adapted, or is adapted already.
        agree: gives the answer of rank 0 on every rank: before the strategy's broadcast only that may have the weights.
    """
    groups: dict[str, list[Site]] = {}
    visible = [site for site in sites if not any(map(_is_hidden, _weights(site)))]
    if len(visible) < len(sites):
        _warn_of_hidden_twins(survey, sites)
    for site in sorted(visible, key=lambda site: not has_added(site.module)):  # what has an A already gives its name
        sample = _sample(site)
        if sample is not None:
            groups.setdefault(sample, []).append(site)
    return agree({name: first for group in groups.values() for name, first in _twins(group)})


def _weights(site: Site) -> list[nn.Parameter]:
    return [parameter_of(site.module, key) for key in dict.fromkeys(part.key for part in site.parts)]


def _is_hidden(weight: Tensor) -> bool:
    return weight.is_meta or is_sharded(weight) or is_partitioned(weight) or is_split(weight)


def _sample(site: Site) -> str | None:
    """Some values of the weights, equal for twins; ``None`` where they are all the same."""
    raw = []
    for stored in (stored for weight in _weights(site) for stored in stored_tensors(weight)):
        flat = as_integers(stored.reshape(-1))
        raw.append(flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].tolist())
    if all(value == values[0] for values in raw for value in values):
        return None
    return repr((*((part.key, part.name) for part in site.parts), raw))


def _twins(group: list[Site]) -> Iterator[tuple[str, str]]:
    """Each site of the ``group`` that is a twin of an earlier one, with the name of that."""
    firsts: list[Site] = []
    for site in group:
        first = next((first for first in firsts if _are_twins(first, site)), None)
        if first is None:
            firsts.append(site)
        else:
            yield site.name, first.name


def _are_twins(first: Site, second: Site) -> bool:
    if not _names_differ_in_words(first.name, second.name):
        return False
    if any(memory_of(first.module, part.key) == memory_of(second.module, part.key) for part in first.parts):
        return False
    return all(same_bits(a, b) for a, b in zip(_weights(first), _weights(second), strict=True))


def _names_differ_in_words(first: str, second: str) -> bool:
    """Whether two names differ, and in more than numbers: ``net.0`` and ``ref.0``, but not ``0.q`` and ``1.q``."""
    words, numbers = (
        [[part for part in name.split(".") if part.isdigit() is number] for name in (first, second)]
        for number in (False, True)
    )
    shorter, longer = sorted(numbers, key=len)
    return words[0] != words[1] and longer[len(longer) - len(shorter) :] == shorter


def _warn_of_hidden_twins(survey: Survey, sites: Sequence[Site]) -> None:
    """Warn where two networks are alike and may be copies, but hold no values that could be compared."""
    inside: dict[object, list[str]] = {}
    for name, child in survey.model.named_children():
        of_child = {
            site.name.removeprefix(f"{clean(name)}."): tuple(map(shape_of, _weights(site)))
            for site in sites
            if site.name.startswith(f"{clean(name)}.")
        }
        if len(of_child) > 1 and not name.isdigit():
            inside.setdefault((type(child).__name__, tuple(of_child.items())), []).append(name)
    alike = [f"`{name}`" for names in inside.values() if len(names) > 1 for name in names]
    if alike:
        warnings.warn(
            f"{', '.join(alike)} have the same layers, whose values are not here yet or are sharded, so nobody can see "
            "whether one is a copy of another: each gets an A of its own. If one follows another (a teacher, a target "
            "network), copy the adapters too, or leave it out with `exclude`.",
            stacklevel=4,
        )
