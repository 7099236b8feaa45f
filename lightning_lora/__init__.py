"""LoRA for any existing LightningModule, by one callback.

``Trainer(callbacks=[LoRACallback(r=8, targets="attn")])`` adapts the module of any Lightning project, with no change to
its code; ``apply_lora(model, LoRAConfig(r=8))`` does the same to any ``nn.Module``, without a Trainer.

The package is a house of rooms, one folder each. A room imports from the rooms below it and never from one above; the
docstring of each room states its rule. From the ground up:

    foreign            names of other libraries that are matched as text, in one file
    patterns           regular expressions over names, matched in bounded time
    names, arguments   names of modules and patterns over them; arguments as plain data
    torch_internals    queries that only private names of torch answer, in one file
    config             LoRAConfig and RunConfig, what the user asks for
    ops                W0 x + scale * B A x on tensors, and the exact sum of a merge
    distributed        what each rank holds and exchanges
    files              bytes on disk: safetensors, JSON, checked files of torch.save, atomic writes
    layers             how A and B act in one kind of layer
    targets            from the user's words to matrices
    model              apply, freeze, merge, unmerge, remove, save: verbs on any nn.Module; the plan and tables (report)
    peft_format        PEFT's directories, read and written
    methods            what a run asks of a method of fine-tuning; a class for each
    analysis           metrics of an update: spectrum, size, subspace, amplification; their plots
    trainer            one run of a Lightning Trainer: callback, checkpointing, watching, strategies
    cli                the command lightning-lora

``LoRACallback`` and ``load_from_checkpoint`` import Lightning at their first use (PEP 562), so the verbs and the
command line start without it. Where Lightning is imported already they are imported at once, as LightningCLI knows the
short name of a class only after its import.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from lightning_lora.config import LoRAConfig
from lightning_lora.methods.adapt import adapt, remove_adapted
from lightning_lora.methods.bottleneck.config import BottleneckConfig
from lightning_lora.methods.bottleneck.segments import use_segments
from lightning_lora.methods.fusion.config import FusionConfig
from lightning_lora.methods.plan import plan
from lightning_lora.methods.prefix.config import PrefixConfig
from lightning_lora.methods.prompt.config import PromptConfig
from lightning_lora.methods.subspace.config import SubspaceConfig
from lightning_lora.methods.tune.config import TuneConfig
from lightning_lora.model.apply import apply_lora, disable_lora, remove_lora
from lightning_lora.model.loading import load_lora_state_dict
from lightning_lora.model.merge import merge_lora, unmerge_lora
from lightning_lora.model.merged_values import merged_state_dict
from lightning_lora.model.report.plan import plan_lora
from lightning_lora.model.several.acting import use_adapters
from lightning_lora.model.several.combine import combine_adapters
from lightning_lora.model.state import lora_parameters, lora_state_dict
from lightning_lora.peft_format.load import load_adapter
from lightning_lora.peft_format.save import save_adapter
from lightning_lora.version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_lora.trainer.adapter_callback import AdapterCallback
    from lightning_lora.trainer.callback import LoRACallback
    from lightning_lora.trainer.checkpointing.from_checkpoint import load_from_checkpoint
    from lightning_lora.trainer.fusion_callback import FusionCallback
    from lightning_lora.trainer.monitor import LoRAMonitor
    from lightning_lora.trainer.prefix_callback import PrefixCallback
    from lightning_lora.trainer.prompt_callback import PromptCallback
    from lightning_lora.trainer.subspace_callback import SubspaceCallback
    from lightning_lora.trainer.tune_callback import TuneCallback

__all__ = [
    "AdapterCallback",
    "BottleneckConfig",
    "FusionCallback",
    "FusionConfig",
    "LoRACallback",
    "LoRAConfig",
    "LoRAMonitor",
    "PrefixCallback",
    "PrefixConfig",
    "PromptCallback",
    "PromptConfig",
    "SubspaceCallback",
    "SubspaceConfig",
    "TuneCallback",
    "TuneConfig",
    "adapt",
    "apply_lora",
    "combine_adapters",
    "disable_lora",
    "load_adapter",
    "load_from_checkpoint",
    "load_lora_state_dict",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "merged_state_dict",
    "plan",
    "plan_lora",
    "remove_adapted",
    "remove_lora",
    "save_adapter",
    "unmerge_lora",
    "use_adapters",
    "use_segments",
]

_NEEDS_LIGHTNING = {
    "AdapterCallback": "lightning_lora.trainer.adapter_callback",
    "FusionCallback": "lightning_lora.trainer.fusion_callback",
    "LoRACallback": "lightning_lora.trainer.callback",
    "LoRAMonitor": "lightning_lora.trainer.monitor",
    "PrefixCallback": "lightning_lora.trainer.prefix_callback",
    "PromptCallback": "lightning_lora.trainer.prompt_callback",
    "SubspaceCallback": "lightning_lora.trainer.subspace_callback",
    "TuneCallback": "lightning_lora.trainer.tune_callback",
    "load_from_checkpoint": "lightning_lora.trainer.checkpointing.from_checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_LIGHTNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_NEEDS_LIGHTNING[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if {"lightning.pytorch", "pytorch_lightning"} & sys.modules.keys():
    for _name in _NEEDS_LIGHTNING:
        __getattr__(_name)
