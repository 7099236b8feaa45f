"""Which parameters of a model are projected, and why some cannot be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from lightning_lora.distributed.sharded import is_split
from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.quantized.formats import is_quantized
from lightning_lora.methods.subspace.config import ALL, SubspaceConfig
from lightning_lora.model.freeze import asked_for
from lightning_lora.names import covers, join, nearest
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor
from lightning_lora.targets.survey import Survey, memory_of

Keys = dict[str, str]  # of the parameters of a module, with the name of the parameter that gives the rows of P


def projected(survey: Survey, config: SubspaceConfig) -> dict[str, Keys]:
    """The parameters that ``config`` means, by the first clean name of their module; tied ones under one name.

    Raises:
        ValueError: if there is none, a pattern matches nothing, or one cannot be projected, with the reason.
    """
    names = _names(survey)
    _check_targets(names.values(), config)
    chosen: dict[str, Keys] = {}
    for site in survey.sites.values():
        for key, parameter in site.module._parameters.items():
            aliases = [] if parameter is None else names[memory_of(site.module, key)]
            if parameter is None or not _is_meant(aliases, config):
                continue
            _check(join(site.name, key), site.module, key)
            if parameter.is_floating_point():
                chosen.setdefault(site.name, {})[key] = aliases[0]
    if not chosen:
        model = type(survey.model).__name__
        raise ValueError(
            f"{model} has no floating parameter to project, apart from those that `exclude` or "
            "`also_train` names. Name parameters in `targets`, or name fewer in these."
        )
    return chosen


def _names(survey: Survey) -> dict[tuple[int, bool], list[str]]:
    """All clean names of each parameter, also under the modules that it is tied to, the first one first."""
    names: dict[tuple[int, bool], list[str]] = {}
    for site in survey.sites.values():
        for key, parameter in site.module._parameters.items():
            if parameter is not None:
                names.setdefault(memory_of(site.module, key), []).extend(join(name, key) for name in site.names)
    return names


def _is_meant(aliases: Sequence[str], config: SubspaceConfig) -> bool:
    targets, exclude = config.targets, config.exclude or ()
    meant = targets == ALL or any(covers(name, targets) for name in aliases)
    return meant and not any(covers(name, exclude) or asked_for(name, True, config) for name in aliases)


def _check_targets(names: Iterable[list[str]], config: SubspaceConfig) -> None:
    every = [name for aliases in names for name in aliases]
    for pattern in () if config.targets == ALL else config.targets:
        if not any(covers(name, [pattern]) for name in every):
            close = ", ".join(f"`{name}`" for name in nearest(pattern, every))
            raise ValueError(
                f"`targets` has {pattern!r}, which matches no module with a parameter, and no parameter. The nearest "
                f"names are {close}."
            )


def _check(name: str, module: nn.Module, key: str) -> None:
    """Raise if the parameter ``key`` of ``module`` cannot be read as the sum.

    Raises:
        ValueError: with the reason.
    """
    if is_lazy(parameter_of(module, key)):
        raise ValueError(
            f"`{name}` has no shape yet, as its module is lazy, and cannot be projected. Run one batch through the "
            "model first."
        )
    if isinstance(module, ScriptModule):
        raise ValueError(
            f"`{name}` is in a compiled TorchScript module, which has no class to replace, and cannot be projected. "
            "Build the model in Python."
        )
    reason = _refusal(module, key)
    if reason is not None:
        outer = name.rpartition(".")[0] or name
        raise ValueError(f"`{name}` cannot be projected: {reason}. Or leave it out, exclude=[{outer!r}].")


def _refusal(module: nn.Module, key: str) -> str | None:
    parameter = parameter_of(module, key)
    if is_quantized_tensor(parameter) or (is_quantized(module) and key == "weight"):
        return "its few bits cannot be summed with P z. Load the model without quantization"
    if is_split(parameter):
        return "FSDP1 or ZeRO 3 keeps it in pieces. Train with DDP or ModelParallelStrategy"
    if "tensor_parallel" in (getattr(getattr(parameter, "device_mesh", None), "mesh_dim_names", None) or ()):
        return "tensor parallelism splits it. Use ModelParallelStrategy(tensor_parallel_size=1)"
    return None
