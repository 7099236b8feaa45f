"""The model that a ``config.json`` of transformers describes, built on the meta device: names and shapes, no values.

The configuration may come from a stranger. No code of its own is run and nothing is downloaded. Sizes that no model has
are refused, and building stops after a number of modules and of seconds.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lightning_lora.files.json_files import read_object, shown

LARGEST = 2**40  # of any number
MOST_LAYERS = 10_000
MOST_LABELS = 1_000_000  # each gets a name before the model is built
COUNTS = ("layer", "block", "depth", "expert", "stage")  # numbers with these in their names count modules
SIZES = ("size", "dim", "width", "capacity", "offset", "norm")  # unless these are in them too
MOST_MODULES = 300_000  # the largest mixtures of experts have a third of it
SECONDS = 120.0  # of CPU time


def model_of(path: Path) -> nn.Module:
    """Build the model that the configuration at ``path`` describes, on the meta device.

    Args:
        path: a ``config.json``. Its ``model_type`` and the first of its ``architectures`` say which class is built;
            without ``architectures`` it is the bare model, without a head.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if the configuration is damaged, transformers does not know the model, or sizes are absurd.
    """
    values = read_object(path)
    _check_sizes(values, path)
    transformers = _transformers()
    with _limited(path):
        try:
            config = _config(values, path, transformers)
            make = _class(values, config, path, transformers)
            with torch.device("meta"):
                return make(config)
        except (ImportError, _RefusedError):
            raise
        except Exception as error:  # transformers has errors of many kinds for wrong values
            raise ValueError(f"`{path}` describes no model that can be built: {shown(str(error))}.") from error


class _RefusedError(ValueError):
    """An error whose words are complete."""


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'A config.json is planned with the model that transformers builds from it: pip install "transformers>=5". '
            "A safetensors file or a directory with one is planned without it."
        ) from error
    return transformers


def _check_sizes(values: Any, path: Path, key: str = "") -> None:
    """Raise at a number that would make the configuration itself too large, before anything is built from it."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            _check_sizes(value, path, str(name))
    elif isinstance(values, list):
        for value in values:
            _check_sizes(value, path, key)
    elif isinstance(values, int) and values > _largest(key):
        raise ValueError(f"`{path}` has {values:,} as {shown(key)}: no model has more than {_largest(key):,}.")


def _largest(key: str) -> int:
    if "label" in key:
        return MOST_LABELS
    counts = any(word in key for word in COUNTS) and not any(word in key for word in SIZES)
    return MOST_LAYERS if counts else LARGEST


def _config(values: Mapping[str, Any], path: Path, transformers: ModuleType) -> Any:
    kind = values.get("model_type")
    known = transformers.CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in known:
        raise _RefusedError(
            f"`{path}` has the `model_type` {shown(kind)}, which transformers {transformers.__version__} does not "
            "know; code that comes with a model is not run. Give its safetensors file or the directory with it."
        )
    # How attention is computed changes no shape, and other ways may need packages that are not there.
    plain = {key: value for key, value in values.items() if "attn_implementation" not in key}
    return known[kind].from_dict(plain)


def _class(values: Mapping[str, Any], config: Any, path: Path, transformers: ModuleType) -> Callable[[Any], nn.Module]:
    names = values.get("architectures")
    if not names:
        return transformers.AutoModel.from_config  # type: ignore[no-any-return]
    name = names[0] if isinstance(names, list) else names
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not is_model:
        raise _RefusedError(
            f"`{path}` has {shown(name)} in `architectures`, which transformers {transformers.__version__} does not "
            "have; code that comes with a model is not run. Give its safetensors file or the directory with it."
        )
    if not isinstance(config, cls.config_class):
        raise _RefusedError(f"`{path}` has {shown(name)} in `architectures`, which is no {config.model_type} model.")
    return cls  # type: ignore[no-any-return]


@contextmanager
def _limited(path: Path) -> Iterator[None]:
    """Stop the block after ``MOST_MODULES`` modules were built, or ``SECONDS`` of CPU time have passed."""
    built = 0

    def count(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal built
        built += 1
        if built > MOST_MODULES:
            raise _RefusedError(f"`{path}` describes a model of more than {MOST_MODULES:,} modules.")

    hook = register_module_module_registration_hook(count)
    try:
        with _time_limit(path):
            yield
    finally:
        hook.remove()


@contextmanager
def _time_limit(path: Path) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _RefusedError(f"`{path}` describes a model that takes more than {SECONDS:g} seconds to build.")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
