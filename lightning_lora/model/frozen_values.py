"""Whether frozen parameters have changed, without a copy of them.

Each parameter has a cheap mark: its version, which operations in place increase, its address and a few of its values.
Where the mark differs, and for all parameters in the first steps of a run, the checksum of the whole tensor decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import is_partitioned, is_sharded, is_split, local_shard
from lightning_lora.model.fingerprint import Fingerprint, has_values
from lightning_lora.ops.exact_sum import as_integers

SAMPLE = 16  # values of a parameter that its mark holds


class FrozenValues:
    """The marks of parameters at one moment.

    Args:
        parameters: the frozen parameters by name. On each rank, its own shards of those that FSDP2 shards; nothing is
            known of the values of those that FSDP1 shards.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.places = {name: _place(parameter) for name, parameter in self.parameters.items()}
        self.samples, self.sizes = samples(self.parameters.values())

    def changed(self, base: Fingerprint) -> list[str]:
        """The parameters whose values are others than at that moment; ``base`` decides where a mark is not enough."""
        now, sizes = samples(self.parameters.values())
        if sizes != self.sizes:  # a parameter was replaced by one of another size
            return [name for name in self.parameters if not self._has_values(name, base)]
        differs = [bool(part.any()) for part in torch.split(now != self.samples, sizes)]
        return [
            name
            for name, other in zip(self.parameters, differs, strict=True)
            if other or self._moved_unseen(name, base)
        ]

    def _moved_unseen(self, name: str, base: Fingerprint) -> bool:
        """Whether a parameter was written, by its version and address, and not only with the same values."""
        place = _place(self.parameters[name])
        if place == self.places[name]:
            return False
        if not self._has_values(name, base):
            return True
        self.places[name] = place
        return False

    def changed_exactly(self, base: Fingerprint) -> list[str]:
        """As :meth:`changed`, by every value. Of what is sharded by its mark alone: a checksum would gather it."""
        marked = set(self.changed(base))
        return [name for name in self.parameters if name in marked or not self._has_values(name, base)]

    def _has_values(self, name: str, base: Fingerprint) -> bool:
        parameter = self.parameters[name]
        return is_in_pieces(parameter) or name not in base or has_values(parameter, base[name])


def is_in_pieces(parameter: Tensor) -> bool:
    """Whether this rank holds only a part of ``parameter``."""
    return is_sharded(parameter) or is_split(parameter) or is_partitioned(parameter)


def samples(parameters: Iterable[Tensor]) -> tuple[Tensor, list[int]]:
    """A few values of each parameter as integers, all in one tensor on the CPU, and how many there are of each."""
    pieces = [_sample(parameter) for parameter in parameters]
    if not pieces:
        return torch.empty(0, dtype=torch.int64), []
    device = pieces[0].device
    return torch.cat([piece.to(device) for piece in pieces]).cpu(), [piece.numel() for piece in pieces]


def _sample(parameter: Tensor) -> Tensor:
    """Values that are spread evenly over the memory of ``parameter``; none of what FSDP1 moves between buffers."""
    if is_split(parameter):
        return torch.empty(0, dtype=torch.int64)
    tensor = local_shard(parameter)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((max(0, min(span, tensor.numel())),), (1,))  # a view, also of a transposed matrix
    return as_integers(flat[:: max(1, flat.numel() // SAMPLE)]).to(torch.int64)


def _place(parameter: Tensor) -> tuple[int, int]:
    """The version and the address of ``parameter``; those of a sharded one change when it is gathered."""
    if is_in_pieces(parameter):
        return 0, 0
    return 0 if parameter.is_inference() else parameter._version, parameter.data_ptr()
