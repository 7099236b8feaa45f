"""The record on a module: its state before a method adapted it, and after a merge what an exact unmerge needs.

Each module keeps the facts about its own parameters in one plain attribute. So a record is copied by ``deepcopy`` and
``pickle``, and any part of a model has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lora import names
from lightning_lora.config import MethodConfig
from lightning_lora.layers.adapted import Adapted
from lightning_lora.layers.adapters import Adapters
from lightning_lora.ops.exact_sum import Patch
from lightning_lora.targets.survey import Survey, survey_of

_ATTRIBUTE = "_lightning_lora"


@dataclass
class MergedWeight:
    """What undoes the merge into one parameter.

    Args:
        patches: for each matrix in it, the elements that subtracting delta does not restore.
        checksum: of the merged weight.
        original: checksum of the weight before the merge.
        shared: the parameter before the merge, where other modules have it too; the merged one is a new parameter.
    """

    patches: list[Patch]
    checksum: int
    original: int
    shared: nn.Parameter | None = None


@dataclass
class Merged:
    """The adapters of a layer after they were merged into its weights.

    Args:
        adapters: A and B, which only the record holds now.
        weights: how to undo the merge into each parameter.
        factors: of the updates that were merged, by the names of adapters; one that is not in it rests here.
    """

    adapters: Adapters
    weights: dict[str, MergedWeight]
    factors: dict[str, float]


@dataclass
class PackedLayer:
    """A quantized layer as it was before a merge made it a plain linear layer.

    Args:
        cls: its class, without the adapters.
        parameters: the quantized weight, and the bias.
        attributes: those of its class that a plain layer does not have, such as the state of the quantization.
        hooks: those of its class, which quantize what is loaded, by the attribute that holds them.
        checksum: of the plain weight that took its place.
        source: path of the file whose weights took the place of the quantized ones; ``None`` for the dequantized
            weights.
    """

    cls: type[nn.Module]
    parameters: dict[str, nn.Parameter]
    attributes: dict[str, Any]
    hooks: dict[str, dict[int, Any]]
    checksum: int
    source: str | None


class MergedChild(Protocol):
    """What a method that is no LoRA leaves on a module whose child is merged.

    Attributes:
        key: of the method.
    """

    key: ClassVar[str]

    @property
    def child(self) -> nn.Module:
        """Which the module had."""

    def unmerge(self, model: nn.Module, journal: Any) -> None:
        """Take everything that this method merged out of ``model``, and adapt its modules again."""

    def merge(self, model: nn.Module, journal: Any) -> object:
        """Merge it again."""


@dataclass
class Record:
    """The facts about one module; keys are those of its own parameters and buffers.

    Args:
        configs: on the module that was adapted as a whole, by the names of the adapters.
        adapted_by: on an adapted module, or one of which a part is trained by a method that adds nothing: the
            configurations that did it. A module may be a part of several models, and each of them must find them.
        kept: the names of adapters of an earlier run that do not train in this one.
        requires_grad: of each parameter, before :func:`lightning_lora.model.freeze.freeze`, while the module is frozen.
        trained: the base's parameters that train in addition to the adapters, or did in an earlier run.
        held: those of ``trained`` that do not train now: only configurations of ``kept`` adapters ask for them.
        shared: parameters that other modules have too, so that a merge must not change them.
        written: frozen parameters that other code writes during a run, so that files hold them.
        originals: values before training of what may move: trained parameters and buffers, on the CPU.
        merged: on a layer whose adapters are merged.
        merged_child: on a module whose child of another method is merged.
        packed: on a quantized layer that is a plain one now, adapted or not.
        flags: on a model of transformers whose quantized layers are plain now: what it knew of its quantization.
        load_hook: of the hook that loads adapter state dicts into the module.
        started_from: the path of the file or directory that a run started the adapters from.
        packs: on a quantized layer, whether an evaluation on a CPU packs its weight while the model has no adapters.
        plain_copy: whether the module came into an adapted model as a copy, after the injection: it stays plain.
    """

    configs: dict[str, MethodConfig] = field(default_factory=dict)
    adapted_by: dict[str, MethodConfig] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    originals: dict[str, Tensor] = field(default_factory=dict)
    merged: Merged | None = None
    merged_child: MergedChild | None = None
    packed: PackedLayer | None = None
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    load_hook: RemovableHandle | None = None
    started_from: str | None = None
    packs: bool = False
    plain_copy: bool = False

    @property
    def config(self) -> MethodConfig | None:
        """The first of ``configs``."""
        return next(iter(self.configs.values()), None)

    @property
    def is_merged(self) -> bool:
        """Whether something is merged into the weights of the module."""
        return self.merged is not None or self.merged_child is not None


def record_of(module: nn.Module) -> Record:
    """The record on ``module``, made if there is none."""
    if _ATTRIBUTE not in module.__dict__:
        module.__dict__[_ATTRIBUTE] = Record()
    record = module.__dict__[_ATTRIBUTE]
    assert isinstance(record, Record)
    return record


def records(model: nn.Module | Survey) -> Iterator[tuple[str, nn.Module, Record]]:
    """Every record in ``model`` with its module under its first clean name."""
    for name, module in survey_of(model).modules:
        if _ATTRIBUTE in module.__dict__:
            yield names.clean(name), module, module.__dict__[_ATTRIBUTE]


def all_records(model: nn.Module) -> dict[str, Record]:
    """Every record in ``model`` by its module's name."""
    return {name: record for name, _, record in records(model)}


