"""A callback that the hyperparameters of a module hold, as neuralforecast keeps the arguments of its Trainer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_lora import LoRACallback, load_from_checkpoint, lora_state_dict
from tests.helpers.models import Lit, checkpoints, data, trainer


class Forecaster(Lit):
    """Keeps the arguments of its Trainer."""

    def __init__(self, trainer_kwargs: dict, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.save_hyperparameters()


class Named(LoRACallback):
    """A sub-class with attributes of its own."""

    def __init__(self, r: int) -> None:
        super().__init__(r=r)
        self.note, self.seen = "mine", torch.ones(2)


class PickledInFit(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        adapter = trainer.callbacks[0]
        self.size, self.copies = (
            len(pickle.dumps(adapter)),
            [pickle.loads(pickle.dumps(adapter)), copy.deepcopy(adapter)],
        )


def arguments(callback: LoRACallback) -> dict:
    return {**callback.config.to_dict(), **callback.run_config.to_dict()}


@pytest.mark.parametrize("callback", [LoRACallback(r=4, targets=["q"], lr_scale=2.0), Named(r=4)])
def test_a_copy_made_in_fit_is_the_configuration_alone(callback):
    seen = PickledInFit()
    trainer(callback, seen, max_steps=2).fit(Lit(), data())
    assert seen.size < 2500
    for made in seen.copies:
        assert arguments(made) == arguments(callback) and type(made) is type(callback)
        assert {"log", "log_dict"}.isdisjoint(made.__dict__) and made._run is None
        assert getattr(made, "note", "mine") == "mine" and torch.equal(
            getattr(made, "seen", torch.ones(2)), torch.ones(2)
        )
        trainer(made, max_steps=1).fit(Lit(), data())  # a copy is a callback


def test_every_save_works_and_the_file_is_small_and_plain_data(tmp_path):
    callback = LoRACallback(r=4, alpha=8, targets=["q", "v"], merge=False)
    files = checkpoints(tmp_path / "full")
    weights = checkpoints(tmp_path / "weights", save_weights_only=True, monitor=None)
    module = Forecaster({"callbacks": [callback], "max_epochs": 2, "flags": ("a", 1)})
    plain = Lit()
    trainer(LoRACallback(r=4, alpha=8, targets=["q", "v"], merge=False), checkpoints(tmp_path / "plain")).fit(
        plain, data(), data(1)
    )
    runner = trainer(callback, files, weights)
    runner.fit(module, data(), data(1))
    size = (tmp_path / "plain" / "last.ckpt").stat().st_size
    for path in (tmp_path / "full" / "last.ckpt", tmp_path / "weights" / "last.ckpt"):
        stored = torch.load(path, weights_only=True)["hyper_parameters"]["trainer_kwargs"]
        assert stored["max_epochs"] == 2 and stored["flags"] == ("a", 1)
        assert stored["callbacks"][0]["arguments"] == arguments(callback)
        assert Path(path).stat().st_size < size + 2000
    assert module.hparams.trainer_kwargs["callbacks"][0] is callback
    loaded = load_from_checkpoint(Forecaster, tmp_path / "full" / "last.ckpt", weights_only=True)
    made = loaded.hparams.trainer_kwargs["callbacks"][0]
    assert isinstance(made, LoRACallback) and arguments(made) == arguments(callback)
    state: dict[str, Tensor] = lora_state_dict(module)
    assert all(torch.equal(value, state[key]) for key, value in lora_state_dict(loaded).items())
    more = trainer(copy.deepcopy(callback), max_epochs=3)
    more.fit(Forecaster(module.hparams.trainer_kwargs), data(), ckpt_path=tmp_path / "full" / "last.ckpt")
    assert more.global_step == 24
    runner.save_checkpoint(tmp_path / "after.ckpt")
    assert len(pickle.dumps(module.hparams)) < 3000


def test_a_subclass_of_the_users_own_stays_an_object(tmp_path):
    callback = Named(r=4)
    trainer(callback, checkpoints(tmp_path)).fit(Forecaster({"callbacks": [callback]}), data(), data(1))
    with pytest.raises(pickle.UnpicklingError, match="Named"):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=False)["hyper_parameters"]["trainer_kwargs"]
    assert type(stored["callbacks"][0]) is Named and stored["callbacks"][0].note == "mine"
