"""What ``"attn"``, ``"qv"``, ``"mlp"`` and ``"all"`` mean on a model."""

from __future__ import annotations

from torch import nn

from lightning_lora.targets.roles import is_fused, is_query_or_value, roles_in, unique


def preset(model: nn.Module, which: str) -> dict[str, tuple[str, ...] | None]:
    """The names that the preset ``which`` chooses in ``model``, each with the matrices to take if that is not all."""
    roles = roles_in(model)
    if which == "qv":
        cut = {name for name in roles.attention if is_fused(name) or name in roles.whole}
        chosen = [name for name in roles.attention if name in cut or is_query_or_value(name)]
        return {name: ("q", "v") if name in cut else None for name in chosen}
    if which == "all":
        out = set(roles.heads) | set(roles.routers)
        found = {*roles.linear, *roles.attention, *roles.experts} - out
        return dict.fromkeys([name for name in unique(model) if name in found] or roles.convolutions)
    return dict.fromkeys(roles.attention if which == "attn" else roles.mlp + roles.experts)
