"""Several adapters of one model for the method LoRA: which names a run may give, and what it leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from lightning_lora.model.freeze import freeze
from lightning_lora.model.journal import Journal, all_or_nothing
from lightning_lora.model.record import configs_of, record_of
from lightning_lora.model.several.one_adapter import drop_adapter
from lightning_lora.names import nearest


def check_names(trained: Sequence[str], kept: Collection[str], factors: Mapping[str, float]) -> None:
    """Raise if an adapter is trained and kept, or one is merged that is neither.

    Raises:
        ValueError: naming the first.
    """
    twice = next((name for name in trained if name in kept), None)
    if twice is not None:
        raise ValueError(f"`keep` has {twice!r}, which this run trains. Leave it out of one of the two.")
    unknown = next((name for name in factors if name not in {*trained, *kept}), None)
    if unknown is not None:
        close = ", ".join(f"`{name}`" for name in nearest(unknown, [*trained, *kept]))
        raise ValueError(
            f"`merge` has {unknown!r}, which this run neither trains nor keeps. Write one of its own, such as {close}."
        )


def check_kept(model: nn.Module, kept: Collection[str], trained: Collection[str]) -> None:
    """Raise if ``model`` lacks one of the adapters ``kept``; those ``trained`` may be there or not.

    Raises:
        ValueError: naming it.
    """
    present = configs_of(model)
    missing = next((name for name in kept if name not in present), None)
    if missing is not None:
        has = ", ".join(f"`{name}`" for name in present if name not in trained) or "none"
        raise ValueError(
            f"`keep` has {missing!r}, which is no adapter of the module; its others: {has}. Load it before the run, "
            f"load_adapter(model, directory, name={missing!r}), or leave it out of `keep`. For a checkpoint of a run "
            "that kept it make the module of that file, load_from_checkpoint(cls, path), and fit or test this one."
        )


def check_all_named(model: nn.Module, named: Collection[str]) -> None:
    """Raise if ``model`` has an adapter that a run neither trains nor keeps.

    Raises:
        ValueError: with the ways out.
    """
    other = min(configs_of(model).keys() - set(named), default=None)
    if other is not None:
        raise ValueError(
            f"The module has an adapter `{other}`, which this run does not name. To keep it as it is write "
            f"keep=[{other!r}]; to take it off call `remove_lora(model, name={other!r})`; to keep what it learned "
            "in the base's weights call `merge_lora(model, undo=False)`."
        )


def drop_adapters(model: nn.Module, names: Collection[str]) -> None:
    """Take the adapters ``names`` off ``model``; the others train again as before the run."""

    def change(journal: Journal) -> None:
        present = configs_of(model)
        for name in names:
            if name in present:
                drop_adapter(model, name, journal)
        others = configs_of(model)
        record_of(model).kept.clear()
        freeze(model, *others.values())

    all_or_nothing(model, change)


def why_not_all(names: Sequence[str]) -> str:
    """Why a run of several adapters merges none of them unless it is told which."""
    return (
        f"This run trains {', '.join(f'`{name}`' for name in names)}, and merged together they would act on every "
        "input: nothing is merged, and the module keeps them. To merge say which, with the factor of each: "
        f"merge={{{names[0]!r}: 1.0}}."
    )
