"""An adapted layer is the original module with its class replaced by a subclass that applies the adapters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.layers.adapted import Adapted, swap, swap_out
from lightning_lora.layers.adapter import Adapter, Pairs
from lightning_lora.layers.adapters import Adapters
from lightning_lora.layers.restoring import Undo
from lightning_lora.layers.weight_view import WeightPart


class LoRALayer(Adapted):
    """Base of all classes that LoRA adapts: each derives from it and from the class that it adapts."""

    method_key = "lora"
    lora: Adapters
    lora_adapter_class: ClassVar[type[Adapter]]

    @classmethod
    def lora_parts(cls, module: nn.Module) -> list[WeightPart]:
        """The matrices that are adapted when a ``module`` of this kind is a target."""
        return [WeightPart()]

    @staticmethod
    def lora_arguments(module: nn.Module) -> dict[str, Any]:
        """Arguments of this kind's adapters in addition to the common ones."""
        return {}

    def lora_set_parameter(self, key: str, value: Tensor) -> None:
        """Replace the parameter ``key`` by ``value`` everywhere the code of the layer reads it."""
        self._parameters[key] = value  # type: ignore[assignment]
        if key in self.__dict__:  # FSDP1 sets the attribute too while a unit is gathered
            self.__dict__[key] = value

    def lora_after_merge(self, weight: Tensor) -> bool:
        """Called with a merged weight: change it in place as the plain layer would; returns whether it did."""
        return False


def add_adapter(module: nn.Module, name: str, adapter: Adapter | Pairs, cls: type[LoRALayer]) -> None:
    """Give ``module`` one adapter more, and the class ``cls`` in which all of them act."""
    adapters = module.lora if isinstance(module, LoRALayer) else Adapters()
    _check_no_choice(adapters)
    adapter.train(module.training)
    adapters.add_module(name, adapter)
    if len(adapters) > 1 or adapters.acting is not None:
        adapters.prepare_choices()
    if type(module) is not cls:
        set_adapters(module, cls, adapters)


def remove_adapter(layer: LoRALayer, name: str, cls: type[LoRALayer]) -> None:
    """Take one of several adapters off ``layer``, and give it the class ``cls`` in which the others act."""
    _check_no_choice(layer.lora)
    del layer.lora._modules[name]
    layer.lora.strengths = {key: value for key, value in layer.lora.strengths.items() if key != name}
    layer.lora.prepare_choices()
    if type(layer) is not cls:
        set_adapters(layer, cls, layer.lora)


def _check_no_choice(adapters: Adapters) -> None:
    if adapters.acting is not None and adapters.acting.choice is not None:
        raise ValueError(
            "Inside `use_adapters` no adapter can be added or removed: the choice would end in some layers. Leave the "
            "`with` block first."
        )


def set_adapters(module: nn.Module, cls: type[LoRALayer], adapters: Adapters) -> None:
    """Turn ``module`` into an adapted layer; the object, its parameters, their names and its hooks stay."""
    swap(module, cls, adapters)


def pop_adapters(layer: LoRALayer) -> Adapters:
    """Restore the original class of ``layer``, and return its adapters."""
    adapters = swap_out(layer)
    assert isinstance(adapters, Adapters)
    return adapters


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Iterate over the adapted layers of ``model`` by their first clean names; all code that needs them uses this."""
    for name, module in names.each_module_once(model):
        if isinstance(module, LoRALayer):
            yield names.clean(name), module


def disable_adapters(model: nn.Module, undo: Undo) -> None:
    """Disable the adapters of ``model`` that act now, until the functions in ``undo`` are called."""
    for _, layer in adapted_layers(model):
        if layer.lora.enabled:
            undo.append(partial(setattr, layer.lora, "enabled", True))
            layer.lora.enabled = False


def has_adapter(module: nn.Module, name: str) -> bool:
    """Whether ``module`` has an adapter of that name."""
    return isinstance(module, LoRALayer) and name in module.lora._modules


def is_adapted(model: nn.Module) -> bool:
    """Whether ``model`` has adapted layers."""
    return any(True for _ in adapted_layers(model))


def parameter_of(module: nn.Module, key: str = "weight") -> nn.Parameter:
    """The parameter ``key`` itself; reading the attribute may give its sum with delta."""
    parameter = module._parameters[key]
    assert parameter is not None
    return parameter
