"""Whether a base in files has the values that an adapter was trained on.

The fingerprint of a quantized base has no values of the quantized weights, which a merge adds to: there only names
and shapes are compared. The values of the other parameters, such as embeddings and norms, are compared. So that such an
adapter is not merged twice, the header of the merged file holds its digest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lightning_lora.cli.base_match import Changes, StoredTarget
from lightning_lora.files.safetensors import StoredTensor, TensorFile
from lightning_lora.files.weights import Weights
from lightning_lora.model.fingerprint import Fingerprint, other_base, sums_of
from lightning_lora.peft_format.provenance import BASE, DIGEST, OWN, base_in
from lightning_lora.peft_format.stored import StoredAdapter

MERGED = f"{OWN}.merged"  # the digests of the adapters in a merged file


def with_digests(files: Iterable[TensorFile], adapters: Iterable[StoredAdapter]) -> list[TensorFile]:
    """``files``, with the digests of those ``adapters`` in their headers that were trained on a quantized base."""
    digests = [
        adapter.file.metadata[DIGEST]
        for adapter in adapters
        if {BASE, DIGEST} <= adapter.file.metadata.keys()
        and any(entry[2] is None for entry in base_in(adapter.file.metadata).values())
    ]
    return [_with_digests(file, digests) if digests else file for file in files]


def _with_digests(file: TensorFile, digests: list[str]) -> TensorFile:
    every = dict.fromkeys((*file.metadata.get(MERGED, "").split(), *digests))
    return replace(file, metadata={**file.metadata, MERGED: " ".join(every)})


def check_base(adapter: StoredAdapter, change: Changes, base: Weights) -> list[str]:
    """Compare the weights that ``change`` adds to with the fingerprint of the base that ``adapter`` was trained on.

    Args:
        adapter: its header may have a fingerprint, by the adapter's names.
        change: the updates of the adapter, with the weights of ``base`` that each is added to.
        base: the tensors of the model.

    Returns:
        The names of the weights that were quantized, so that the fingerprint has no values of them.

    Raises:
        ValueError: naming the first parameter that has other values, or another shape; or if ``base`` was merged with
            this adapter.
    """
    if BASE not in adapter.file.metadata:
        return []
    if any(adapter.file.metadata.get(DIGEST) in file.metadata.get(MERGED, "").split() for file in base.files):
        raise ValueError(
            f"`{base.path}` was merged with the adapter at `{adapter.path}` before, and would have its update twice. "
            "Give the base without it."
        )
    trained_on, quantized = base_in(adapter.file.metadata), []
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
