"""Frozen parameters that code of the user's writes during a run, as the update of a momentum teacher does.

They belong to no optimizer of the run and ask for no gradient, but without their values a resumed run would differ. So
files hold them, as they hold buffers that changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.model.merge_layer import value_before_merge
from lightning_lora.model.record import merged_layers, record_of, records


def written_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The frozen parameters that other code writes, under first clean names, in the model's order."""
    written = {id(module._parameters.get(key)) for _, module, record in records(model) for key in record.written}
    if written:
        yield from ((name, p) for name, p in names.named_parameters(model) if id(p) in written)


def set_written(model: nn.Module, parameters: Collection[str]) -> bool:
    """Let exactly these ``parameters`` be written by other code; names that ``model`` does not have are ignored.

    Returns:
        Whether any other parameters were before.
    """
    before = {name for name, _ in written_parameters(model)}
    if before == set(parameters):
        return False
    chosen = {id(parameter) for name, parameter in names.named_parameters(model) if name in parameters}
    for _, _, record in records(model):
        record.written.clear()
    for _, module in names.named_modules(model):
        keys = {key for key, parameter in module._parameters.items() if id(parameter) in chosen}
        if keys:
            record_of(module).written |= keys
    return True


def written_before_merge(model: nn.Module) -> dict[str, Tensor]:
    """The values before the merge of weights that other code writes and that are adapted, under first clean names.

    A file holds them in addition to the adapters, so the sum would be one update too many.
    """
    written, values = {id(p) for _, p in written_parameters(model)}, {}
    for name, module, merged in merged_layers(model) if written else ():
        for key in merged.weights:
            value = value_before_merge(module, merged, key) if id(module._parameters.get(key)) in written else None
            if value is not None:
                values[names.join(name, key)] = value
    return values


def renormalized(model: nn.Module) -> set[int]:
    """The ``id`` of each weight that its own forward pass scales down in place: those of embeddings with ``max_norm``.

    A row is scaled before it is used. So the weights before and after are the same base, and no file needs them.
    """
    weights = (m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm)
    return set(map(id, weights))
