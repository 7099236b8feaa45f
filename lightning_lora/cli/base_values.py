"""Whether a base in files has the values that an adapter was trained on.

The fingerprint of a quantized base has no values of the quantized weights, which a merge adds to: there only names
and shapes are compared. The values of the other parameters, such as embeddings and norms, are compared.
"""

from __future__ import annotations

from lightning_lora.cli.base_match import Changes, StoredTarget
from lightning_lora.files.safetensors import StoredTensor
from lightning_lora.files.weights import Weights
from lightning_lora.model.fingerprint import Fingerprint, other_base, sums_of


def check_base(trained_on: Fingerprint, change: Changes, base: Weights) -> list[str]:
    """Compare the weights that ``change`` adds to with the fingerprint of the base that an adapter was trained on.

    Args:
        trained_on: the fingerprint, by the adapter's names.
        change: the updates of the adapter, with the weights of ``base`` that each is added to.
        base: the tensors of the model.

    Returns:
        The names of the weights that were quantized, so that the fingerprint has no values of them.

    Raises:
        ValueError: naming the first parameter that has other values, or another shape.
    """
    quantized = []
    for there, target in change.pairs.items():
        name = f"{target.pair.name}.{target.start.name.rpartition('.')[2]}"
        if name in trained_on:
            _compare(trained_on, name, target.start)
            quantized += [there] if trained_on[name][2] is None else []
    if quantized:
        prefix, missing = _prefixes(change.pairs[quantized[0]])
        for name, entry in trained_on.items():
            there = prefix + name.removeprefix(missing)
            if entry[2] is not None and there in base.tensors:
                _compare(trained_on, name, base.tensors[there])
    return quantized


def _compare(trained_on: Fingerprint, name: str, present: StoredTensor) -> None:
    wrong = other_base({name: trained_on[name]}, {name: sums_of(present.read())})
    if wrong:
        raise ValueError(f"The adapter was trained on another base: {wrong}. Give the base it was trained on.")


def _prefixes(target: StoredTarget) -> tuple[str, str]:
    """What the names of the base have in front of the adapter's, and what they lack; one of the two is empty."""
    here, there = target.pair.name, target.start.name.rpartition(".")[0]
    if there.endswith(here):
        return there.removesuffix(here), ""
    return "", here.removesuffix(there)
