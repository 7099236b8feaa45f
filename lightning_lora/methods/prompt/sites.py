"""The blocks that a prompt passes, and why it cannot pass others."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lora.layers.adapted import Adapted, not_swappable
from lightning_lora.layers.registry import is_convolution, is_pointwise
from lightning_lora.methods.prompt.arguments import OF_POSITIONS, POSITION_TABLE
from lightning_lora.methods.prompt.config import PromptConfig
from lightning_lora.names import covers, join
from lightning_lora.targets.attention_kernel import KernelSizes, kernel_sizes
from lightning_lora.targets.blocks import Sublayer, sublayers_in
from lightning_lora.targets.problems import raise_refusals
from lightning_lora.targets.role_names import around, parent
from lightning_lora.targets.roles import attention_blocks
from lightning_lora.targets.survey import Survey


@dataclass(frozen=True)
class Place:
    """A block that a prompt passes.

    Args:
        features: of a prompt that begins here; 0 elsewhere.
        first: whether the prompt begins here.
        last: whether it ends here.
    """

    features: int
    first: bool
    last: bool


def find_places(survey: Survey, config: PromptConfig) -> dict[str, Place]:
    """The blocks that a prompt passes, by name and in the model's order.

    Raises:
        ValueError: if there is none, or one that a prompt cannot pass, with the reason.
    """
    blocks = sublayers_in(survey).blocks
    numbered = [block for block in blocks if block.output.rpartition(".")[2].isdigit()]
    blocks = numbered or [block for block in blocks if block.output]  # without a head that pools by attention
    if not blocks:
        raise ValueError(
            f"A prompt needs transformer blocks, and none was found in {type(survey.model).__name__}. "
            "LoRACallback(targets='all') adapts the linear layers of any model."
        )
    chosen = [block for block in blocks if not _left_out(block.output, survey, config)]
    if not chosen:
        by = [f"`{key}={value!r}`" for key in ("exclude", "also_train") if (value := getattr(config, key))]
        raise ValueError(f"All blocks of {type(survey.model).__name__} are left out by {' and '.join(by)}.")
    places = _deep(chosen) if config.deep else _through_stacks(chosen, survey)
    reasons = {block.output: block.refusal for block in chosen}
    positions = _positions_by_stack({*places, *(block.output for block in blocks)}, survey)
    raise_refusals(
        {name: reasons.get(name) or positions[parent(name)] or _refusal(name, survey, config) for name in places}
    )
    return places


def _left_out(name: str, survey: Survey, config: PromptConfig) -> bool:
    patterns = [*(config.exclude or ()), *(config.also_train or ())]
    return any(covers(alias, patterns) for alias in survey.sites[name].names)


def _deep(blocks: list[Sublayer]) -> dict[str, Place]:
    return {block.output: Place(block.features, True, True) for block in blocks}


def _through_stacks(blocks: list[Sublayer], survey: Survey) -> dict[str, Place]:
    """From the first to the last block with attention of each stack; a stack is a list of modules."""
    stacks: dict[str, list[Sublayer]] = {}
    for block in blocks:
        stacks.setdefault(parent(block.output), []).append(block)
    places: dict[str, Place] = {}
    for stack, members in stacks.items():
        first, last = members[0], members[-1]
        between = _from_to(stack, first.output, last.output, survey)
        for name in between:
            begins = name == first.output
            places[name] = Place(first.features if begins else 0, begins, name == last.output)
    return places


def _from_to(stack: str, first: str, last: str, survey: Survey) -> list[str]:
    """The modules of the list ``stack`` from ``first`` to ``last``, those without attention too."""
    members = [name for name in survey.by_name if name and parent(name) == stack]
    if not isinstance(survey.by_name[stack], (nn.ModuleList, nn.Sequential)):
        return [name for name in members if name in (first, last)]
    return members[members.index(first) : members.index(last) + 1]


def _refusal(name: str, survey: Survey, config: PromptConfig) -> str | None:
    """Why a prompt cannot pass the block, as the end of a sentence about it; ``None`` where it can."""
    block = survey.by_name[name]
    if isinstance(block, Adapted):
        return None
    convolution = next(
        (key for key, module in block.named_modules() if is_convolution(module) and not is_pointwise(module)), None
    )
    if convolution is not None:
        return f"has a convolution, `{convolution}`, which would mix the prompt with the tokens"
    skipping = None if config.deep else _skips(name, survey)
    if skipping is not None:
        return (
            f"may be skipped in training, as `layerdrop` of {skipping} is not 0, and a prompt must pass every block: "
            "set that to 0, or take deep=True"
        )
    return not_swappable(block, "prompt")


def _positions_by_stack(blocks: Collection[str], survey: Survey) -> dict[str, str | None]:
    """For each stack why a prompt cannot pass it, if one of its blocks computes positions, which others may use."""
    reasons: dict[str, str | None] = {parent(name): None for name in blocks}
    for name, module in survey.by_name.items():
        if name in blocks and reasons[parent(name)] is None and not isinstance(module, Adapted):
            inner = next(_inner_positions(module), None)
            if inner is not None:
                reason = f"gets positions that are computed in a block, by `{join(name, inner)}`"
                reasons[parent(name)] = f"{reason}; the prompt would shift them"
    return reasons


def _inner_positions(block: nn.Module) -> Iterator[str]:
    for name, module in block.named_modules():
        if OF_POSITIONS.search(name.rpartition(".")[2]) or (name and OF_POSITIONS.search(type(module).__name__)):
            yield name
        for key in (*module._parameters, *module._buffers):
            if OF_POSITIONS.search(key) or POSITION_TABLE.fullmatch(key):
                yield f"{name}.{key}".lstrip(".")


def _skips(name: str, survey: Survey) -> str | None:
    """The class of the module that may skip the block in training."""
    for outer in around(name):
        module = survey.by_name.get(outer)
        for holder in (module, getattr(module, "config", None)):
            if isinstance(share := getattr(holder, "layerdrop", None), float) and share > 0:
                return type(holder).__name__
    return None


def facts_of(name: str, block: nn.Module, survey: Survey) -> dict[str, Any]:
    """What :class:`~lightning_lora.methods.prompt.layer.Passage` must know of a plain ``block``."""
    inside = list(block.modules())
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    caches = [index for module in inside if isinstance(index := getattr(module, "layer_idx", None), int)]
    multihead = [module for module in inside if isinstance(module, nn.MultiheadAttention)]
    first_of_stack = next(key for key in survey.by_name if key and parent(key) == parent(name)) == name
    return {
        "names": [parameter.name for parameter in parameters if parameter.kind in by_position],
        "causal": any(getattr(module, "is_causal", False) is True for module in inside),
        "visible": False if multihead else True if _calls_kernel(block) else None,
        "dim": 0 if multihead and not multihead[0].batch_first else 1,
        "limit": min((size for module in inside for size in _tables(module)), default=None),
        "cache_layer": (caches or [0])[0] if first_of_stack else None,
    }


def _calls_kernel(block: nn.Module) -> bool:
    """Whether attention in ``block`` gives its masks to torch's kernel, for which True shows a key."""
    attention = attention_blocks(Survey(block)).values()
    return any(isinstance(kernel_sizes(inner), KernelSizes) for inner in attention)


def _tables(module: nn.Module) -> Iterator[int]:
    """The sizes of buffers with a row and a column for every position, such as a causal mask."""
    for buffer in module._buffers.values():
        if buffer is not None and buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1:
            yield buffer.shape[-1]
