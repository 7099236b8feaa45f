"""A quantized base under the strategies: right, or refused before the first step with a remedy that works."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_lora import LoRACallback
from lightning_lora.trainer.strategies.ddp import DDP
from lightning_lora.trainer.strategies.quantized import check_flat_codes, check_sharded_tensors
from tests.helpers.models import data, trainer
from tests.helpers.quantized_tensors import DynamicInt8
from tests.helpers.scripts import run_script

pytest.importorskip("bitsandbytes")

from tests.helpers.quantized import Wide, four_bits


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of all runs of two processes, and what each rank noted of them."""
    folder = tmp_path_factory.mktemp("quantized")
    done = run_script("quantized_two_processes.py", folder)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder, [torch.load(folder / f"results-{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "ddp-8", "fsdp1", "fsdp2", "fsdp2-stored-as-float"])
def test_ranks_are_equal_and_a_run_resumes_bit_for_bit(ran, name):
    for result in (each[name] for each in ran[1]):
        assert result["equal ranks"] and result["resumed"]
        assert all(torch.isfinite(value).all() for value in result["state"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp1", "fsdp2", "fsdp2-stored-as-float"])
def test_a_sharded_base_trains_as_a_replicated_one_and_writes_the_same_file(ran, name):
    folder, (first, _) = ran
    for key, value in first["ddp"]["state"].items():
        torch.testing.assert_close(first[name]["state"][key], value, rtol=1e-4, atol=1e-5)
    files = [torch.load(folder / each / "whole" / "last.ckpt", weights_only=True) for each in ("ddp", name)]
    assert files[0]["state_dict"].keys() == files[1]["state_dict"].keys() == first["ddp"]["state"].keys()
    assert files[0]["lightning_lora"]["base"] == files[1]["lightning_lora"]["base"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "fsdp1-integers",
            "stores its 4-bit weight as torch.uint8, and CPUFSDP shards parameters of one floating dtype",
        ),
        (
            "fsdp1-other-dtype",
            "cast that to torch.float32, which destroys the codes. Load the model with BitsAndBytes",
        ),
        ("fsdp1-8", "`net.layers.0.q` is an 8-bit layer of bitsandbytes, which keeps its weight in a second place"),
        ("fsdp2-8", "where ModelParallelStrategy does not shard it. Load the model in 4 bits, or use strategy='ddp'."),
    ],
)
def test_what_cannot_be_sharded_is_refused(ran, name, words):
    assert all(words in result[name]["refused"] for result in ran[1])


class Stored(Wide):
    def __init__(self, storage: torch.dtype) -> None:
        super().__init__()
        for block in self.net.layers:
            block.q = four_bits(block.q, quant_storage=storage, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize(("precision", "wanted"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_codes_that_a_precision_would_cast_are_refused(precision, wanted):
    other = torch.float32
    with pytest.raises(MisconfigurationException, match=f"would cast that to {wanted}, which destroys the codes"):
        trainer(LoRACallback(r=4), precision=precision, max_steps=1).fit(Stored(other), data())
    adapter = DDP(SimpleNamespace(precision_plugin=SimpleNamespace(precision=precision)), Stored(other))
    with pytest.raises(MisconfigurationException, match="destroys the codes"):
        adapter.before_wrap(ExitStack())
    for storage in {wanted, torch.uint8} - {torch.float64}:
        module = Stored(storage)
        trainer(LoRACallback(r=4), precision=precision, max_steps=1).fit(module, data())
        assert module.net.layers[0].q.weight.dtype == storage


class OfTorchao(DynamicInt8):
    """It raises where it is split."""


class OfQuanto(DynamicInt8):
    """It is dequantized where it is split."""

    __module__ = "optimum.toy"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.chunk:
            return args[0].dequantize().chunk(*args[1:])
        return super().__torch_function__(func, types, args, kwargs)


class Splits(DynamicInt8):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return (
            (args[0], args[0]) if func is torch.Tensor.chunk else super().__torch_function__(func, types, args, kwargs)
        )


def with_weight(cls: type) -> nn.Module:
    model = nn.ModuleDict({"q": nn.Linear(4, 4)})
    weight = cls(torch.ones(4, 4, dtype=torch.int8), torch.ones(4, 1))
    model["q"].weight = nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize(("cls", "library"), [(OfTorchao, "torchao"), (OfQuanto, "quanto")])
@pytest.mark.parametrize("check", [check_flat_codes, check_sharded_tensors])
def test_tensors_that_lose_their_codes_are_refused_with_the_name_of_their_library(cls, library, check):
    words = rf"`q.weight` is quantized by {library}, and SimpleNamespace would not shard its codes. Use strategy='ddp'"
    with pytest.raises(MisconfigurationException, match=words):
        check(SimpleNamespace(), with_weight(cls))


def test_tensors_that_can_be_split_are_taken_where_each_is_sharded_by_itself():
    check_sharded_tensors(SimpleNamespace(), with_weight(Splits))
    with pytest.raises(MisconfigurationException, match="would not shard its codes"):
        check_flat_codes(SimpleNamespace(), with_weight(Splits))
