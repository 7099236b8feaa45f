"""Frozen weights in the dtype of autocast: the same bits all the way, less memory, and the base as it was after it."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, lora_parameters
from lightning_lora.model.base_dtype import LoweredWeights, cast_by_autocast
from lightning_lora.trainer.compatibility import _check_base_dtype


class ManyKinds(lightning.LightningModule):
    """Convolution, norm, linear layers, an embedding tied to a head, and a weight that is read raw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.LayerNorm(144)
        self.first = nn.Linear(144, 32)
        self.second = nn.Linear(32, 32)
        self.raw = nn.Linear(32, 32)
        self.embedding = nn.Embedding(8, 32)
        self.head = nn.Linear(32, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.losses: list[float] = []
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.first._parameters["weight"].dtype)
        x = self.norm(F.relu(self.conv(x)).flatten(1))
        x = self.second(F.gelu(self.first(x)))
        x = x + F.linear(x, self.raw.weight / self.raw.weight.norm()) + self.embedding(x.argmax(1) % 8)
        return self.head(x)

    def training_step(self, batch, index):
        loss = F.cross_entropy(self(batch[0]).float(), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("loss", F.cross_entropy(self(batch[0]).float(), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 1, 8, 8, generator=generator), torch.randint(0, 8, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def trainer(path, *callbacks, precision="bf16-mixed", **kwargs):
    return lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, precision=precision, callbacks=list(callbacks), logger=False,
        default_root_dir=path, enable_progress_bar=False, enable_model_summary=False, **kwargs,
    )  # fmt: skip


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def fitted(path, **arguments):
    net = ManyKinds()
    run = trainer(path, LoRACallback(r=2, targets=["conv", "first", "second"], **arguments))
    run.fit(net, data(), data())
    return net, run


@pytest.mark.slow
@pytest.mark.parametrize("merge", [True, False])
def test_the_same_bits_from_the_first_loss_to_the_merged_weights(tmp_path, merge):
    plain, _ = fitted(tmp_path / "plain", merge=merge)
    low, run = fitted(tmp_path / "low", merge=merge, base_dtype="bf16")
    assert set(plain.seen) == {torch.float32} and set(low.seen) == {torch.bfloat16}
    assert plain.losses == low.losses
    one, other = bits(plain), bits(low)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
    assert run.test(low, data(), verbose=False) == trainer(tmp_path).test(plain, data(), verbose=False)


def test_a_run_that_fails_leaves_the_base_as_it_was(tmp_path):
    net, base = ManyKinds(), bits(ManyKinds())

    class Failing(lightning.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("in the midst of it")

    with pytest.raises(RuntimeError, match="in the midst"):
        trainer(tmp_path, LoRACallback(r=2, targets=["first"], base_dtype="bf16"), Failing()).fit(net, data())
    assert set(net.seen) == {torch.bfloat16}
    for name, tensor in base.items():
        assert torch.equal(tensor, net.state_dict()[name]), name


@pytest.mark.slow
def test_a_resumed_run_and_one_with_fp32_weights_go_on_alike(tmp_path):
    whole, _ = fitted(tmp_path / "whole", base_dtype="bf16", merge=False)
    first = ManyKinds()
    run = trainer(tmp_path / "first", LoRACallback(r=2, targets=["conv", "first", "second"], merge=False))
    run.fit_loop.max_epochs = 1
    run.fit(first, data(), data())
    path = run.checkpoint_callback.best_model_path
    second = ManyKinds()
    again = LoRACallback(r=2, targets=["conv", "first", "second"], merge=False, base_dtype="bf16")
    trainer(tmp_path / "second", again).fit(second, data(), data(), ckpt_path=path)
    for (name, one), (_, other) in zip(lora_parameters(whole), lora_parameters(second), strict=True):
        assert torch.equal(one, other), name


def test_what_is_cast():
    net = ManyKinds()
    net.conv2 = nn.Conv1d(4, 4, 3).double()
    apply_lora(net, LoRAConfig(r=2, targets=["first", "raw"], also_train=["second"]))
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert {names[id(p)] for p in cast_by_autocast(net)} == {"conv.weight", "conv.bias", "first.weight", "first.bias"}
    before = {name: p.data_ptr() for name, p in net.named_parameters()}
    values = bits(net)
    lowered = LoweredWeights(torch.bfloat16)
    lowered.lower(list(cast_by_autocast(net)))
    assert net.first._parameters["weight"].dtype == torch.bfloat16
    lowered.restore()
    assert {name: p.data_ptr() for name, p in net.named_parameters()} == before
    assert all(torch.equal(values[name], tensor) for name, tensor in net.state_dict().items())


def test_a_layer_with_a_forward_of_its_own_is_left_alone():
    class Standardized(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight / self.weight.std(), self.bias)

    net = nn.Sequential(Standardized(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    twin = copy.deepcopy(net)
    apply_lora(net, LoRAConfig(r=1, targets=["0", "1"]))
    assert {id(p) for p in cast_by_autocast(net)} == {id(net[1]._parameters["weight"]), id(net[1].bias)}
    twin.requires_grad_(False)
    assert {id(p) for p in cast_by_autocast(twin)} == {id(twin[1].weight), id(twin[1].bias)}


@pytest.mark.parametrize(
    ("arguments", "kwargs", "message"),
    [
        ({"base_dtype": "bf16"}, {"precision": "32-true"}, "precision='bf16-mixed'"),
        ({"base_dtype": "bf16"}, {"precision": "bf16-true"}, "precision='bf16-mixed'"),
        ({"base_dtype": "fp16"}, {"precision": "bf16-mixed"}, "precision='16-mixed'"),
    ],
)
def test_where_it_is_refused(tmp_path, arguments, kwargs, message):
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        trainer(tmp_path, LoRACallback(r=2, targets=["first"], **arguments), **kwargs).fit(ManyKinds(), data())


def test_averages_are_refused(tmp_path):
    callbacks = (LoRACallback(r=2, targets=["first"], base_dtype="bf16"), WeightAveraging())
    with pytest.raises(MisconfigurationException, match="`base_dtype='bf16'` does not work with WeightAveraging"):
        trainer(tmp_path, *callbacks).fit(ManyKinds(), data())


def test_a_dtype_that_is_none():
    with pytest.raises(ValueError, match="`base_dtype` must be one of None, 'bf16', 'fp16', but got 'fp8'"):
        LoRACallback(base_dtype="fp8")


def test_layers_around_whose_weight_something_else_acts():
    net = nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(4, 4)), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)
    ).requires_grad_(False)
    net[2].forward = lambda x: x @ net[2].weight / net[2].weight.norm()
    assert {id(p) for p in cast_by_autocast(net)} == {id(net[0].bias), id(net[1].bias)}


def test_strategies_that_shard_are_refused():
    strategy = type("ModelParallelStrategy", (), {})()
    run = SimpleNamespace(strategy=strategy, precision_plugin=None, callbacks=[])
    with pytest.raises(MisconfigurationException, match="`base_dtype='bf16'` does not work with ModelParallelStrategy"):
        _check_base_dtype(run, "bf16")


def test_nothing_to_cast_is_told(tmp_path):
    net = ManyKinds()
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.requires_grad_(False).to(torch.bfloat16)
    callback = LoRACallback(r=2, targets=["first"], base_dtype="bf16")
    with pytest.warns(UserWarning, match="`base_dtype='bf16'` changes nothing"):
        trainer(tmp_path, callback).fit(net, data())


def test_what_is_loaded_into_the_module_meanwhile_stays(tmp_path):
    class Loading(lightning.Callback):
        def on_fit_start(self, trainer, module):
            with torch.no_grad():
                module.conv.weight.fill_(0.5)

    net = ManyKinds()
    callback = LoRACallback(r=2, targets=["first"], base_dtype="bf16", merge=False)
    with pytest.warns(UserWarning, match="Set after `setup`.*`conv.weight`"):
        trainer(tmp_path, callback, Loading()).fit(net, data())
    assert (
        torch.equal(net.conv.weight, torch.full_like(net.conv.weight, 0.5)) and net.conv.weight.dtype == torch.float32
    )
    assert torch.equal(net.conv.bias, ManyKinds().conv.bias)
