"""An error after training, in `on_fit_end` or a teardown: what callbacks save for it resumes, and nothing is left."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_lora import LoRACallback, lora_parameters
from tests.helpers.models import Lit, data, trainer
from tests.helpers.runs import ADAPTERS, load, same, types
from tests.helpers.selection import slow_except


class Fails(Callback):
    """Raises in the given hook, and keeps the adapters of the last step."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_train_end(self, trainer, pl_module):
        self.adapters = {name: parameter.detach().clone() for name, parameter in lora_parameters(pl_module)}

    def on_fit_end(self, trainer, pl_module):
        self.raise_in("on_fit_end")

    def teardown(self, trainer, pl_module, stage):
        self.raise_in("teardown")

    def raise_in(self, hook):
        if hook == self.hook:
            raise ValueError("broken")


class FailsItself(Lit):
    def teardown(self, stage):
        raise ValueError("broken")


@pytest.mark.parametrize("save", slow_except(["adapter"], ["adapter", "merged"]))
@pytest.mark.parametrize(
    ("hook", "merge", "first"),
    [("on_fit_end", True, True), ("on_fit_end", True, False), ("teardown", True, False), ("itself", False, False)],
)
def test_what_is_saved_for_an_error_after_training_resumes(tmp_path, hook, merge, first, save):
    files = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True, every_n_train_steps=5)
    module, fails = (FailsItself if hook == "itself" else Lit)(), Fails(hook)
    lora = LoRACallback(r=4, merge=merge, save=save)
    runner = trainer(*([fails, lora] if first else [lora, fails]), files, max_epochs=1)
    before = set(runner.strategy.__dict__)
    with pytest.raises(ValueError, match="broken"):
        runner.fit(module, data())
    assert set(runner.strategy.__dict__) - before <= {"_optimizers", "_lightning_optimizers"}
    assert "teardown" not in vars(module)
    assert (types(module).keys() == types(Lit()).keys()) is (merge and not first)
    saved = load(tmp_path / "last.ckpt")
    adapters = saved["state_dict"] if save == "adapter" else saved["lightning_lora"]["state_dict"]
    assert saved["global_step"] == 8 and set(adapters) == ADAPTERS and same(adapters, fails.adapters)
    if save == "merged":
        assert list(saved["state_dict"]) == list(Lit().state_dict())
    trainer(LoRACallback(r=4), max_epochs=2).fit(Lit(), data(), ckpt_path=tmp_path / "last.ckpt")


def test_what_the_user_saves_at_the_end_is_plain_after_the_merge_and_adapters_before(tmp_path):
    class Saves(Callback):
        def __init__(self, name):
            self.path = tmp_path / name

        def on_fit_end(self, trainer, pl_module):
            trainer.save_checkpoint(self.path)

        @property
        def state_key(self):
            return self.path.name

    module = Lit()
    trainer(Saves("before"), LoRACallback(r=4), Saves("after"), max_epochs=1).fit(module, data())
    assert set(load(tmp_path / "before")["state_dict"]) == ADAPTERS
    plain = Lit.load_from_checkpoint(tmp_path / "after")
    assert torch.equal(plain.net.layers[0].q.weight, module.net.layers[0].q.weight)
    assert "lightning_lora" not in load(tmp_path / "after")
    trainer(LoRACallback(r=4)).test(Lit(), data(), ckpt_path=tmp_path / "before", verbose=False)