def place_again(model: nn.Module, kept: dict[str, Record]) -> None:
    """Put the records in ``kept`` on the modules that replaced those which had them, as SyncBatchNorm's do."""
    for name, module in names.named_modules(model):
        if name in kept:
            module.__dict__.setdefault(_ATTRIBUTE, kept[name])


def forget(model: nn.Module) -> None:
    """Remove every record, and the hook that belongs to it."""
    for _, module, record in list(records(model)):
        if record.load_hook is not None:
            record.load_hook.remove()
        del module.__dict__[_ATTRIBUTE]


def release(module: nn.Module, keep_flags: bool, mark: bool) -> None:
    """Remove the record that ``module`` got as a copy of another module, and the hook that belongs to it.

    Args:
        module: a module that holds no adapter.
        keep_flags: whether its ``requires_grad`` is restored with that of the model.
        mark: whether it is recorded as a plain copy.
    """
    old = module.__dict__.pop(_ATTRIBUTE, Record())
    if old.load_hook is not None:
        old.load_hook.remove()
    record_of(module).requires_grad = old.requires_grad if keep_flags else {}
    record_of(module).plain_copy = mark


def is_plain_copy(module: nn.Module) -> bool:
    """Whether ``module`` came into an adapted model as a copy, and stays plain."""
    record = module.__dict__.get(_ATTRIBUTE)
    return record is not None and record.plain_copy


def prune(model: nn.Module) -> None:
    """Remove the records that hold nothing."""
    for _, module, record in list(records(model)):
        if record == Record():
            del module.__dict__[_ATTRIBUTE]


def config_of(model: nn.Module | Survey) -> MethodConfig | None:
    """The configuration of the adapters in ``model``, live or merged, whatever model they were put on as a part of."""
    return next((config for _, _, record in records(model) for config in record.adapted_by.values()), None)


def configs_of(model: nn.Module | Survey) -> dict[str, MethodConfig]:
    """The configurations that ``model`` and parts of it are adapted with, by the names of the adapters."""
    every = [record for _, _, record in records(model)]
    configs = {name: config for record in reversed(every) for name, config in record.adapted_by.items()}
    order = [name for record in every for name in record.configs]
    return {name: configs[name] for name in dict.fromkeys([*order, *configs]) if name in configs}


def kept_names(model: nn.Module | Survey) -> set[str]:
    """The names of the adapters in ``model`` that do not train."""
    return {name for _, _, record in records(model) for name in record.kept}


def holders(model: nn.Module | Survey) -> list[tuple[nn.Module, list[MethodConfig]]]:
    """The modules in ``model`` that were adapted, ``model`` itself or parts of it, with their configurations."""
    return [(module, list(record.configs.values())) for _, module, record in records(model) if record.configs]


def merged_layers(model: nn.Module | Survey) -> Iterator[tuple[str, nn.Module, Merged]]:
    """Every layer whose adapters are merged."""
    for name, module, record in records(model):
        if record.merged is not None:
            yield name, module, record.merged


def packed_layers(model: nn.Module | Survey) -> list[tuple[str, nn.Module, PackedLayer]]:
    """Every quantized layer that a merge made a plain one."""
    every = [(name, module, record.packed) for name, module, record in records(model)]
    return [(name, module, packed) for name, module, packed in every if packed is not None]


def merged_children(model: nn.Module | Survey) -> list[tuple[str, nn.Module, MergedChild]]:
    """Every module whose child of another method is merged."""
    every = [(name, module, record.merged_child) for name, module, record in records(model)]
    return [(name, module, merged) for name, module, merged in every if merged is not None]


def is_merged_layer(module: nn.Module) -> bool:
    """Whether adapters, or what another method added, are merged into the weights of ``module`` itself."""
    record = module.__dict__.get(_ATTRIBUTE)
    return record is not None and record.is_merged


def is_tuned(module: nn.Module) -> bool:
    """Whether parameters of ``module`` itself train by a method that adds nothing to it."""
    record = module.__dict__.get(_ATTRIBUTE)
    live = record is not None and bool(record.adapted_by) and not record.is_merged
    return live and not isinstance(module, Adapted)


def is_merged(model: nn.Module | Survey) -> bool:
    """Whether adapters, or what another method added, are merged into ``model``."""
    return any(record.is_merged for _, _, record in records(model))
