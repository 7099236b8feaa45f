"""How peft's Auto classes find the class of a base: by its task, or by the name of the class itself.

Rules: ``auto.py`` and ``peft_model.py`` in peft 0.21. A task makes ``PeftModel.from_pretrained`` return a class of that
task, which names its arguments as a text model does. It expects the modules that end as :data:`HEADS` says in the file,
so a model whose head stays frozen, or is adapted, has no task there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_lora.foreign import TASK_CLASSES, TRANSFORMERS
from lightning_lora.peft_format.targets import is_pretrained, saved

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


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
