"""Which adapters act in a forward pass, and how strongly: the coefficients c of ``W0 x + B (c * (A x))``.

Without a choice every adapter acts with the strength that it has by default, which is 1. A choice holds for one thread.
Under activation checkpointing a layer is called a second time, in the backward pass, where another choice may hold: it
then takes the choice of the first call, which is noted on the checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lightning_lora.names import clean
from lightning_lora.ops.mixture import Mixture
from lightning_lora.torch_internals import backward_id, running_checkpoints, saved_tensors_have_hooks

Weights = Mapping[str, float]
CAPACITY = 1024  # samples in a table of coefficients; compiled code is traced again for a larger batch
_NOTES = "_lightning_lora_choices"
_DEFAULTS: WeakValueDictionary[object, Tensor] = WeakValueDictionary()  # one table for all layers, for a compiler


class Held:
    """What holds inside of a ``with`` block, and where the block began.

    Attributes:
        backward: the number of the backward pass in which it began, -1 outside of one.
        within: the ``id`` of each activation checkpoint whose first forward ran then.
    """

    def __init__(self) -> None:
        self.backward = backward_id()
        self.within = set(map(id, running_checkpoints()[0])) if may_be_checkpointed() else set()


def may_be_checkpointed() -> bool:
    """Whether an activation checkpoint may run now: a reentrant one switches gradients off, another one has hooks."""
    return saved_tensors_have_hooks() or not (torch.is_grad_enabled() or torch.is_inference_mode_enabled())


class Choice(Held):
    """Adapters by name with their coefficients, for the whole batch or for each of its samples.

    Args:
        samples: the coefficients of each sample's adapters by name; a single entry is that of every sample.
        size: how many samples the batch must have; ``None`` for any number.
        present: names that take part in the graph also where no sample uses them: with a coefficient of 0 they get a
            gradient of zeros, which processes that average gradients need.
        layers: the names of the layers in the model, for messages, by the ``id`` of their adapters.
        is_ambiguous: whether the model has modules whose first dimension is not the batch.
        linear_layers: the adapters of each linear layer, in their order in the model.

    Attributes:
        is_uniform: whether every sample has the same coefficients.
        names: of the adapters that take part.
        full: their names, if they act fully and on a batch of any size, as without a choice; otherwise empty.
        blocks: shapes of the inputs of the blocks around experts, by the ``id`` of the experts' adapters.
    """

    def __init__(
        self,
        samples: Sequence[Weights],
        size: int | None = None,
        present: frozenset[str] = frozenset(),
        layers: Mapping[int, str] | None = None,
        is_ambiguous: bool = False,
        linear_layers: Sequence[Any] = (),
    ) -> None:
        super().__init__()
        used = frozenset(name for sample in samples for name, weight in sample.items() if weight)
        first = samples[0]
        self.is_uniform = all(sample == first for sample in samples)
        self.samples = [first] if self.is_uniform else list(samples)
        self.size, self.layers, self.is_ambiguous = size, layers or {}, is_ambiguous
        self.names = used | present
        is_full = size is None and self.names == used and set(first.values()) <= {1.0}
        self.full = self.names if is_full else frozenset()
        self._made: dict[object, Tensor] = {}
        self._mixtures: dict[object, Mixture] = {}
        self.blocks: dict[int, set[torch.Size]] = {}
        self.linear_layers = linear_layers

    def weight_of(self, name: str) -> float:
        """The coefficient of the adapter ``name``, where that of every sample is the same."""
        return self.samples[0].get(name, 0.0)

    def mixture(self, names: tuple[str, ...], device: torch.device) -> Mixture:
        """The coefficients of ``names`` for each sample, as products read them."""
        key = names, device
        if key not in self._mixtures:
            samples = [[sample.get(name, 0.0) for name in names] for sample in self.samples]
            self._mixtures[key] = Mixture(samples, device)
        return self._mixtures[key]

    def groups(self, names: tuple[str, ...]) -> dict[tuple[tuple[str, float], ...], list[int]]:
        """The samples that have the same coefficients of ``names``, by these."""
        groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
        for index, sample in enumerate(self.samples):
            groups.setdefault(tuple((name, sample[name]) for name in names if sample.get(name)), []).append(index)
        return groups

    def table(self, names: tuple[str, ...], device: torch.device) -> Tensor:
        """The coefficients of ``names`` as one tensor of fixed size, which compiled code takes as an input.

        Returns:
            ``(capacity, len(names) + 1)`` in fp32. The last column is the size of the batch, -1 for any.
        """
        key = names, device
        if key not in self._made:
            size = -1 if self.size is None else self.size
            with torch.inference_mode(False):  # a later forward may need gradients
                rows = torch.tensor([[*(sample.get(name, 0.0) for name in names), size] for sample in self.samples])
                rest = rows[-1:].expand(max(CAPACITY, len(rows)) - len(rows), -1)
                self._made[key] = torch.cat([rows, rest]).float().to(device, non_blocking=True)
        return self._made[key]

    def check_batch(self, x: Tensor, size: int, dim: int, adapters: object) -> None:
        """Raise if dimension ``dim`` of the input ``x`` of a layer, of this ``size``, is not the batch.

        Raises:
            ValueError: naming the layer that has these ``adapters``.
        """
        if self.size is None:
            return
        if size != self.size:
            raise ValueError(
                f"The adapters are chosen by {self.size} entries (`use_adapters` or `route`), one for each row, but "
                f"`{self.name_of(adapters)}` gets an input of shape {tuple(x.shape)}, whose dimension {dim} is no "
                f"batch of {self.size}. Give one entry for each row of the layer's input. Layers that get different "
                "numbers of rows, as the encoder and the decoder under beam search, and layers whose first dimension "
                "is not the batch (batch_first=False, windows, flattened tokens) cannot choose by row: choose one "
                "adapter for the whole batch, or leave them out with `exclude`."
            )
        if self.is_ambiguous and not self.is_uniform and dim == 0 and x.dim() > 2 and x.shape[1] == size:
            raise ValueError(
                f"`{self.name_of(adapters)}` gets an input of shape {tuple(x.shape)}, and the model has modules with "
                "batch_first=False, so either dimension may be the batch. Use batch_first=True, or choose one adapter "
                "for the whole batch."
            )

    def check_uniform(self, adapters: object) -> None:
        """Raise if the samples of a batch use different adapters, in a layer that acts by its weight alone.

        Raises:
            ValueError: naming the layer that has these ``adapters``.
        """
        if not self.is_uniform:
            raise ValueError(
                f"`{self.name_of(adapters)}` computes with its weight, which is one for the whole batch, so its "
                "samples cannot use different adapters. Leave it out with `exclude`, or choose one adapter for the "
                "whole batch."
            )

    def name_of(self, adapters: object) -> str:
        """The name of the layer that has these ``adapters``."""
        return clean(self.layers.get(id(adapters), "a layer"))


class _Defaults:
    """What acts in one layer without a choice."""

    def __init__(self, choice: Choice | None, table: Tensor | None) -> None:
        self.choice, self.table = choice, table


class _Thread(threading.local):
    """What one thread chose in one layer; its table is never absent where a compiler reads it, so one graph serves."""

    def __init__(self, defaults: _Defaults) -> None:
        self.choices: list[Choice] = []  # of the blocks that it is in; generators may leave them in any order
        self.only: Choice | None = None
        self.table = defaults.table


class Acting:
    """What acts in one layer, in each thread.

    Args:
        default: what acts without a choice; ``None`` for every adapter with a coefficient of 1.
        table: its coefficients for compiled code.
    """

    def __init__(self, default: Choice | None = None, table: Tensor | None = None) -> None:
        self._defaults = _Defaults(default, table)
        self._thread = _Thread(self._defaults)

    @property
    def default(self) -> Choice | None:
        """What acts without a choice; ``None`` for every adapter with a coefficient of 1."""
        return self._defaults.choice

    @property
    def choice(self) -> Choice | None:
        """Of this thread; ``None`` without one."""
        choices = self._thread.choices
        return choices[-1] if choices else None

    @property
    def table(self) -> Tensor | None:
        """The coefficients for compiled code."""
        return self._thread.table

    def set_default(self, default: Choice | None, table: Tensor | None) -> None:
        """Change what acts without a choice; what threads have chosen still holds."""
        self._defaults.choice, self._defaults.table = default, table

    def begin(self, choice: Choice) -> None:
        """Let ``choice`` hold in this thread."""
        self._thread.choices.append(choice)

    def end(self, choice: Choice) -> None:
        """Let ``choice`` hold no longer, and the one that began before it, or after it, hold again."""
        self._thread.choices = [each for each in self._thread.choices if each is not choice]

    def make_table(self, names: Iterable[str], device_of: Callable[[], torch.device | None]) -> None:
        """Make the table of what acts in this thread, for adapters of these ``names`` on a device that is asked for."""
        choice, table = self.choice, self._defaults.table
        if choice is not None:
            device = device_of()
            table = table if device is None else choice.table(tuple(names), device)
        self._thread.table = table

    @contextmanager
    def only(self, choice: Choice) -> Iterator[None]:
        """Let ``choice`` go before all others, while a layer calls its code for some samples."""
        self._thread.only = choice
        try:
            yield
        finally:
            self._thread.only = None

    def now(self) -> Choice | None:
        """What acts in the call of the layer that runs now."""
        if self._thread.only is not None:
            return self._thread.only
        choices, backward = self._thread.choices, backward_id()
        if backward < 0 and not (choices and may_be_checkpointed()):
            return choices[-1] if choices else self._defaults.choice
        begun, repeated = running_checkpoints()
        around = None  # what held around the checkpoint that is repeated
        if repeated is not None:
            around = vars(repeated).get(_NOTES, {}).get(id(self))
            choices = [choice for choice in choices if choice.backward == backward]
        for checkpoint in begun:  # a block inside of it begins again when it is repeated
            outside = [choice for choice in choices if id(checkpoint) not in choice.within]
            vars(checkpoint).setdefault(_NOTES, {})[id(self)] = outside[-1] if outside else around
        return (choices[-1] if choices else around) or self._defaults.choice

    def __reduce__(self) -> tuple[type[Acting], tuple[Choice | None]]:
        return Acting, (self._defaults.choice,)


def traced_coefficient(table: Tensor, column: int, size: int) -> Tensor:
    """The coefficients of one adapter for each of ``size`` samples, in operations that a compiler traces, ``(size,)``.

    Where the batch has another size than the choice they are NaN: compiled code cannot raise an error about it.
    """
    index = torch.arange(size, device=table.device).clamp(max=table.shape[0] - 1)
    wrong = (table[0, -1] >= 0) & (table[0, -1] != size)
    return torch.where(wrong, float("nan"), table[:, column].index_select(0, index))


def traced_coefficient_of_batch(table: Tensor, column: int) -> Tensor:
    """The coefficient of one adapter for the whole batch; NaN where its samples differ, as above."""
    column_values = table[:, column]
    return torch.where((column_values == column_values[0]).all(), column_values[0], float("nan"))


def default_table(strengths: Mapping[str, float], device: torch.device) -> Tensor:
    """The table of the coefficients ``strengths`` for the whole batch; layers share it."""
    key = tuple(strengths.items()), device
    table = _DEFAULTS.get(key)
    if table is None:
        table = _DEFAULTS[key] = Choice([strengths]).table(tuple(strengths), device)
    return table
