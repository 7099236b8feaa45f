"""Output heads that stay frozen with random weights: a checkpoint holds no frozen weight, so it cannot be loaded again.

Fresh weights differ from loaded ones in what training does not leave: weights spread evenly up to the very bound from
which ``nn.Linear`` draws them, or a bias of zeros and weights of just the spread that libraries draw.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.distributed.sharded import is_sharded
from lightning_lora.layers.base import LoRALayer
from lightning_lora.model.freeze import in_files
from lightning_lora.model.report.summary import output_heads
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor

SAMPLE = 1 << 16  # elements that are looked at; a language model's head has hundreds of millions
DRAWN = (0.02, 0.01)  # standard deviations that transformers, timm and torchvision draw heads with
MANY = 1 << 10  # elements whose spread alone tells that they were drawn
STEPS = 1 << 24
SPREAD = 4.0  # standard deviations in which the mean square of drawn weights lies


def random_heads(model: nn.Module) -> list[str]:
    """The output heads of ``model`` that no one trains and whose weights look as their layer draws them.

    A copy of a layer that trains is the head of a teacher or a reference, and frozen on purpose.
    """
    trained = {id(parameter) for _, parameter in in_files(model)}
    modules = dict(names.named_modules(model))
    random = [name for name in output_heads(model) if _is_frozen(modules[name], trained) and is_random(modules[name])]
    copies = {name: _equal_layers(name, modules) for name in random}
    frozen = [name for name in random if all(_is_frozen(modules[copy], trained) for copy in copies[name])]
    return [name for place, name in enumerate(frozen) if copies[name].isdisjoint(frozen[:place])]


def _equal_layers(name: str, modules: dict[str, nn.Module]) -> set[str]:
    """The names of the other layers whose weight is bit-equal to that of ``modules[name]``."""
    weight = modules[name]._parameters["weight"]
    assert weight is not None
    equal = set()
    for other, module in modules.items():
        value = module._parameters.get("weight")
        if value is None or value is weight or _has_no_values(value) or value.shape != weight.shape:
            continue
        if value.dtype == weight.dtype and value.device == weight.device and same_bits(value, weight):
            equal.add(other)
    return equal


def _is_frozen(module: nn.Module, trained: set[int]) -> bool:
    return not isinstance(module, LoRALayer) and id(module._parameters.get("weight")) not in trained


@torch.no_grad()
def is_random(module: nn.Module) -> bool:
    """Whether the weights of a linear layer look as if they were never trained nor loaded.

    Example:
        >>> is_random(nn.Linear(64, 10))
        True
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.ndim != 2 or any(_has_no_values(p) for p in (weight, bias) if p is not None):
        return False
    sample, (outputs, inputs) = weight.reshape(-1)[:SAMPLE].float(), weight.shape
    if bias is not None and not bool(bias.any()):
        return not bool(sample.any()) or any(_spread_is(sample, std) for std in (*DRAWN, *_scaled(inputs, outputs)))
    bound = 1 / math.sqrt(inputs)
    limit = bound * (1 + 2 * torch.finfo(weight.dtype).eps)  # drawn in half precision, a value may be rounded up
    inside = all(bool((values.abs() <= limit).all()) for values in (sample, bias) if values is not None)
    drawn = _can_be_drawn(sample, inputs) if weight.dtype == torch.float32 else sample.numel() >= MANY
    return inside and drawn and _spread_is(sample, bound / math.sqrt(3))


def _can_be_drawn(sample: Tensor, inputs: int) -> bool:
    """Whether ``nn.Linear`` can draw each of these values on a CPU.

    It draws one of 2^24 numbers and scales it, with one rounding or two. Near zero that leaves most floating-point
    numbers out, so training leaves hardly any small weight where it could be drawn.
    """
    high = torch.tensor(math.sqrt(3) * nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / math.sqrt(inputs))
    low, width = -high, high + high
    values = sample.double().cpu()
    steps = ((values - low) / width * STEPS).round()
    once = [((steps + shift) / STEPS * width.double() + low.double()).float() for shift in (-1, 0, 1)]
    twice = [((steps + shift) / STEPS * width.double()).float() + low for shift in (-1, 0, 1)]
    return bool(torch.stack([drawn == values.float() for drawn in (*once, *twice)]).any(0).all())


def _scaled(inputs: int, outputs: int) -> tuple[float, ...]:
    """The standard deviations of the initializations of LeCun and of Glorot, and that of ``nn.Linear``."""
    return 1 / math.sqrt(inputs), math.sqrt(2 / (inputs + outputs)), 1 / math.sqrt(3 * inputs)


def _spread_is(sample: Tensor, std: float) -> bool:
    """Whether the mean square of ``sample`` is that of values drawn with the standard deviation ``std``."""
    return abs(float(sample.square().mean()) / std**2 - 1) <= SPREAD * math.sqrt(2 / sample.numel())


def _has_no_values(parameter: nn.Parameter) -> bool:
    stores_codes = is_quantized_tensor(parameter) or not parameter.is_floating_point()
    return parameter.is_meta or is_sharded(parameter) or stores_codes or not parameter.numel()


def warning_of(heads: list[str]) -> str:
    """What it costs that ``heads`` stay frozen with random weights, and the two ways out."""
    shown = ", ".join(f"`{name}`" for name in heads)
    return (
        f"Frozen output {'head' if len(heads) == 1 else 'heads'} {shown}: the weights look as if they were just drawn. "
        "Nothing trains them and no checkpoint holds them, so one of this run loads only where the same weights are "
        f"drawn again. To train and save them: also_train={heads!r}. To keep them frozen save the base before `fit`, "
        "torch.save(module.state_dict(), path), and load by load_from_checkpoint(cls, checkpoint, base=path)."
    )
