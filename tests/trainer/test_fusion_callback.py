"""FusionCallback in a Trainer, over checkpoints of real runs of AdapterCallback."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import AdapterCallback, FusionCallback, FusionConfig, adapt, load_from_checkpoint
from tests.helpers.models import LitEncoder, checkpoints, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(7))


def adapter_run(folder, seed, **arguments):
    """The path of the last checkpoint of a run, and its module."""
    files, module = checkpoints(folder), LitEncoder()
    trainer(AdapterCallback(3, **arguments), files, max_epochs=1).fit(module, data(seed), data(1))
    return files.last_model_path, module


def fusion_run(folder, adapters, epochs, ckpt_path=None):
    files, module = checkpoints(folder), LitEncoder()
    callback = FusionCallback(adapters, also_train=["head"], seed=3)
    trainer(callback, files, max_epochs=epochs).fit(module, data(), data(1), ckpt_path=ckpt_path)
    return files.last_model_path, module


def test_two_stages(tmp_path):
    adapters = [adapter_run(tmp_path / name, seed, name=name)[0] for seed, name in enumerate(("fr", "de"))]
    _, whole = fusion_run(tmp_path / "whole", adapters, 2)
    half, _ = fusion_run(tmp_path / "half", adapters, 1)
    last, resumed = fusion_run(tmp_path / "resumed", adapters, 2, half)
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())
    site = whole.net.layers[0].mlp.fc2.fusion
    assert list(site.adapters) == ["fr", "de"]
    assert not torch.equal(site.value, torch.eye(16))

    for path in adapters:  # the checkpoint of a fusion needs no other file
        (tmp_path / path).unlink()
    assert torch.equal(load_from_checkpoint(LitEncoder, last).eval()(X), whole.eval()(X))


def test_one_adapter_is_that_run(tmp_path):
    path, adapted = adapter_run(tmp_path, 0)
    module = LitEncoder()
    adapt(module, FusionConfig([path]))
    module.net.bn.load_state_dict(adapted.net.bn.state_dict())  # statistics are no part of a bottleneck
    assert torch.equal(module.eval()(X), adapted.eval()(X))


def test_a_file_that_is_none_of_bottlenecks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`adapters` names 'nowhere\.ckpt', where there is no file"):
        trainer(FusionCallback(["nowhere.ckpt"]), max_epochs=1).fit(LitEncoder(), data())
