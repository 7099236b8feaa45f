"""What a model has while its adapters are live comes and goes as a whole."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, apply_lora, merge_lora, remove_lora, unmerge_lora
from lightning_lora.model.hooks import equip, strip
from lightning_lora.targets.survey import Survey

CONFIG = LoRAConfig(r=2, targets=["fc"])


class Checkpointed(nn.Module):
    """Reentrant checkpointing after a layer that is frozen; one parameter is frozen by the user."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(4, 4), nn.Linear(4, 4)
        self.fc.bias.requires_grad_(False)

    def forward(self, index):
        return checkpoint(self.fc, self.embed(index), use_reentrant=True)


def facts(model: nn.Module) -> dict[str, tuple[bool, int, int]]:
    """Flags of the base, and the number of hooks of each kind by module."""
    flags = {name: p.requires_grad for name, p in model.named_parameters() if "lora" not in name}
    hooks = {n: (len(m._forward_hooks), len(m._load_state_dict_post_hooks)) for n, m in model.named_modules()}
    return {"flags": flags, **{name: count for name, count in hooks.items() if "lora" not in name}}


LIVE = {
    "flags": {"embed.weight": False, "fc.weight": False, "fc.bias": False},
    "": (0, 1),
    "embed": (1, 0),
    "fc": (0, 0),
}
PLAIN = {
    "flags": {"embed.weight": True, "fc.weight": True, "fc.bias": False},
    "": (0, 0),
    "embed": (0, 0),
    "fc": (0, 0),
}


def test_each_verb_equips_or_strips():
    model = Checkpointed()
    assert facts(model) == PLAIN
    apply_lora(model, CONFIG)
    assert facts(model) == LIVE
    merge_lora(model)
    assert facts(model) == PLAIN
    unmerge_lora(model)
    assert facts(model) == LIVE
    remove_lora(model)
    assert facts(model) == PLAIN


def test_strip_undoes_equip_however_often_it_was_called():
    model = Checkpointed()
    apply_lora(model, CONFIG)
    strip(model)
    assert facts(model) == PLAIN
    equip(model, CONFIG)
    equip(Survey(model), CONFIG)
    assert facts(model) == LIVE
    strip(model)
    strip(model)
    assert facts(model) == PLAIN


def test_adapters_train_only_while_it_is_equipped():
    model, index = Checkpointed(), torch.arange(4)
    apply_lora(model, CONFIG)
    model(index).sum().backward()
    assert model.fc.lora["default"].B.grad is not None
    assert model.embed.weight.grad is None
