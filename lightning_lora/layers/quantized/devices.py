"""Where an 8-bit layer of bitsandbytes keeps its codes: on the device of its input, also after the model was moved.

Its first call takes the codes off the parameter, and ``model.to`` moves parameters and buffers alone. So the codes stay
on the GPU where a Trainer moves the model to the CPU after a run, and a call there reads memory of the other device.

In evaluation on a CPU it writes into an fp16 input: it sets outliers to zero, and puts them back. Autograd takes that
for a change of a tensor that another layer or an adapter saved, and backward raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.quantized.formats import is_8bit


class FollowInput:
    """A forward pre-hook: codes and scales go to the device of the input, and no layer writes into its input."""

    def __call__(self, layer: Any, args: Any) -> Any:
        """Move them, where they are elsewhere; give the layer a copy of an input that it would write into."""
        weight = layer._parameters["weight"]
        owner = layer.state if getattr(weight, "CB", None) is None else weight
        device = args[0].device if args else weight.device
        for key in ("CB", "SCB"):
            value = getattr(owner, key, None)
            if value is not None and value.device != device:
                setattr(owner, key, value.to(device))
        return (args[0].clone(), *args[1:]) if args and _writes_into(layer, args[0]) else None


def _writes_into(layer: Any, x: Tensor) -> bool:
    """Whether a call of ``layer`` would write into its input ``x`` while autograd records."""
    if layer.training or x.is_cuda:  # other code of bitsandbytes, which reads alone
        return False
    return x.dtype == torch.float16 and layer.state.threshold > 0 and torch.is_grad_enabled()


def follow_inputs(layer: nn.Module) -> None:
    """Let the codes of ``layer``, if it is one of 8 bits, follow its input."""
    if is_8bit(layer) and not any(isinstance(hook, FollowInput) for hook in layer._forward_pre_hooks.values()):
        layer.register_forward_pre_hook(FollowInput())


def leave_inputs(layer: nn.Module) -> None:
    """Remove the hook of :func:`follow_inputs`."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if isinstance(hook, FollowInput):
            del layer._forward_pre_hooks[key]
