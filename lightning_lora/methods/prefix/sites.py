"""The attention blocks that get a prefix, the sizes of their heads, and why a block cannot have one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_lora.foreign import ATTENTION_SWITCH, EAGER, FUSED_SWITCH, SDPA, SUPPORTS_SDPA
from lightning_lora.layers.adapted import Adapted, not_swappable
from lightning_lora.methods.prefix.config import ATTENTION, PrefixConfig
from lightning_lora.names import covers, nearest
from lightning_lora.targets.attention_kernel import WITHOUT_KERNEL, KernelSizes, kernel_sizes
from lightning_lora.targets.problems import raise_refusals
from lightning_lora.targets.role_names import around
from lightning_lora.targets.roles import attention_blocks
from lightning_lora.targets.survey import Survey


def find_sites(survey: Survey, config: PrefixConfig) -> dict[str, KernelSizes | None]:
    """The blocks that get a prefix by name, with the sizes of their heads; ``None`` for a block that has one.

    Raises:
        ValueError: if there is none, or one that cannot have a prefix, with the reason.
    """
    sites = _chosen(survey, config)
    found = {name: _sizes(name, survey) for name in sites}
    sizes = {name: result for name, result in found.items() if not isinstance(result, str)}
    raise_refusals({name: result if isinstance(result, str) else None for name, result in found.items()})
    return sizes


def _chosen(survey: Survey, config: PrefixConfig) -> list[str]:
    blocks = attention_blocks(survey)
    if not blocks:
        raise ValueError(
            f"A prefix needs attention blocks, and none was found in {type(survey.model).__name__}. "
            "LoRACallback(targets='all') adapts the linear layers of any model."
        )
    names = {name: survey.sites[name].names for name in blocks}
    _check_matched([] if config.targets == ATTENTION else config.targets, names)
    left_out = [*(config.exclude or ()), *(config.also_train or ())]
    chosen = [
        name
        for name in blocks
        if (config.targets == ATTENTION or _covered(names[name], config.targets))
        and not _covered(names[name], left_out)
    ]
    if not chosen:
        by = [f"`{key}={value!r}`" for key in ("exclude", "also_train") if (value := getattr(config, key))]
        raise ValueError(f"`targets={config.targets!r}` finds only blocks that {' or '.join(by)} leave out.")
    return chosen


def _check_matched(patterns: Iterable[str], names: Mapping[str, list[str]]) -> None:
    for pattern in patterns:
        if not any(_covered(aliases, [pattern]) for aliases in names.values()):
            close = ", ".join(f"`{name}`" for name in nearest(pattern, names))
            raise ValueError(
                f"`targets` has {pattern!r}, which matches no attention block and no module around one. The nearest "
                f"blocks are {close}."
            )


def _covered(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(covers(name, patterns) for name in names)


def _sizes(name: str, survey: Survey) -> KernelSizes | str | None:
    """The sizes of the heads of a block, or why they are not known or of no use, as the end of a sentence about it."""
    block = survey.by_name[name]
    if isinstance(block, Adapted):
        return None
    reason = not_swappable(block, "prefix")
    if reason is not None:
        return reason
    if is_plain_multihead(block):
        assert isinstance(block, nn.MultiheadAttention)
        heads, features = int(block.num_heads), int(block.head_dim)
        return KernelSizes(heads, features, features)
    if _implementation(block) not in (None, SDPA, EAGER):  # other kernels need a device or a compiler to run
        return _remedy(name, survey) or f"{WITHOUT_KERNEL}, where a prefix cannot act"
    sizes = kernel_sizes(block)
    if isinstance(sizes, KernelSizes):
        return sizes
    return _remedy(name, survey) or (f"{sizes}, where a prefix cannot act" if sizes is WITHOUT_KERNEL else sizes)


def _implementation(block: nn.Module) -> Any:
    """The word of transformers for how ``block`` computes attention; ``None`` for other blocks."""
    return getattr(getattr(block, "config", None), ATTENTION_SWITCH, None)


def is_plain_multihead(block: nn.Module) -> bool:
    """Whether ``block`` computes as ``nn.MultiheadAttention``."""
    return isinstance(block, nn.MultiheadAttention) and type(block).forward is nn.MultiheadAttention.forward


def _remedy(name: str, survey: Survey) -> str | None:
    """Why the block does not call the kernel, where a switch that was tried on a copy of it helps, or none exists."""
    block, model = survey.by_name[name], _model_of_transformers(name, survey)
    if getattr(block, FUSED_SWITCH, None) is False and _has_sizes(block, **{FUSED_SWITCH: True}):
        return f"{WITHOUT_KERNEL}, where a prefix cannot act: set its attribute `{FUSED_SWITCH}` to True"
    if model is None:
        return None
    if not getattr(model, SUPPORTS_SDPA):
        return f"lies in a {type(model).__name__}, for which transformers has no attn_implementation={SDPA!r}"
    implementation = _implementation(block)
    if implementation in (None, SDPA):
        return None
    switched: Any = copy.copy(block.config)
    vars(switched)[ATTENTION_SWITCH] = SDPA
    if not _has_sizes(block, config=switched):
        return None
    return (
        f"computes attention by attn_implementation={implementation!r}, where a prefix cannot act: load the model with "
        f"attn_implementation={SDPA!r}, or call `model.set_attn_implementation({SDPA!r})`"
    )


def _has_sizes(block: nn.Module, **attributes: Any) -> bool:
    return isinstance(kernel_sizes(block, **attributes), KernelSizes)


def _model_of_transformers(name: str, survey: Survey) -> nn.Module | None:
    """The nearest model of transformers that the block lies in."""
    models = [module for outer in around(name) if hasattr(module := survey.by_name.get(outer), SUPPORTS_SDPA)]
    return models[-1] if models else None
