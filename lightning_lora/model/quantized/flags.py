"""The attributes by which transformers knows a quantized model; without them its plain weights are saved and loaded.

Its own ``dequantize`` removes the same attributes; here a record keeps them, for the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lora.foreign import CONVERSIONS, QUANTIZED_CONFIG, QUANTIZED_MODEL, QUANTIZING_LIBRARY
from lightning_lora.model.journal import Journal
from lightning_lora.model.record import record_of, records


@dataclass
class ConfigAttributes:
    """The attributes of ``config`` before a change: the journal of a model holds those of its modules alone."""

    config: Any
    before: dict[str, Any]

    def undo(self) -> None:
        """Give the configuration these attributes, and no others."""
        vars(self.config).clear()
        vars(self.config).update(self.before)


def take_flags(model: nn.Module, journal: Journal) -> None:
    """Take off each module of ``model``, and off its configuration, what says that it is quantized."""
    for module in model.modules():
        own, config = vars(module), vars(module).get("config")
        flags = {"model": {key: own[key] for key in QUANTIZED_MODEL if key in own}}
        plain = _plain_conversions(own.get(CONVERSIONS))
        if plain is not None:
            flags["model"][CONVERSIONS] = own[CONVERSIONS]
        of_config = getattr(config, "__dict__", {})
        flags["config"] = {key: of_config[key] for key in QUANTIZED_CONFIG if key in of_config}
        if not any(flags.values()):
            continue
        record_of(module).flags = flags
        if flags["config"]:
            journal.steps.append(ConfigAttributes(config, dict(of_config)))
        for attributes, taken in ((own, flags["model"]), (of_config, flags["config"])):
            for key in taken:
                del attributes[key]
        if plain is not None:
            own[CONVERSIONS] = plain


def _plain_conversions(conversions: Any) -> list[Any] | None:
    """Of what saving does in reverse, all but the reading of quantized weights, which has no reverse.

    Returns:
        ``None`` where no quantized weights were read: the base was quantized when it was loaded.
    """
    plain = [each for each in conversions or () if not any(map(_reads_codes, getattr(each, "operations", ())))]
    return plain if len(plain) < len(conversions or ()) else None


def _reads_codes(operation: Any) -> bool:
    return QUANTIZING_LIBRARY in type(operation).__module__.split(".")


def put_flags_back(model: nn.Module, journal: Journal) -> None:
    """Give ``model`` and its configuration back what :func:`take_flags` took off."""
    for _, module, record in list(records(model)):
        config = vars(module).get("config")
        if record.flags.get("config"):
            journal.steps.append(ConfigAttributes(config, dict(vars(config))))
            vars(config).update(record.flags["config"])
        vars(module).update(record.flags.get("model", {}))
        record.flags = {}
