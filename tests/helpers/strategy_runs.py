"""Runs of two CPU processes (gloo) under every strategy, started by strategies/test_base.py as a script."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, lora_parameters
from tests.helpers.models import Block, BuiltInConfigureModel, Lit, checkpoints, data, net, trainer
from tests.helpers.two_processes import all_equal, end

GPUS = torch.cuda.device_count() > 1  # then all of it runs there, through NCCL
DEVICES = {"accelerator": "gpu" if GPUS else "cpu", "devices": 2}
CONFIG = {"r": 4, "dropout": 0.1, "also_train": ["head"]}


class CPUFSDP(FSDPStrategy):
    """Lightning refuses its own class on a CPU; torch does not."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return model
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


FSDP = FSDPStrategy if GPUS else CPUFSDP


class Dropping(Lit):
    """Every rank draws another stream, as with `seed_everything(seed + rank)`."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)

    def on_train_start(self) -> None:
        if self.trainer.global_step == 0:
            torch.manual_seed(100 + self.global_rank)


class Lazy(Dropping):
    def __init__(self) -> None:
        BuiltInConfigureModel.__init__(self)

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.build()

    def build(self) -> nn.Module:
        with torch.device("cpu"):  # or a GPU would draw another base under some strategies
            return net(dropout=0.2)


class Meta(Lazy):
    """Made without values, which FSDP1 gives it when it shards."""

    def build(self) -> nn.Module:
        with torch.device("meta"):
            return net(dropout=0.2)


class Sharded(Lazy):
    """FSDP2: the user shards in `configure_model`, before a callback can adapt anything."""

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.build()
            self.shard(self.net)

    def shard(self, network: nn.Module, **kwargs: object) -> None:
        mesh = self.device_mesh["data_parallel"]
        for unit in (*network.layers, network):
            fully_shard(unit, mesh=mesh, **kwargs)


class ShardedMeta(Sharded):
    """Sharded on the meta device, then given its weights by hand, as one loads a large model."""

    def configure_model(self) -> None:
        if self.net is None:
            with torch.device("meta"):
                self.net = self.build()
            self.shard(self.net)
            self.net.to_empty(device=self.trainer.strategy.root_device)
            values = net().state_dict()
            for key, parameter in self.net.named_parameters():
                full = values[key]
                parameter.data.to_local().copy_(full.chunk(2)[distributed.get_rank()])


class Unloaded(Sharded):
    """Sharded on the meta device and left there: Lightning gives it values by `reset_parameters`."""

    def build(self) -> nn.Module:
        with torch.device("meta"):
            return super().build()


class Before(Sharded):
    """The user adapts, and shards after it: the adapters are in their blocks' units."""

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.build()
            apply_lora(self, LoRAConfig(**CONFIG))
            self.shard(self.net)


class LeftOut(Sharded):
    """The user adapts, and shards all but the adapters, some linear layers by themselves."""

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.build()
            apply_lora(self, LoRAConfig(**CONFIG))
            ignored = {parameter for _, parameter in lora_parameters(self)}
            for block in self.net.layers:
                fully_shard(block.q, mesh=self.device_mesh["data_parallel"], ignored_params=ignored)
            self.shard(self.net, ignored_params=ignored)


