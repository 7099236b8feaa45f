"""Load an adapter-only checkpoint into a module that is ready to use, without a Trainer."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.foreign import LIGHTNING_MODULE, is_a
from lightning_lora.layers.adapted import Adapted
from lightning_lora.methods.adapt import adapt, remove_adapted
from lightning_lora.methods.base import Method
from lightning_lora.methods.known import method_of
from lightning_lora.model.apply import remove_lora
from lightning_lora.model.fingerprint import Fingerprint, differences, fingerprint
from lightning_lora.model.freeze import is_frozen, unfreeze
from lightning_lora.model.record import config_of, configs_of, is_merged
from lightning_lora.model.several.strengths import set_strengths
from lightning_lora.model.written import set_written
from lightning_lora.names import clean, counted
from lightning_lora.trainer.adapter_callback import AdapterCallback
from lightning_lora.trainer.callback import LoRACallback
from lightning_lora.trainer.checkpointing import contents, reading
from lightning_lora.trainer.checkpointing.adapters_by_name import AdapterFile, check_no_others
from lightning_lora.trainer.checkpointing.base_weights import Copied, Source, copy_base, tensors_of
from lightning_lora.trainer.checkpointing.checks import check_room
from lightning_lora.trainer.checkpointing.hyperparameters import with_callbacks
from lightning_lora.trainer.compatibility import overrides
from lightning_lora.trainer.fusion_callback import FusionCallback
from lightning_lora.trainer.imports import rank_zero_warn
from lightning_lora.trainer.prefix_callback import PrefixCallback
from lightning_lora.trainer.prompt_callback import PromptCallback
from lightning_lora.trainer.replaced_layers import run_hook
from lightning_lora.trainer.subspace_callback import SubspaceCallback
from lightning_lora.trainer.tune_callback import TuneCallback
from lightning_lora.trainer.watching.frozen_facts import LATE, WRITTEN, names_in

Module = TypeVar("Module", bound=nn.Module)
CALLBACKS: tuple[type, ...] = (
    LoRACallback,
    AdapterCallback,
    FusionCallback,
    PrefixCallback,
    PromptCallback,
    SubspaceCallback,
    TuneCallback,
)
OF_LIGHTNING = ("checkpoint_path", "map_location", "hparams_file", "strict", "weights_only")


def load_from_checkpoint(
    cls_or_module: type[Module] | Module,
    path: str | Path | None = None,
    *,
    base: nn.Module | str | Path | None = None,
    cls_kwargs: Mapping[str, Any] | None = None,
    merge: bool = False,
    strict_base: bool = True,
    map_location: Any = None,
    hparams_file: str | Path | None = None,
    weights_only: bool | None = None,
    checkpoint_path: str | Path | None = None,
    **kwargs: Any,
) -> Module:
    """The module that a run with a callback of this package trained, from its checkpoint and the base.

    Lightning's own ``cls.load_from_checkpoint(path, strict=False)`` gives the base without the adapters, and a random
    one if ``cls`` draws it. Here the base has to be the one that the adapters were trained on. A failure leaves a given
    module as it was. ``on_load_checkpoint`` is called with the whole checkpoint, and for a class before that by
    Lightning, with no weights in it.

    Args:
        cls_or_module: class of the LightningModule, which makes the base in ``__init__`` or ``configure_model``; or a
            module that was built already, which is adapted in place and returned: for a class that needs objects, has
            a ``load_from_checkpoint`` of its own, or builds the model in ``setup``.
        path: file that a Trainer with LoRACallback wrote.
        base: where the weights of the base come from, if the class does not make them: a module (the LightningModule,
            or the network in it), a ``.ckpt``, ``.pt`` or ``.bin`` file with a state dict, a safetensors file or the
            index of several, or a directory that ``save_pretrained`` wrote. They are copied in by name. ``None`` leaves
            the base as the class makes it.
        cls_kwargs: arguments of the class in place of the saved hyperparameters, where their names are also arguments
            of this function, such as ``base``.
        merge: merge the adapters into the weights, so that the module is the plain one. ``False`` keeps them live.
        strict_base: another base is an error; ``False`` makes it a warning that says what differs.
        map_location: where to put the module, as for ``torch.load``; ``None`` leaves it where it is made.
        hparams_file: as for Lightning's ``load_from_checkpoint``.
        weights_only: as for ``torch.load``; ``False`` for hyperparameters that are objects, of files that you trust.
        checkpoint_path: Lightning's word for ``path``.
        kwargs: arguments of the class, as ``cls_kwargs``.

    Raises:
        ValueError: if the file has no adapters or is damaged, or does not fit the module or its base.
        TypeError: if the arguments do not go together.

    Example:
        >>> module = load_from_checkpoint(LitModel, "last.ckpt", base="model.safetensors")  # doctest: +SKIP
    """
    path = _one_path(path, checkpoint_path)
    content = reading.read(reading.on_cpu, path, weights_only is not False, "path")
    content = with_callbacks(content, {callback.__name__: callback for callback in CALLBACKS})
    file = AdapterFile(path, content, *reading.facts_in(content, path, "path"), reading.kept_in(content))
    source = None if base is None else tensors_of(base, weights_only is not False)
    arguments = {**kwargs, **(cls_kwargs or {})}
    if isinstance(cls_or_module, nn.Module):
        _check_no_arguments(arguments, hparams_file)
        module = cls_or_module
        with _unchanged_on_failure(module) as overwritten:
            _load(file, module, source, strict_base, overwritten)
            if merge:
                file.method.merge(module)
        return module if map_location is None else module.to(map_location)
    module = _bare(cls_or_module, content, arguments, hparams_file)
    if map_location is not None:
        module.to(map_location)
    _load(file, module, source, strict_base, None)
    if merge:
        file.method.merge(module)
    return module


def _one_path(path: str | Path | None, checkpoint_path: str | Path | None) -> str | Path:
    given = [value for value in (path, checkpoint_path) if value is not None]
    if len(given) != 1:
        raise TypeError(f"`path` must be the path of one checkpoint, but got {'two paths' if given else 'None'}.")
    return given[0]


def _check_no_arguments(arguments: Mapping[str, Any], hparams_file: str | Path | None) -> None:
    names = [*arguments, *([] if hparams_file is None else ["hparams_file"])]
    if names:
        raise TypeError(
            f"`{names[0]}` is an argument for making the module, but `cls_or_module` is built already. Leave it "
            "out, or give the class."
        )


def _bare(
    cls: type[Module],
    content: dict[str, Any],
    arguments: dict[str, Any],
    hparams_file: str | Path | None,
) -> Module:
    """The module that Lightning makes from the hyperparameters in the file, with no weights loaded yet."""
    if not isinstance(cls, type) or not hasattr(cls, "load_from_checkpoint"):
        raise TypeError(f"`cls_or_module` must be a class of LightningModule, or a module, but got {cls!r}.")
    for name in arguments:
        if name in OF_LIGHTNING:
            raise TypeError(
                f"`cls_kwargs` has `{name}`, which is also an argument of Lightning's `load_from_checkpoint`. Give the "
                f"module instead: load_from_checkpoint({cls.__name__}({name}=..., ...), path)."
            )
    stream = io.BytesIO()
    kept = {key: value for key, value in content.items() if key not in ("optimizer_states", "callbacks", "loops")}
    torch.save({**kept, "state_dict": {}}, stream)
    stream.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*contains no parameters")
            warnings.filterwarnings("ignore", message=".*in the model state dict but not in the checkpoint")
            # `weights_only` was minded when the file was read; these bytes were written here.
            return cls.load_from_checkpoint(  # type: ignore[attr-defined, no-any-return]
                stream, strict=False, hparams_file=hparams_file, weights_only=False, **arguments
            )
    except Exception as error:  # of the class's own code
        if not _has_own_loader(cls):
            raise
        raise ValueError(
            f"{cls.__name__} has a `load_from_checkpoint` of its own, which does not read a file without the base "
            f"({type(error).__name__}: {error}). Build the module, and give it in place of the class: "
            f"load_from_checkpoint({cls.__name__}(...), path)."
        ) from error


def _has_own_loader(cls: type) -> bool:
    owner = next(base for base in cls.__mro__ if "load_from_checkpoint" in vars(base))
    return owner.__name__ != LIGHTNING_MODULE


@contextmanager
def _unchanged_on_failure(module: nn.Module) -> Iterator[Copied]:
    """After an error inside the ``with`` block ``module`` is as it was.

    Yields:
        A list for each tensor of the base that is overwritten, with its values before.
    """
    children = [(inner, dict(inner._modules)) for inner in module.modules()]
    present, names = config_of(module), configs_of(module).keys()
    method = None if present is None else method_of(present)
    state = None if method is None else deepcopy(method.state(module))
    was_merged, was_frozen = is_merged(module), is_frozen(module)
    overwritten: Copied = []
    try:
        yield overwritten
    except BaseException:
        for inner, before in children:  # `on_load_checkpoint` may replace layers
            added = {inner.method_key} if isinstance(inner, Adapted) else {"lora"}
            for key in inner._modules.keys() - before.keys() - added:
                del inner._modules[key]
            inner._modules.update({key: child for key, child in before.items() if key not in added})
        with torch.no_grad():
            for tensor, value in overwritten:
                tensor.copy_(value)
        for name in configs_of(module).keys() - names if names else ():
            remove_lora(module, name=name)
        _restore(module, method, state, was_merged, was_frozen)
        raise


def _restore(
    module: nn.Module, method: Method | None, state: dict[str, Any] | None, was_merged: bool, was_frozen: bool
) -> None:
    if method is None or state is None:
        remove_adapted(module)
        return
    if is_merged(module):
        method.unmerge(module)
    method.load(module, state)
    if was_merged:
        method.merge(module)
    elif not was_frozen:
        unfreeze(module)


def _load(
    file: AdapterFile, module: nn.Module, source: Source | None, strict_base: bool, overwritten: Copied | None
) -> None:
    """Give ``module`` the base in ``source`` and the adapters in ``file``."""
    check_no_others(file, module)
    file.method.check_same(module)
    if is_merged(module):
        file.method.unmerge(module)
    copied = set() if source is None else copy_base(source, module, file.base, overwritten)
    _adapt(module, file)
    set_written(module, names_in(file.content[contents.KEY], WRITTEN))
    if is_a(module, LIGHTNING_MODULE) and overrides(module, "on_load_checkpoint"):
        run_hook(module, "on_load_checkpoint", file.method, file.content)
    _check_base(file, fingerprint(module), strict_base, set() if source is None else file.base.keys() - copied)
    file.method.load(module, {clean(key): value for key, value in file.content["state_dict"].items()})


def _check_base(file: AdapterFile, present: Fingerprint, strict_base: bool, not_in_base: set[str]) -> None:
    """Raise for another base, or warn of all that differs and of what could not be compared."""
    missing = f" `base` has no `{min(not_in_base)}` ({len(not_in_base)} missing)." if not_in_base else ""
    try:
        reading.check_base(file.base, present, file.path, "path", names_in(file.content[contents.KEY], LATE))
    except ValueError as error:
        if strict_base:
            raise ValueError(f"{error}{missing}") from error
        different = list(differences(file.base, present))
        rank_zero_warn(
            f"`strict_base=False`: the adapters of {file.path} are on another base than the one that they were trained "
            f"on. Frozen weights that differ, {len(different)} of {len(file.base)}: {'; '.join(different[:3])}."
            f"{missing}"
        )
    unchecked = [name for name, sums in present.items() if None in sums[:3]]
    if unchecked and not strict_base:
        rank_zero_warn(
            f"`strict_base=False`: the values of {counted(len(unchecked), 'frozen weight')}, such as `{unchecked[0]}`, "
            "were not compared: they are quantized, or on the meta device."
        )


def _adapt(module: nn.Module, file: AdapterFile) -> None:
    try:
        if isinstance(file.config, LoRAConfig):
            check_room(module, [*file.kept.values(), *file.config.each()], file.content["state_dict"])
        for config in (*file.kept.values(), file.config):
            adapt(module, config)
        if file.kept:
            file.method.complete(module)
            set_strengths(module, file.strengths())
    except ValueError as error:
        if not is_a(module, LIGHTNING_MODULE) or not overrides(module, "setup"):
            raise
        raise ValueError(
            f"The checkpoint's targets are not in {type(module).__name__}: {error} It has a `setup`, which only a "
            "Trainer calls: if that makes the model, build it first, and give the module in place of the class: "
            "module.setup('test'); load_from_checkpoint(module, path)."
        ) from error
