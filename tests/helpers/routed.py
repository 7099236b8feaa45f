"""Several adapters trained in one run, routed by the batch; and each of them trained alone, by a loop of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, use_adapters
from tests.helpers.models import net

ADAPTERS: dict = {"fr": {}, "de": {"r": 4}, "it": {"alpha": 3.0}}
# The adapter of each row, eight to a step. Of two processes one has the even rows and the other the odd ones: each
# lacks an adapter in steps 0 and 2, both lack one in steps 1, 3 and 4, and "it" is in step 2 alone.
TASKS = [*["fr", "de"] * 4, *["fr"] * 8, *["fr", "de", "fr", "it"] * 2, *["de"] * 8, *["fr", "fr", "de", "de"] * 2]
STEP = 8
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters, scale=1.0: torch.optim.SGD(parameters, 1e-3 * scale, momentum=0.9, weight_decay=0.1),
    "plain": lambda parameters, scale=1.0: torch.optim.SGD(parameters, 1e-3 * scale),
    "adamw": lambda parameters, scale=1.0: torch.optim.AdamW(parameters, 1e-2 * scale, weight_decay=0.1),
}


class Rows(Dataset):
    """Rows with their label, and their adapter as its name or as its index."""

    def __init__(self, by_index: bool = False, tasks: Sequence[str] = TASKS) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(len(tasks), 16, generator=generator)
        self.y = torch.randint(0, 3, (len(tasks),), generator=generator)
        self.tasks = [list(ADAPTERS).index(task) for task in tasks] if by_index else list(tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x[index], "y": self.y[index], "task": self.tasks[index]}


class RoutedLit(LightningModule):
    """A classifier whose loss is a sum over the samples, or a mean."""

    def __init__(self, optimizer: str = "adamw", reduction: str = "sum", checkpointing: bool | None = None) -> None:
        super().__init__()
        self.net, self.kind, self.reduction = net(), optimizer, reduction
        self.checkpointing = checkpointing  # None for none, else whether it is reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing is None:
            return self.net(x)
        for layer in self.net.layers:
            x = checkpoint(layer, x.requires_grad_(), use_reentrant=self.checkpointing)
        return self.net.head(x)

    def loss(self, batch: dict) -> Tensor:
        return cross_entropy(self(batch["x"]), batch["y"], reduction=self.reduction)

    def training_step(self, batch: dict, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict, index: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True, batch_size=len(batch["y"]))

    def test_step(self, batch: dict, index: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", self.loss(batch), batch_size=len(batch["y"]))

    def predict_step(self, batch: dict, index: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch["x"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.kind](self.parameters())


class ChoosesItself(RoutedLit):
    """Gives each adapter its own rows in the step; the backward pass comes after the blocks."""

    def training_step(self, batch, index):
        total = 0
        for name in dict.fromkeys(batch["task"]):
            own = [place for place, task in enumerate(batch["task"]) if task == name]
            with use_adapters(self, name):
                total = total + self.loss({"x": batch["x"][own], "y": batch["y"][own]})
        return total


class ChoosesOneMore(RoutedLit):
    """Chooses "it" for all rows, in addition to what the route chooses."""

    def training_step(self, batch, index):
        loss = self.loss(batch)
        with use_adapters(self, "it"):
            return loss + self.loss(batch)


def rows(batch_size: int = STEP, rank: int | None = None, without: str | None = None, **kwargs: object) -> DataLoader:
    """All rows, or every other one for one of two processes: Lightning's own sampler would shuffle them.

    Args:
        batch_size: of a process.
        rank: of the process.
        without: the adapter whose rows the batches leave out.
        kwargs: of the rows.
    """
    data = Rows(**kwargs)
    if without is not None:
        own = [[place for place in step if place % 2 == (rank or 0) or rank is None] for step in steps_of()]
        kept = [[place for place in step if TASKS[place] != without] for step in own]
        return DataLoader(data, batch_sampler=kept)
    sampler = None if rank is None else DistributedSampler(data, 2, rank, shuffle=False)
    return DataLoader(data, batch_size, sampler=sampler)


class Trace(Callback):
    """The adapters after each step of the optimizer."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.steps):
            self.steps.append(values_of(pl_module))


def values_of(module: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    return {key: whole(parameter).clone() for key, parameter in lora_parameters(module, name=name)}


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def own_run(
    name: str,
    steps: Sequence[Sequence[int]],
    optimizer: str = "adamw",
    factor: float = 1.0,
    reduction: str = "sum",
    rate: float = 1.0,
    tasks: Sequence[str] = TASKS,
) -> list[dict[str, Tensor]]:
    """The adapter after each step, trained alone on its own rows; a step without any leaves it as it is.

    Args:
        name: of the adapter.
        steps: the rows of every adapter in each step.
        optimizer: the kind.
        factor: of the loss.
        reduction: of the loss over the rows.
        rate: factor of the learning rate.
        tasks: the adapter of each row.
    """
    module, data, trace = RoutedLit(), Rows(), []
    apply_lora(module, LoRAConfig(**{"r": 2, **ADAPTERS[name]}, name=name))
    stepper = OPTIMIZERS[optimizer]([parameter for _, parameter in lora_parameters(module)], rate)
    for places in steps:
        own = [place for place in places if tasks[place] == name]
        if own:
            stepper.zero_grad()
            (factor * cross_entropy(module.net(data.x[own]), data.y[own], reduction=reduction)).backward()
            stepper.step()
        trace.append(values_of(module))
    return trace


def steps_of(epochs: int = 1, size: int = STEP) -> list[list[int]]:
    """The rows of each step."""
    once = [list(range(start, min(start + size, len(TASKS)))) for start in range(0, len(TASKS), size)]
    return once * epochs


def difference(trace: Sequence[dict[str, Tensor]], alone: Sequence[dict[str, Tensor]]) -> float:
    """The largest difference of what both hold, over all steps."""
    assert len(trace) == len(alone) and alone[0].keys() <= trace[0].keys()
    return max(float((step[key] - own[key]).abs().max()) for step, own in zip(trace, alone, strict=True) for key in own)
