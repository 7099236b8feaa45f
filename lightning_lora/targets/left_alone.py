"""What the preset ``"all"`` leaves alone, in a line for people: recurrent layers, and convolutions that matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.distributed.sharded import shape_of
from lightning_lora.layers.registry import is_convolution, original_class
from lightning_lora.names import counted
from lightning_lora.targets.survey import Survey

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
SMALL = 0.05  # a share of the adapted weights: the patch embedding of a vision transformer is smaller


def left_alone(survey: Survey, adapted: Collection[str], config: LoRAConfig) -> list[str]:
    """A line that counts the layers which ``"all"`` does not mean, and names one as a target.

    Args:
        survey: of the model.
        adapted: the names of the adapted modules.
        config: what is adapted.
    """
    if "all" not in ([config.targets] if isinstance(config.targets, str) else config.targets):
        return []
    rest = {name: module for name, module in survey.by_name.items() if name and name not in adapted}
    recurrent = [name for name, module in rest.items() if isinstance(module, RECURRENT)]
    convolutions = [name for name, module in rest.items() if is_convolution(module)]
    if _size(convolutions, survey) < SMALL * _size(adapted, survey):
        convolutions = []
    if not recurrent and not convolutions:
        return []
    counts = Counter(original_class(rest[name]).__name__ for name in recurrent)
    parts = [f"{count} {kind}" for kind, count in counts.items()]
    parts += [counted(len(convolutions), "convolution")] if convolutions else []
    first = [*recurrent, *convolutions][0]
    return [
        f"'all' means linear layers: {', '.join(parts)} left alone. To adapt them name them: targets=['all', {first!r}]"
    ]


def _size(names: Collection[str], survey: Survey) -> int:
    modules = [survey.by_name[name] for name in names if name in survey.by_name]
    return sum(shape_of(p).numel() for module in modules for p in module._parameters.values() if p is not None)
