"""A frozen layer on a quantized tensor that gives its input no gradient is named in the first batch, before a step."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_lora import AdapterCallback, LoRACallback, TuneCallback
from lightning_lora.config import LoRAConfig
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.trainer.watching.lost_gradients import LostGradients
from tests.helpers.models import Lit, data, trainer
from tests.helpers.quantized_tensors import quantize


class Quantized(Lit):
    """The layers of its blocks come quantized."""

    def __init__(self, kind: str = "toy") -> None:
        super().__init__()
        quantize(self.net.layers, kind)


class QuantizedLate(Lit):
    def on_fit_start(self) -> None:
        quantize(self.net.layers, "toy")


def fitted(callback: object, module: Lit | None = None) -> Lit:
    module = Quantized() if module is None else module
    trainer(callback, max_steps=2).fit(module, data())
    return module


def test_a_method_that_computes_no_such_gradient_is_refused_by_the_layer_s_name():
    words = (
        r"The weight of `net.layers.\d.\w+` is a DynamicInt8 that gives the input of the layer no gradient, so nothing "
        r"before it would train. Quantize the weights alone, as `Int8WeightOnlyConfig` does, or use LoRACallback"
    )
    with pytest.raises(MisconfigurationException, match=words):
        fitted(AdapterCallback(size=4, placement="parallel"))
    with pytest.raises(MisconfigurationException, match=words):
        fitted(TuneCallback(train="bias"))


def test_the_remedy_of_another_method_trains():
    module = fitted(LoRACallback(r=2, targets=["net.layers.0.q"]))
    assert bool(module.net.layers[0].q.lora.default.B.any())


def test_the_remedy_of_another_config_trains():
    fitted(TuneCallback(train="bias"), Quantized("int8"))


def test_where_no_gradient_is_needed_nothing_is_refused_and_no_hook_stays():
    module = fitted(TuneCallback(train="head"))
    assert not any(layer._forward_pre_hooks for layer in module.modules())


@pytest.mark.filterwarnings("ignore:Set after `setup`")
def test_layers_that_are_quantized_after_the_injection_are_named():
    with pytest.raises(MisconfigurationException, match="Quantize the model in `__init__`, `setup` or `configure_mod"):
        fitted(LoRACallback(r=2, targets=["net.layers.0.q"]), QuantizedLate())


def test_only_layers_whose_library_gives_no_gradient_are_watched():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 128))
    quantize(model, "toy", ("0",))
    watch = LostGradients(model, LoRAMethod(LoRAConfig()))
    assert [bool(layer._forward_pre_hooks) for layer in model] == [True, False, False]
    model(torch.randn(2, 128))  # an input that requires no gradient
    with pytest.raises(MisconfigurationException, match="`0`"):
        model(torch.randn(2, 128, requires_grad=True))
    watch.close()
    model(torch.randn(2, 128, requires_grad=True))
