"""How peft's Auto classes find the class of a base: by its task, or by the name of the class itself.

Rules: ``auto.py`` and ``peft_model.py`` in peft 0.21. A task makes ``PeftModel.from_pretrained`` return a class of that
task, which names its arguments as a text model does. It expects the modules that end as :data:`HEADS` says in the file,
so a model whose head stays frozen, or is adapted, has no task there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_lora import names
from lightning_lora.files.json_files import is_name
from lightning_lora.foreign import BASE_NAME, TASK_CLASSES, TRANSFORMERS
from lightning_lora.peft_format.targets import is_pretrained, saved

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


CLASSES = "peft_classes"  # in what a checkpoint records
BASE = "base_model_name_or_path"
ENTRY = {"task_type", "auto_mapping", BASE}


def base_name(model: nn.Module) -> str | None:
    """The name of the part ``model`` that peft wraps, as ``from_pretrained`` takes it."""
    base = getattr(model, BASE_NAME, None) or None
    return base if isinstance(base, str) else None


def classes_in(model: nn.Module) -> dict[str, dict[str, Any]]:
    """For each transformers model in ``model``, by its name: its :func:`auto_classes` and the name of its base.

    A checkpoint records them for adapters in it without modules that train in full.
    """
    return {
        name: {**auto_classes(module, []), BASE: base_name(module)}
        for name, module in names.named_modules(model)
        if is_pretrained(module)
    }


def recorded_classes(recorded: Any) -> dict[str, dict[str, Any]]:
    """What a file records of :func:`classes_in`, checked: peft imports the library that an ``auto_mapping`` names.

    Raises:
        ValueError: if it is of another form, or names another library.
    """
    if recorded is None:  # files of earlier versions have none
        return {}
    if not isinstance(recorded, dict) or not all(is_name(name) and _is_entry(e) for name, e in recorded.items()):
        raise ValueError("what it records of the classes of transformers is damaged")
    return recorded


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not entry.keys() <= ENTRY:
        return False
    task, base, mapping = entry.get("task_type"), entry.get(BASE), entry.get("auto_mapping")
    is_task = task is None or task in TASK_CLASSES.values()
    return is_task and (base is None or is_name(base)) and (mapping is None or _is_mapping(mapping))


def _is_mapping(mapping: Any) -> bool:
    if not isinstance(mapping, Mapping) or mapping.keys() != {"base_model_class", "parent_library"}:
        return False
    parts = [part for name in mapping.values() for part in str(name).split(".")]
    library = str(mapping["parent_library"]).partition(".")[0]
    return library == TRANSFORMERS and all(part.isidentifier() for part in parts)


def auto_classes(model: nn.Module, modules_to_save: Sequence[str]) -> dict[str, Any]:
    """``task_type`` and, where there is none, ``auto_mapping`` for the part ``model`` that peft wraps.

    Args:
        model: any module; those of transformers have a task.
        modules_to_save: the names of its modules that train in full.
    """
    task = _task(model)
    if task in HEADS and not set(saved(HEADS[task], model)) <= set(modules_to_save):
        task = None
    if task is not None or not is_pretrained(model):
        return {"task_type": task}
    cls = next((cls for cls in type(model).__mro__ if cls.__module__.partition(".")[0] == TRANSFORMERS), type(model))
    return {"task_type": None, "auto_mapping": {"base_model_class": cls.__name__, "parent_library": cls.__module__}}


def _task(model: nn.Module) -> str | None:
    """The task by the name of the class, of a model whose input is text."""
    if not is_pretrained(model) or getattr(model, "main_input_name", None) != "input_ids":
        return None
    matches = (task for cls in type(model).__mro__ for end, task in TASK_CLASSES.items() if cls.__name__.endswith(end))
    task = next(matches, None)
    encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return None if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and encodes != (task == "SEQ_2_SEQ_LM") else task
