"""What a directory holds in addition to A and B: in a model with several adapters it acts with all of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.model.initial_values import moved
from lightning_lora.model.record import configs_of
from lightning_lora.model.state import clean_state, full_detached
from lightning_lora.peft_format.placement import is_same


def check_common(files: Mapping[str, Mapping[str, Tensor]], model: nn.Module, all_use_it: bool = False) -> None:
    """Raise if loading would change trained modules, biases or buffers that another adapter acts with.

    Args:
        files: what each file holds in addition to A and B, by the names of the adapters.
        model: into which the files are loaded.
        all_use_it: whether adapters of ``model`` that are loaded count too.

    Raises:
        ValueError: naming the first value that differs.
    """
    (first, expected), *others = files.items()
    for name, values in others:
        key = _difference(expected, values)
        if key is not None:
            raise ValueError(
                f"`{key}` is not the same in the files of `{first}` and `{name}`, and a model has one for all its "
                "adapters. Load them into models of their own, one directory each."
            )
    present = configs_of(model).keys() if all_use_it else configs_of(model).keys() - files.keys()
    if present:
        _check_model(expected, model, min(present))


def _check_model(values: Mapping[str, Tensor], model: nn.Module, other: str) -> None:
    state = clean_state(model)
    own = {key: full_detached(state[key]).cpu() for key in {*values, *_moved(model)} & state.keys()}
    key = _difference({name: value for name, value in values.items() if name in state}, own)
    if key is not None:
        raise ValueError(
            f"`{key}` trains in addition to the adapters, or is a buffer that changed, and has other values in the "
            f"model than in the file or for its adapter: `{other}` would act with them too. Load the file into a model "
            "of its own."
        )


def _moved(model: nn.Module) -> set[str]:
    places = {id(module): name for name, module in names.named_modules(model)}
    return {names.join(places[id(module)], key) for module, key, _ in moved(model)}


def _difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> str | None:
    """The first name that has two values, or one."""
    for key in sorted({*first, *second}):
        if key not in first or key not in second or not is_same(first[key], second[key]):
            return key
    return None
