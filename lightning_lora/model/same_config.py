"""Whether two configurations mean the same adapters."""

from __future__ import annotations

from torch import nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig, MethodConfig
from lightning_lora.files.json_files import printable
from lightning_lora.layers.base import has_adapter
from lightning_lora.model.record import configs_of, is_merged, records
from lightning_lora.targets.resolve import Targets
from lightning_lora.targets.survey import Survey, survey_of

LONGEST_SHOWN = 600  # characters of a value in a message
IDENTITY = ("name", "r", "alpha", "rslora", "targets", "exclude", "rank_pattern", "alpha_pattern", "bias", "also_train")


def difference(present: LoRAConfig, asked: LoRAConfig) -> str | None:
    """The first argument in which two configurations mean different adapters, as ``r=4 instead of r=8``."""
    old, new = present.to_dict(), asked.to_dict()
    for key in IDENTITY:
        if _ordered(old[key]) != _ordered(new[key]) and not (key == "alpha" and _same_alpha(present, asked)):
            return f"`{key}={_shown(new[key])}` instead of `{key}={_shown(old[key])}`"
    return None


def difference_by_name(present: LoRAConfig, asked: LoRAConfig) -> str | None:
    """As :func:`difference`, of the adapters that both name; different ones altogether are a difference too."""
    old, new = ({each.name: each for each in config.each()} for config in (present, asked))
    if old.keys().isdisjoint(new) and len(old) == len(new) == 1:
        return difference(*old.values(), *new.values())
    if old.keys().isdisjoint(new):
        return f"the adapters {', '.join(map(repr, new))} instead of {', '.join(map(repr, old))}"
    changes = {name: difference(old[name], config) for name, config in new.items() if name in old}
    changed = next((name for name, change in changes.items() if change is not None), None)
    if changed is None:
        return None
    return f"{changes[changed]}" + (f" in the adapter {changed!r}" if max(len(old), len(new)) > 1 else "")


def _shown(value: object) -> str:
    """The value for a message, of bounded length: a configuration may come from a file."""
    return printable(repr(value), LONGEST_SHOWN)


def _ordered(value: object) -> object:
    """For comparison: the first pattern that matches counts, so order matters; an empty list is as good as ``None``."""
    return (list(value.items()) if isinstance(value, dict) else value) or None


def _same_alpha(present: LoRAConfig, asked: LoRAConfig) -> bool:
    """``alpha=None`` is each layer's rank: it equals a number only where all layers have the same rank."""
    one_rank = not present.rank_pattern and not asked.rank_pattern
    return one_rank and (present.alpha or present.r) == (asked.alpha or asked.r)


def check_method(model: nn.Module | Survey, config: MethodConfig) -> None:
    """Raise if ``model``, or a part of it, is adapted by another method than that of ``config``.

    Raises:
        ValueError: naming both methods and the ways out.
    """
    present = next((each for each in configs_of(model).values() if type(each) is not type(config)), None)
    if present is not None:
        is_lora = isinstance(present, LoRAConfig)
        keep = "merge_lora(model, undo=False)" if is_lora else "remove_adapted(model, keep=True)"
        raise ValueError(
            f"The model is adapted by {type(present).__name__} already, and this asks for {type(config).__name__}: a "
            "model takes one method. To start over on the original base call `remove_adapted(model)`; to keep what was "
            f"trained in the model's own weights as the new base call `{keep}`."
        )


def check_same(model: nn.Module | Survey, config: LoRAConfig) -> None:
    """Raise if ``model`` has an adapter of that name, live or merged, of another configuration, in whatever part of it.

    Raises:
        ValueError: naming the first difference and the ways out.
    """
    model = survey_of(model)
    check_method(model, config)
    configs = (record.adapted_by.get(config.name) for _, _, record in records(model))
    changes = (difference(each, config) for each in configs if isinstance(each, LoRAConfig))
    changed = next((change for change in changes if change is not None), None)
    if changed is not None:
        raise ValueError(
            f"The model already has adapters{' (merged)' if is_merged(model) else ''}, and this asks for {changed}. To "
            "start over on the original base call `remove_lora(model)`; to keep what was trained as the new base call "
            "`merge_lora(model, undo=False)`; to continue, ask for the same."
        )


def check_meant(targets: Targets, adapter: str) -> None:
    """Raise if a layer is adapted that the same configuration does not mean in this model, as it did in another.

    Args:
        targets: what the configuration means.
        adapter: its name.

    Raises:
        ValueError: naming the layer and the ways out.
    """
    meant = {id(site.module) for site in targets.sites}
    present = [
        name for name, module in targets.survey.modules if has_adapter(module, adapter) and id(module) not in meant
    ]
    if present:
        raise ValueError(
            f"`{names.clean(present[0])}` has adapters ({names.counted(len(present), 'such layer')}), and in this "
            "model the configuration does not mean it: it was adapted as a part of another model. To take them off "
            "call `remove_lora` with that layer; to keep what was trained in its weights call `merge_lora(layer, "
            "undo=False)`."
        )
