"""Remedies of messages about strategies that shard, asked of their adapters: two processes run them in other tests."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters
from lightning_lora.layers.base import adapted_layers
from lightning_lora.trainer.strategies.base import states_in
from lightning_lora.trainer.strategies.deepspeed import DeepSpeed
from lightning_lora.trainer.strategies.fsdp import FSDP1, FSDP2
from tests.helpers.models import net
from tests.helpers.remedies.case import Expected, remedy

BASE = "trainer/strategies/base.py"
DEEPSPEED = "trainer/strategies/deepspeed.py"
FSDP = "trainer/strategies/fsdp.py"


def adapted(**arguments: object) -> nn.Module:
    apply_lora(model := net(), LoRAConfig(**{"r": 2, "targets": ["q"], **arguments}))
    return model


def deepspeed(precision: str, **arguments: object) -> DeepSpeed:
    plugin = SimpleNamespace(precision=precision)
    patched = {"save_checkpoint": None, "optimizer_state": None}
    return DeepSpeed(SimpleNamespace(precision_plugin=plugin, config={}, **patched), adapted(**arguments))


@remedy(DEEPSPEED, "`precision={}` under DeepSpeedStrategy", "`precision='bf16-mixed'`", "'32-true', 'bf16-true'")
def a_precision_of_deepspeed(message: Expected, folder: Path) -> None:
    with message:
        deepspeed("bf16-mixed").at_setup(ExitStack())
    for precision in ("32-true", "bf16-true"):
        deepspeed(precision).at_setup(ExitStack())


@remedy(DEEPSPEED, "`{}` would train in bf16", "`head.weight`", "Use precision='32-true'", "`also_train` and `bias`")
def one_dtype_of_what_trains(message: Expected, folder: Path) -> None:
    with message:
        deepspeed("bf16-true", also_train=["head"]).before_wrap(ExitStack())
    deepspeed("32-true", also_train=["head"]).before_wrap(ExitStack())
    deepspeed("bf16-true").before_wrap(ExitStack())


@remedy(DEEPSPEED, "A group of the optimizer holds nothing", "Use one group in `configure_optimizers`, or no scheduler")
def one_group_or_no_scheduler(message: Expected, folder: Path) -> None:
    adapters = [{"params": [parameter for _, parameter in lora_parameters(adapted())]}]
    two, one = torch.optim.AdamW([*adapters, {"params": [nn.Parameter(torch.zeros(1))]}]), torch.optim.AdamW(adapters)
    two.param_groups[1]["params"].clear()
    with message:
        deepspeed("32-true").after_optimizers(ExitStack(), [two], [object()])
    deepspeed("32-true").after_optimizers(ExitStack(), [one], [object()])
    deepspeed("32-true").after_optimizers(ExitStack(), [two], [])


def fsdp1(param_dtype: torch.dtype | None, **arguments: object) -> FSDP1:
    mixed = None if param_dtype is None else SimpleNamespace(param_dtype=param_dtype)
    strategy = SimpleNamespace(mixed_precision=mixed, kwargs={}, root_device=torch.device("cpu"))
    return FSDP1(strategy, adapted(**arguments))


@remedy(FSDP, "`{}` trains in addition to the adapters", "`head.weight`", "precision='bf16-mixed'", "`also_train` and")
def no_cast_of_units(message: Expected, folder: Path) -> None:
    with message:
        fsdp1(torch.bfloat16, also_train=["head"]).before_wrap(ExitStack())
    fsdp1(None, also_train=["head"]).before_wrap(ExitStack())  # autocast casts, and the strategy nothing
    fsdp1(torch.bfloat16).before_wrap(ExitStack())


@remedy(FSDP, "`{}` is split by tensor parallelism", "`layers.0.q.weight`", "tensor_parallel_size=1", "`exclude`")
def layers_that_are_not_split(message: Expected, folder: Path) -> None:
    def split(*dimensions: str, **arguments: object) -> FSDP2:
        model = adapted(**arguments)
        for _, layer in adapted_layers(model) if not arguments else ():
            layer.weight.device_mesh = SimpleNamespace(mesh_dim_names=dimensions)
        return FSDP2(None, model)

    with message:
        split("data_parallel", "tensor_parallel").before_wrap(ExitStack())
    split("data_parallel").before_wrap(ExitStack())
    split("data_parallel", "tensor_parallel", exclude=["layers.0.q"]).before_wrap(ExitStack())


@remedy(BASE, "The checkpoint was saved with weights only", "`save_weights_only=False`")
def a_file_with_the_state_of_optimizers(message: Expected, folder: Path) -> None:
    with message:
        states_in({}, 1)
    assert states_in({"optimizer_states": [{}]}, 1) == [{}]


@remedy(BASE, "The checkpoint holds the state of {}, but", "2 optimizers", "the module has 1", "resume with the `conf")
def a_file_of_as_many_optimizers(message: Expected, folder: Path) -> None:
    with message:
        states_in({"optimizer_states": [{}, {}]}, 1)
    assert len(states_in({"optimizer_states": [{}, {}]}, 2)) == 2
