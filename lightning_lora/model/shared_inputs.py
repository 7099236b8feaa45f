"""Which layers are asked to share what they make of an input."""

from __future__ import annotations

from torch import nn

from lightning_lora.distributed.sharded import shape_of
from lightning_lora.layers.linear import LinearAdapter, LoRALinear
from lightning_lora.ops.shared_input import SharedInputGroup
from lightning_lora.targets.roles import family_of


def join_siblings(model: nn.Module) -> None:
    """Tell the adapters of each module's linear maps which others of its maps read the same input."""
    for parent in model.modules():
        found: dict[tuple[str, str, int], list[LinearAdapter]] = {}
        for name, child in parent.named_children():
            family = family_of(name)
            if family is None or not isinstance(child, LoRALinear):
                continue
            for adapter_name, adapter in child.lora.items():
                if isinstance(adapter, LinearAdapter):  # not some rows of the map alone
                    found.setdefault((family, adapter_name, shape_of(adapter.A)[-1]), []).append(adapter)
        for adapters in found.values():
            siblings = SharedInputGroup(adapters) if len(adapters) > 1 else None
            for adapter in adapters:
                adapter.shared_input = siblings
