"""The verbs for a module and the configuration of any method, without a Trainer."""

from __future__ import annotations

from torch import nn

from lightning_lora.arguments import check_flag
from lightning_lora.config import LoRAConfig, MethodConfig
from lightning_lora.methods.known import method_of
from lightning_lora.model.apply import apply_lora, drop_added
from lightning_lora.model.journal import complete_undo
from lightning_lora.model.record import config_of


def adapt(model: nn.Module, config: MethodConfig) -> list[str]:
    """Adapt ``model`` by the method of ``config``, in place, and freeze the rest: all of it, or nothing.

    Adapting by the same configuration again adds nothing. The global random stream is not used.

    Args:
        model: any module.
        config: of any method, such as LoRAConfig or TuneConfig. ``adapt`` with a LoRAConfig is ``apply_lora``.

    Returns:
        The names of the adapted modules, or of those of which a part trains.

    Raises:
        ValueError: if what ``config`` asks for is not in ``model``, or ``model`` is adapted by another method or
            configuration.
        TypeError: if ``config`` is no configuration.

    Example:
        >>> from lightning_lora import TuneConfig
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> adapt(model, TuneConfig("bias"))
        ['0', '2']
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.bias', '2.bias']
    """
    if isinstance(config, LoRAConfig):
        return apply_lora(model, config)
    method = method_of(config)
    complete_undo(model)
    method.check_same(model)
    return method.complete(model)


def remove_adapted(model: nn.Module, *, keep: bool = False) -> None:
    """Make ``model`` what it was before :func:`adapt`, in place, whatever the method; a plain model stays as it is.

    What was added goes, a merged update too, and trained parameters and buffers get their initial values back.

    Args:
        model: any module.
        keep: leave the values of the base's own parameters and buffers as they are now: what TuneCallback trained is
            then the base. What was added and is not merged goes all the same.

    Raises:
        ValueError: if a merged weight was changed since, so that the base cannot be restored, or what trains is
            partitioned by ZeRO 3.

    Example:
        >>> from lightning_lora import TuneConfig
        >>> model = nn.Linear(4, 2)
        >>> _ = adapt(model, TuneConfig("all"))
        >>> remove_adapted(model)
        >>> [type(module).__name__ for module in model.modules()]
        ['Linear']
    """
    check_flag("keep", keep)
    complete_undo(model)
    config = config_of(model)
    if keep:
        drop_added(model)
    elif config is not None:
        method_of(config).remove(model)
