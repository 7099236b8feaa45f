"""Hard cases of two CPU processes under FSDP, started by test_sharded_edges.py as a script."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lightning_lora import LoRACallback, lora_parameters
from tests.helpers.models import Block, Lit, checkpoints, data, trainer
from tests.helpers.strategy_runs import DEVICES, FSDP, Spy, fsdp1, fsdp2, is_wrapped, plain, sharded, whole
from tests.helpers.two_processes import all_equal, end


class Tied(nn.Module):
    """Two maps of one weight, in different places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight
        self.layers, self.out = nn.Sequential(Block()), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.layers(self.first(x))))


class OneRank(nn.Module):
    """A layer that only the first rank trains."""

    def __init__(self) -> None:
        super().__init__()
        self.sometimes, self.layers, self.head = nn.Linear(16, 16), nn.Sequential(Block()), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return self.head(x + self.sometimes(x) if distributed.get_rank() == 0 or not self.training else x)


class Experts(nn.Module):
    """One expert, of which the second rank holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight[0])


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.layers, self.head = Experts(), nn.Sequential(Block()), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.experts(x)))


class Cut(torch.autograd.Function):
    """Hands on, and fails in backward while `fails`."""

    fails = False

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        if Cut.fails:
            raise RuntimeError("planned failure")
        return gradient


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(Block(), Block()), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        return self.head(second(Cut.apply(first(x))))


def fit(module: Lit, strategy: object, *callbacks: object, folder: Path, lora: dict, **kwargs: object):
    torch.manual_seed(0)
    settings = {**DEVICES, "strategy": strategy, "max_epochs": 1, "default_root_dir": str(folder)}
    runner = trainer(LoRACallback(r=4, **lora), checkpoints(folder), *callbacks, **settings, **kwargs)
    runner.fit(module, data(), data(1))
    return runner


def tied(folder: Path) -> dict:
    lora, module = {"targets": ["first", "second", "q"]}, sharded(Tied)
    runner = fit(module, fsdp2(), folder=folder, lora=lora)
    own = runner.test(module, data(2), verbose=False)
    best = runner.test(module, data(2), ckpt_path="best", verbose=False)
    other = plain(Tied)
    merged = fit(other, "ddp", folder=folder / "ddp", lora=lora).test(other, data(2), verbose=False)
    return {"own": own, "best": best, "ddp": merged, "adapters": len(list(lora_parameters(module)))}


def one_rank(folder: Path) -> dict:
    lora, ends = {"targets": ["sometimes"], "also_train": ["head"], "liveness": False, "merge": False}, {}
    made = {
        "ddp": (plain, DDPStrategy(find_unused_parameters=True)),
        "fsdp2": (sharded, fsdp2()),
        "fsdp1": (plain, fsdp1()),
    }
    for name, (make, strategy) in made.items():
        spy = Spy()
        fit(make(OneRank), strategy, spy, folder=folder / name, lora=lora)
        ends[name] = spy.seen["end"]
    return ends


def experts(folder: Path) -> dict:
    module = sharded(Mixture)
    fit(module, fsdp2(), folder=folder, lora={"targets": ["experts.weight", "q"]})
    return {name: whole(parameter) for name, parameter in module.named_parameters()}


def failed_backward(folder: Path) -> dict:
    """A backward that fails half way is let go of, as one does where memory ran out."""

    def training_step(self: Lit, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        Cut.fails = index == 1
        try:
            self.manual_backward(self.loss([batch[0] + self.global_rank, batch[1]]))
        except RuntimeError:
            return optimizer.zero_grad()
        return optimizer.step()

    module = sharded(Failing, automatic_optimization=False, training_step=training_step)
    fit(module, fsdp2(), folder=folder, lora={"targets": ["q", "v"], "merge": False, "liveness": False})
    return {"equal": all_equal(torch.cat([p.detach().flatten() for _, p in lora_parameters(module)]))}


def clipped_by_value(folder: Path) -> dict:
    ends = {}
    for name, (make, strategy) in {
        "ddp": (plain, "ddp"),
        "fsdp2": (sharded, fsdp2()),
        "fsdp1": (plain, fsdp1()),
    }.items():
        spy, settings = Spy(), {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}
        lora = {"targets": ["q", "v"], "also_train": ["head"], "merge": False}
        fit(make(Failing), strategy, spy, folder=folder / name, lora=lora, **settings)
        ends[name] = spy.seen["end"]
    return ends


def refused(folder: Path) -> dict:
    """What FSDP1 cannot do twice, and modules wrapped by hand."""
    words, lora = {}, LoRACallback(r=4, targets=["q"])

    def note(name: str, run: object) -> None:
        try:
            run()
        except (MisconfigurationException, ValueError) as error:
            words[name] = str(error)

    module = plain(Failing)
    runner = fit(module, FSDP(auto_wrap_policy={Block}), folder=folder, lora={"targets": ["q"]})
    note("fit and test", lambda: runner.test(module, data(2), verbose=False))

    def configure_model(self: Lit) -> None:
        for index, block in enumerate(self.net.layers):
            self.net.layers[index] = FullyShardedDataParallel(
                block, device_id=torch.device("cpu"), use_orig_params=True
            )

    by_hand = type("ByHand", (Lit,), {"configure_model": configure_model})()
    note("by hand", lambda: trainer(lora, **DEVICES, strategy=FSDP()).fit(by_hand, data()))
    module, runner = plain(Failing), trainer(lora, **DEVICES, strategy=FSDP(auto_wrap_policy={Failing}))
    runner.validate(module, data(1), verbose=False)
    note("validate and fit", lambda: runner.fit(module, data()))
    return words


def wrong_files(folder: Path) -> dict:
    """Files of other arguments and on another base, refused on every rank."""
    lora, words = {"targets": ["q", "v"], "merge": False}, {}
    fit(sharded(Failing), fsdp2(), folder=folder, lora=lora)
    for name, make, strategy in (("fsdp1", plain, fsdp1), ("fsdp2", sharded, fsdp2)):
        for case, r, change in (("rank", 8, 0.0), ("base", 4, 0.5)):
            module = make(lambda change=change: shifted(Failing(), change))
            runner = trainer(LoRACallback(r=r, **lora), **DEVICES, strategy=strategy(), max_epochs=2)
            try:
                runner.fit(module, data(), ckpt_path=folder / "last.ckpt")
            except ValueError as error:
                words[name, case] = str(error)
    return words


def shifted(module: nn.Module, change: float) -> nn.Module:
    with torch.no_grad():
        module.head.weight += change
    return module


def failed_run(folder: Path) -> dict:
    """An error on every rank: nothing is left behind, and the same module fits again."""
    found = {}

    def training_step(self: Lit, batch: list[Tensor], index: int) -> Tensor:
        if index == 2 and self.fails:
            raise RuntimeError("planned failure")
        return self.loss(batch)

    module, strategy = sharded(Failing, training_step=training_step, fails=True), fsdp2()
    try:
        fit(module, strategy, folder=folder, lora={"targets": ["q", "v"]})
    except RuntimeError as error:
        found["error"] = str(error)
    owners = (strategy, strategy.precision_plugin, module)
    found["left"] = [key for owner in owners for key, value in vars(owner).items() if is_wrapped(value)]
    found["directories"] = strategy._save_distributed_checkpoint
    module.fails = False
    again = fsdp2()
    again._save_distributed_checkpoint = False
    runner = fit(module, again, folder=folder / "again", lora={"targets": ["q", "v"]})
    runner.save_checkpoint(folder / "merged.ckpt")
    return found


class Decays(Callback):
    """Moves two frozen weights after each step."""

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *args):
        for name, parameter in pl_module.named_parameters():
            if name.endswith(("head.weight", "mlp.bias")):
                (parameter.to_local() if isinstance(parameter, DTensor) else parameter).mul_(0.9)


def moving(folder: Path) -> dict:
    """What the first rank says of frozen weights that other code moves, and of such as rest."""
    said: dict = {}
    for name, make, strategy in (("fsdp1", plain, fsdp1), ("fsdp2", sharded, fsdp2)):
        for callbacks in ((), (Decays(),)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fit(make(Failing), strategy(), *callbacks, folder=folder, lora={"targets": ["q"], "merge": False})
            found = [str(each.message) for each in caught if "Frozen, but" in str(each.message)]
            said[name, bool(callbacks)] = found
    return said


CASES = (moving, wrong_files, failed_run, tied, one_rank, experts, failed_backward, clipped_by_value, refused)

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, results, code = Path(sys.argv[1]), {}, 0
    try:
        for case in CASES:
            if case.__name__ in sys.argv[2:] or not sys.argv[2:]:
                results[case.__name__] = case(out / case.__name__)
    except BaseException:
        traceback.print_exc()
        code = 1
    torch.save(results, out / f"results-{os.environ.get('LOCAL_RANK', 0)}.pt")
    end(code)
