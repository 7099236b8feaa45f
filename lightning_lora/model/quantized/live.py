"""How quantized layers are prepared while a model has live adapters: gradients must pass through all of them.

Their weights keep the form that has a backward pass, 8-bit codes follow the input to its device, and a bias that trains
has the dtype in which its layer computes before an optimizer sees it.
"""

from __future__ import annotations

from torch import nn

from lightning_lora.layers.quantized.biases import cast_trained_bias
from lightning_lora.layers.quantized.devices import follow_inputs, leave_inputs
from lightning_lora.layers.quantized.formats import is_quantized
from lightning_lora.layers.quantized.packing import keep_for_training, let_pack, packs_for_evaluation
from lightning_lora.model.record import record_of, records
from lightning_lora.targets.survey import Survey


def equip_quantized(survey: Survey) -> None:
    """Called after adapters of the surveyed model became active and its base was frozen."""
    layers = [(name, module) for name, module in survey.modules if is_quantized(module)]
    for _, layer in layers:
        cast_trained_bias(layer)
        follow_inputs(layer)
    packing = [(name, layer) for name, layer in layers if packs_for_evaluation(layer)]
    for _, layer in packing:
        record_of(layer).packs = True
    keep_for_training(packing)


def strip_quantized(model: nn.Module) -> None:
    """The reverse of :func:`equip_quantized`."""
    for module in model.modules():
        leave_inputs(module)
    for _, layer, record in records(model):
        if record.packs:
            record.packs = False
            let_pack(layer)