class CPUDeepSpeed(DeepSpeedStrategy):
    """Lightning refuses its own class on a CPU; DeepSpeed does not."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


def deepspeed(stage: int) -> DeepSpeedStrategy:
    strategy = DeepSpeedStrategy(stage=stage) if GPUS else CPUDeepSpeed(stage=stage, process_group_backend="gloo")
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or nothing here is partitioned
    return strategy


def fsdp1(*blocks: type) -> FSDPStrategy:
    return FSDP(auto_wrap_policy={Block, *blocks})


def fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


TARGETS = {"encoder": "all", "kinds": ["embed", "conv", "lstm", "mix", "layers.0.head"]}
RUNS = {
    "ddp": (Dropping, lambda: "ddp"),
    "ddp-static-graph": (Dropping, lambda: DDPStrategy(static_graph=True)),
    "ddp-bucket-view": (Dropping, lambda: DDPStrategy(gradient_as_bucket_view=True)),
    "ddp-find-unused": (Dropping, lambda: DDPStrategy(find_unused_parameters=True)),
    "fsdp1": (Dropping, fsdp1),
    "fsdp1-configure-model": (Lazy, fsdp1),
    "fsdp2": (Sharded, fsdp2),
    "fsdp2-meta": (ShardedMeta, fsdp2),
    "fsdp2-apply-before": (Before, fsdp2),
    "fsdp2-left-out": (LeftOut, fsdp2),
}
if importlib.util.find_spec("deepspeed"):
    os.environ["DS_ACCELERATOR"] = "cuda" if GPUS else "cpu"
    RUNS |= {
        "deepspeed-2": (Dropping, lambda: deepspeed(2)),
        "deepspeed-3": (Dropping, lambda: deepspeed(3)),
    }
    if not GPUS:
        RUNS["deepspeed-3-configure-model"] = (Lazy, lambda: deepspeed(3))


class Encoder(nn.Module):
    """Torch's own encoder: one of its kernels reads weights without calling the layers that have them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2).layers
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (1, 16)).repeat(1, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def seeded(make: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def plain(make: type[nn.Module]) -> Lit:
    module = Lit()
    module.net = seeded(make)
    return module


def sharded(make: type[nn.Module], **methods: object) -> Sharded:
    module = type("Sharded", (Sharded,), methods)()
    module.build = lambda: seeded(make)
    return module


class Manual(Dropping):
    automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.go_back(self.loss(batch))
        self.clip_gradients(optimizer, 0.05, "norm")
        optimizer.step()

    def go_back(self, loss: Tensor) -> None:
        self.manual_backward(loss)


class RawManual(Manual):
    """Calls `backward` past Lightning, which DDP does not hear of there, and we do."""

    def go_back(self, loss: Tensor) -> None:
        loss.backward()


class ShardedManual(Sharded):
    automatic_optimization = False
    training_step, go_back = RawManual.training_step, RawManual.go_back


class Kinds(nn.Module):
    """Layers of other kinds, and a matrix that is read and not called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(4, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.lstm, self.mix = nn.LSTM(16, 16, batch_first=True), nn.Parameter(torch.randn(16, 16) / 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed((x > 0).long() + 2 * (x > 1).long()) + x.unsqueeze(-1)
        x, _ = self.lstm(self.conv(x.mT).mT)
        return self.head(x.mean(1) @ self.mix)


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Kinds())
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class Watch(Callback):
    """What is there in the middle of a run and at its end."""

    def on_train_epoch_end(self, trainer, pl_module):
        owners = (trainer.strategy, trainer.precision_plugin, pl_module)
        self.wrapped = [key for owner in owners for key, value in vars(owner).items() if is_wrapped(value)]
        with CommDebugMode() as traffic:
            trainer.save_checkpoint(trainer.default_root_dir + "/weights.ckpt", weights_only=True)
        self.traffic = {str(kind): count for kind, count in traffic.get_comm_counts().items()}

    def on_train_end(self, trainer, pl_module):
        adapters = [parameter for _, parameter in lora_parameters(pl_module)]
        self.parted = any(isinstance(parameter, DTensor) for parameter in adapters)
        self.equal = all_equal(torch.cat([whole(parameter).flatten() for parameter in adapters]))


def is_wrapped(value: object) -> bool:
    return type(value).__name__ == "Wrapped"


class Spy(Callback):
    """The adapters as they start and end, and the outputs in evaluation."""

    def on_train_start(self, trainer, pl_module):
        self.seen = {"start": self.adapters(pl_module)}

    def on_train_end(self, trainer, pl_module):
        self.seen |= {"end": self.adapters(pl_module), "loss": trainer.callback_metrics["val_loss"]}
        states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
        self.seen["state dtypes"] = {value.dtype for state in states for value in state.values()}

    def adapters(self, module):
        return {name: whole(parameter).cpu().clone() for name, parameter in lora_parameters(module)}


def whole(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "ds_id"):
        with sys.modules["deepspeed"].zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def fit(name: str, folder: Path, epochs: int = 2, ckpt: object = None, more: tuple = (), **kwargs: object):
    make, strategy = RUNS[name]
    torch.manual_seed(distributed.get_rank() if distributed.is_initialized() else 0)
    files = checkpoints(folder)
    callbacks = (LoRACallback(**CONFIG, merge=kwargs.pop("merge", False)), files, *more)
    settings = {**DEVICES, "strategy": strategy(), "max_epochs": epochs, "default_root_dir": str(folder)}
    runner, module = trainer(*callbacks, **settings, **kwargs), make()
    runner.fit(module, data(), data(1), ckpt_path=ckpt)
    return runner, module, files


def train(name: str, folder: Path) -> dict:
    """Fit two epochs, merge on every rank, test the best; a fresh module tests the same."""
    watch = Watch()
    runner, module, files = fit(name, folder / "whole", more=(watch,), merge=True)
    best = files.best_model_path
    result = {"rank": runner.global_rank, "best path": best, "parted": watch.parted, "traffic": watch.traffic}
    owners = (runner.strategy, runner.precision_plugin, module)
    result["left behind"] = [key for owner in owners for key, value in vars(owner).items() if is_wrapped(value)]
    result["wrapped"], result["ignored"] = watch.wrapped, "ignored_states" in getattr(runner.strategy, "kwargs", {})
    result["keys"] = [key.replace("_fsdp_wrapped_module.", "") for key, _ in module.named_parameters()]
    in_place = not name.startswith(("fsdp1", "deepspeed-3"))
    merged = [whole(parameter).flatten().to(runner.strategy.root_device) for parameter in module.parameters()]
    result["equal"] = watch.equal and (not in_place or all_equal(torch.cat(merged)))
    result["merged"] = torch.cat(merged).cpu() if in_place else None
    result["best"] = runner.test(module, data(2), ckpt_path="best", verbose=False)
    callback = LoRACallback(**CONFIG)
    make, strategy = RUNS[name]
    again = trainer(callback, **DEVICES, strategy=strategy())
    result["fresh"] = again.test(make(), data(2), ckpt_path=best, verbose=False)
    return result


def shapes() -> dict:
    """Fits of other modules: torch's encoder, other layers, manual optimization, bf16, the meta device."""
    cases = {
        "encoder": {
            "ddp": partial(plain, Encoder),
            "fsdp1": partial(plain, Encoder),
            "fsdp2": partial(sharded, Encoder),
        },
        "kinds": {"ddp": partial(plain, Layered), "fsdp1": partial(plain, Layered), "fsdp2": partial(sharded, Layered)},
        "manual": {"ddp": Manual, "fsdp1": RawManual, "fsdp2": ShardedManual},
        "bf16-true": {"ddp": Lazy, "fsdp1": Lazy, "fsdp2": Sharded},
        "bf16-mixed": {"ddp": Lazy, "fsdp2": Sharded},
        "meta": {"fsdp1": Meta, "fsdp2": Unloaded},
    }
    made = {"ddp": lambda: "ddp", "fsdp1": lambda: fsdp1(Kinds, nn.TransformerEncoderLayer)}
    if importlib.util.find_spec("deepspeed"):
        made |= {"deepspeed-2": lambda: deepspeed(2), "deepspeed-3": lambda: deepspeed(3)}
        for case in ("encoder", "kinds", "bf16-true"):
            cases[case] |= dict.fromkeys(("deepspeed-2", "deepspeed-3"), cases[case]["ddp"])
    found: dict = {}
    for case, makes in cases.items():
        for name, make in makes.items():
            torch.manual_seed(0)
            also_train = None if "bf16" in case else ["head"]  # a sharded head's gradient is rounded otherwise
            spy, lora = Spy(), LoRACallback(r=4, targets=TARGETS.get(case, "attn"), also_train=also_train, merge=False)
            settings = {**DEVICES, "strategy": made.get(name, fsdp2)(), "precision": case if "bf16" in case else None}
            trainer(lora, spy, max_epochs=1, **settings).fit(make(), data(), data(1))
            found[case, name] = spy.seen
    return found


def resume(name: str, folder: Path) -> dict:
    """The second epoch again from the first's file; a run that accumulates over two batches and clips hard."""
    fit(name, folder / "resumed", 2, folder / "whole" / "epoch=0.ckpt")
    if name != "ddp-static-graph":  # torch itself cannot accumulate there
        fit(name, folder / "accumulated", 1, accumulate_grad_batches=2, gradient_clip_val=0.01)
    return {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, only = Path(sys.argv[1]), sys.argv[2:] or ["shapes", *RUNS]
    results, code = {}, 0
    try:
        for run in only:
            results[run] = shapes() if run == "shapes" else {**train(run, out / run), **resume(run, out / run)}
    except BaseException:
        traceback.print_exc()
        code = 1
    torch.save(results, out / f"results-{os.environ.get('LOCAL_RANK', 0)}.pt")
    end(code)
