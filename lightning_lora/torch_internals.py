"""Questions about the state of torch that only its private names answer.

This is the only file of the package that names ``torch._C``: a release of torch that renames one of these is met here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

# These are asked in every forward and backward of every layer, so they are torch's own functions.
in_functorch_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active  # vmap, grad, batched gradients
flattened: Callable[[list[Tensor]], Tensor] = torch._C._nn.flatten_dense_tensors  # one after the other, as one vector
count_of_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
tracing_state: Callable[[], Any] = torch._C._get_tracing_state  # ``None`` outside of ``torch.jit.trace``
any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled  # for any type of device
_version = attrgetter("_version")

GLOBAL_HOOKS = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)


def backward_id() -> int:
    """The number of the backward pass that runs now in this thread; -1 outside of one."""
    return torch._C._current_graph_task_id()


def call_after_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` once, at the end of the backward pass that runs now."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def saved_tensors_have_hooks() -> bool:
    """Whether tensors saved for backward are packed by hooks: activation checkpointing, or offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def versions_of(*tensors: Tensor) -> tuple[int, ...]:
    """:func:`version_of` each of ``tensors``."""
    try:
        return tuple(map(_version, tensors))
    except RuntimeError:
        return tuple(map(version_of, tensors))


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was written in place; -1 for an inference tensor, which has no count."""
    return -1 if tensor.is_inference() else tensor._version


def factors_of_product(x: Tensor) -> tuple[Tensor | None, Tensor | None] | None:
    """The two tensors that ``x`` was multiplied from, as autograd saved them; ``None`` if no product made ``x``.

    Raises:
        RuntimeError: if one of them was changed in place since.
    """
    node: Any = x.grad_fn
    if node is None or node.name() != "MulBackward0":
        return None
    return node._saved_self, node._saved_other


def has_tensor_hooks(tensor: Tensor) -> bool:
    """Whether a hook waits for the gradient of ``tensor``."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def is_batched(gradient: Tensor) -> bool:
    """Whether backward computes a batch of gradients at once, of which ``gradient`` may be one."""
    if torch.compiler.is_compiling():  # which does not know the second question
        return torch._C._are_functorch_transforms_active()
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(gradient)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its questions about ``torch.func``, which take a tenth of a small layer's time."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def is_transformed() -> bool:
    """Whether something other than autograd and autocast sees the operations that run now."""
    return (
        in_functorch_transform()
        or count_of_dispatch_modes() > 0
        or tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def cuda_stream_id(device: torch.device) -> int:
    """The CUDA stream that ``device`` works on now, without making an object for it."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph records what is computed on the device of ``tensor``."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def count_of_hooks() -> int:
    """How many hooks of modules and of tensors were registered so far, anywhere: an equal number means no new hook."""
    return RemovableHandle.next_id


def has_module_hooks(module: nn.Module) -> bool:
    """Whether a hook of its own or a global one runs when ``module`` is called."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or any(GLOBAL_HOOKS)


def hooks_of(module: nn.Module) -> list[object]:
    """What holds the hooks of ``module``, to ask of many modules at once whether one of them has any."""
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]


def checkpoint_of_saved_tensors() -> object:
    """The activation checkpoint that packs tensors saved for backward now; ``None`` outside of one.

    A reentrant checkpoint packs nothing: it runs without gradients.
    """
    if torch.compiler.is_compiling():
        return None
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint" else None


def running_checkpoints() -> tuple[list[Any], Any]:
    """The activation checkpoints whose first forward runs now, and the one around them that runs it again.

    Each is an object of torch's that is the same in both forwards, and to which attributes can be given.

    Returns:
        The former, innermost first, and the latter, or ``None``.
    """
    begun: list[Any] = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == torch.utils.checkpoint.__file__:
            if code.co_name == "checkpoint" and "gen" in frame.f_locals:
                begun.append(frame.f_locals["gen"].gi_frame.f_locals["new_frame"])
            elif code.co_name == "forward":
                begun.append(frame.f_locals["ctx"])
            elif code.co_name in ("unpack_hook", "backward"):
                return begun, frame.f_locals["frame" if code.co_name == "unpack_hook" else "ctx"]
        frame = frame.f_back  # type: ignore[assignment]
    return begun, None
