"""SubspaceCallback in a run: the merge at its end, precisions, two processes, and what is refused."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file

from lightning_lora.methods.subspace.projections import PROJECTIONS
from lightning_lora.trainer.subspace_callback import SubspaceCallback
from tests.helpers.models import Lit, data, trainer
from tests.helpers.scripts import run_script


class Live(Callback):
    """The output of the module after the last step, while it is adapted."""

    def on_train_end(self, runner, module):
        with torch.no_grad():
            self.output = module.eval()(inputs().to(module.net.head._parameters["weight"].dtype))


def inputs() -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("structure", [False, True])
def test_fit_leaves_the_plain_module_with_what_it_trained(tmp_path, precision, structure):
    module, live = Lit(), Live()
    base = copy.deepcopy(module)
    callback = SubspaceCallback(20, structure=structure, lr_scale=30.0, merged=str(tmp_path / "merged.safetensors"))
    trainer(callback, live, max_epochs=1, precision=precision).fit(module, data())
    assert [type(each) for each in module.modules()] == [type(each) for each in base.modules()]
    with torch.no_grad():
        assert torch.equal(module.eval()(inputs().to(live.output.dtype)), live.output)
    assert not torch.equal(module.net.head.weight.float(), base.net.head.weight)
    written = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(value, written[key]) for key, value in module.state_dict().items())
    callback.method.remove(module)
    state = base.to(live.output.dtype).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


class Held(Callback):
    """The names of what each group of the optimizer holds in the run."""

    def on_train_start(self, runner, module):
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.names = [[names[id(p)] for p in group["params"]] for group in runner.optimizers[0].param_groups]


def test_the_optimizer_holds_z_in_one_group_whatever_it_asks_for_by_name():
    class Groups(Lit):
        def configure_optimizers(self):
            head = self.net.head
            rest = [p for name, p in self.named_parameters() if "head" not in name]
            return torch.optim.SGD([{"params": [head.weight, head.bias], "lr": 1.0}, {"params": rest, "lr": 0.1}])

    held = Held()
    trainer(SubspaceCallback(20), held, max_epochs=1, limit_train_batches=1).fit(Groups(), data())
    assert held.names == [[], ["net.layers.0.q.subspace.z"]]


@pytest.mark.slow
def test_two_processes_hold_one_z_and_shards_give_what_whole_weights_give(tmp_path):
    done = run_script("subspace_two_processes.py", tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"results-{rank}.pt") for rank in (0, 1)]
    assert all(results[name]["same"] for results in ranks for name in ("ddp", "fsdp2"))
    for results in ranks:
        assert results["checkpointed-True"] is True
        assert "`net.layers.0.q.subspace.z` got its gradient in several parts" in results["checkpointed-False"]
    ddp, fsdp2 = (ranks[0][name]["state"] for name in ("ddp", "fsdp2"))
    assert all(torch.equal(value, fsdp2[key]) for key, value in ddp.items())
    for index, whole in enumerate(ranks[0]["ddp"]["merged"]):
        assert torch.equal(whole, torch.cat([results["fsdp2"]["merged"][index] for results in ranks]))


def test_strategies_that_split_weights_are_refused():
    class CPUFSDP(FSDPStrategy):
        """Lightning refuses its own class on a CPU."""

        def __init__(self):
            super(FSDPStrategy, self).__init__()

    module = Lit()
    runner = trainer(SubspaceCallback(20), max_epochs=1)
    runner._accelerator_connector.strategy = CPUFSDP()
    with pytest.raises(MisconfigurationException, match=r"SubspaceCallback changes weights where .* CPUFSDP puts"):
        runner.callbacks[0].setup(runner, module, "fit")


def test_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    arguments = ["--trainer.callbacks+=SubspaceCallback", "--trainer.callbacks.dimension=5", "--trainer.logger=false"]
    arguments += ["--trainer.callbacks.structure=true", '--trainer.callbacks.targets=["net"]']
    cli = LightningCLI(Lit, args=arguments, run=False, save_config_callback=None)
    (callback,) = [each for each in cli.trainer.callbacks if isinstance(each, SubspaceCallback)]
    assert (callback.config.dimension, callback.config.structure, callback.config.targets) == (5, True, ["net"])


def test_the_defaults_are_those_of_the_configuration():
    config = SubspaceCallback().config
    assert (config.dimension, config.projection, config.structure) == (200, "fastfood", False)
    assert config.projection in PROJECTIONS
