"""Which layers are MLPs: by their names, and by their place in the blocks that repeat around attention."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lightning_lora.layers.registry import is_convolution, is_linear, is_pointwise
from lightning_lora.targets.role_names import MLP, OTHER_MIXER, any_token, around, inside, numbered, parent, tokens


def mlp_layers(
    layers: list[str], attention: Collection[str], owners: list[str], modules: dict[str, nn.Module]
) -> list[str]:
    """Those of ``layers`` that belong to an MLP.

    Args:
        layers: linear layers and pointwise convolutions that have no other role.
        attention: the layers of attention.
        owners: the modules that own these.
        modules: the modules of the model by name.
    """
    called = {name for name in layers if any_token(name.split("."), MLP) or _follows_intermediate(name, modules)}
    blocks = _blocks(attention, owners, modules)
    nameless = {outer for owner in owners if not numbered(owner) for outer in (owner, *around(owner)[-2:])} - {""}
    if not blocks:  # one block without a number, or none
        blocks, nameless = {parent(owner) for owner in owners} - {""}, {""}
    apart = _in_convolution_modules(layers, blocks, modules)

    def by_name(name: str) -> bool:
        return name in called and bool(numbered(name) or nameless == {""} or inside(name, nameless))

    def by_place(name: str) -> bool:
        return inside(name, blocks) and name not in apart and not any_token(name.split("."), OTHER_MIXER)

    return [name for name in layers if by_place(name) or (is_linear(modules[name]) and by_name(name))]


def _blocks(attention: Collection[str], owners: list[str], modules: dict[str, nn.Module]) -> set[str]:
    """The numbered modules around attention: transformer blocks.

    Where attention and MLP are entries of one list, as in ``layers.0.0`` and ``layers.0.1``, that list is the block.
    """
    others = [name for name, module in modules.items() if is_linear(module) or is_pointwise(module)]
    busy = {outer for name in others if name not in attention for outer in around(name)}
    blocks = set()
    for owner in owners:
        block = numbered(owner)
        if block and block not in busy and parent(block).rpartition(".")[2].isdigit():
            block = parent(block)
        blocks.add(block)
    return blocks - {""}


def _in_convolution_modules(layers: list[str], blocks: set[str], modules: dict[str, nn.Module]) -> set[str]:
    """Those of ``layers`` in blocks that lie in one branch with a wider convolution, as in a Conformer.

    A branch that is called MLP is one, though it may hold a depthwise convolution.
    """
    wide = [name for name, module in modules.items() if is_convolution(module) and not is_pointwise(module)]
    holders, direct = {outer for name in wide for outer in around(name)}, {parent(name) for name in wide}
    apart = set()
    for name in layers:
        block = next((outer for outer in reversed(around(name)) if outer in blocks), None)
        branch = tokens(name, block)[0] if block is not None else ""
        if branch and not MLP.fullmatch(branch) and (f"{block}.{branch}" in holders or parent(name) in direct):
            apart.add(name)
    return apart


def _follows_intermediate(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether ``name`` lies in ``output``, and ``intermediate`` in the same module: BERT's second MLP layer."""
    outputs = [container for container in around(name) if container.rpartition(".")[2] == "output"]
    return any("intermediate" in modules[parent(container)]._modules for container in outputs)
