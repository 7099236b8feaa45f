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
from lightning_lora.ops.packed.quantized_tensors import stored_tensors

SAMPLE = 16  # values of a parameter that its mark holds


class FrozenValues:
    """The marks of parameters at one moment.

    Args:
        parameters: the frozen parameters by name. Of those that are sharded, each rank sees its own part.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.places = {name: _place(parameter) for name, parameter in self.parameters.items()}
        self.samples = Samples(self.parameters.values())

    def changed(self, base: Fingerprint) -> list[str]:
        """The parameters whose values are others than at that moment; ``base`` decides where a mark is not enough."""
        differing = self.samples.differing(Samples(self.parameters.values()))
        if differing is None:  # a parameter was replaced by one of another size or dtype, or is gathered now
            return [name for name in self.parameters if not self._has_values(name, base)]
        return [
            name for index, name in enumerate(self.parameters) if index in differing or self._moved_unseen(name, base)
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
        """As :meth:`changed`, by every value; what is sharded by a few values alone, as a checksum would gather it."""
        marked = set(self.changed(base))
        return [name for name in self.parameters if name in marked or not self._has_values(name, base)]

    def _has_values(self, name: str, base: Fingerprint) -> bool:
        parameter = self.parameters[name]
        return is_in_pieces(parameter) or name not in base or has_values(parameter, base[name])


def is_in_pieces(parameter: Tensor) -> bool:
    """Whether this rank holds only a part of ``parameter``."""
    return is_sharded(parameter) or is_split(parameter) or is_partitioned(parameter)


class Samples:
    """A few values of each parameter, in one tensor on the CPU for each device and dtype.

    A model has thousands of parameters, and a GPU waits at each copy to the CPU. So as few operations as possible are
    done for each of them, and one copy for all.

    Between two steps a parameter of FSDP1 is a view of its rank's part of the flat one, empty where that is elsewhere.

    Args:
        parameters: any parameters.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
        for index, parameter in enumerate(parameters):
            sample = _sample(stored_tensors(local_shard(parameter))[0])
            groups.setdefault((sample.device, sample.dtype), []).append((index, sample))
        self.values = [as_integers(torch.cat([sample for _, sample in group])).cpu() for group in groups.values()]
        self.layout = [
            (dtype, [(index, sample.numel()) for index, sample in group]) for (_, dtype), group in groups.items()
        ]

    def differing(self, other: Samples) -> set[int] | None:
        """The places of the parameters with other values; ``None`` where their sizes or dtypes are others."""
        if self.layout != other.layout:
            return None
        places: set[int] = set()
        for (_, sizes), mine, others in zip(self.layout, self.values, other.values, strict=True):
            if not torch.equal(mine, others):
                parts = torch.split(mine != others, [size for _, size in sizes])
                places |= {index for (index, _), part in zip(sizes, parts, strict=True) if bool(part.any())}
        return places


def _sample(tensor: Tensor) -> Tensor:
    """A view of values that are spread evenly over the memory of ``tensor``."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = max(0, min(count, tensor.numel()))
    step = max(1, count // SAMPLE)
    return tensor.as_strided((-(-count // step),), (step,))  # also of a transposed matrix


def _place(parameter: Tensor) -> tuple[int, int]:
    """The version and the address of ``parameter``; those of a sharded one change when it is gathered."""
    if is_in_pieces(parameter):
        return 0, 0
    return 0 if parameter.is_inference() else parameter._version, stored_tensors(parameter)[0].data_ptr()
