"""Remedies of messages about arguments, learning rates and optimizers."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
)
from tests.helpers.models import Lit
from tests.helpers.remedies.case import Expected, fit, remedy


@remedy("arguments.py", "`save='merged'` writes sums", "`base_dtype='bf16'`", "Leave one of the two out")
def merged_files_or_a_lower_base(message: Expected, folder: Path) -> None:
    with message:
        LoRACallback(save="merged", base_dtype="bf16")
    fit(LoRACallback(base_dtype="bf16"), precision="bf16-mixed")
    fit(LoRACallback(save="merged"), precision="bf16-mixed")


@remedy("config.py", "`compute='weights'` sums W0", "dropout=0.1", "Set dropout=0, or leave `compute` out")
def summed_weights_or_dropout(message: Expected, folder: Path) -> None:
    with message:
        LoRACallback(compute="weights", dropout=0.1)
    fit(LoRACallback(compute="weights"))
    fit(LoRACallback(dropout=0.1))


@remedy("arguments.py", "`compute='weights'` adds B A", "`base_dtype='bf16'`", "Leave one of the two out")
def summed_weights_or_a_lower_base(message: Expected, folder: Path) -> None:
    with message:
        LoRACallback(compute="weights", base_dtype="bf16")
    fit(LoRACallback(compute="weights"), precision="bf16-mixed")
    fit(LoRACallback(base_dtype="bf16"), precision="bf16-mixed")


@remedy("config.py", "`{}` is an argument of LoRACallback", "`merge` is", "Write LoRACallback(merge=...)")
def arguments_of_a_run(message: Expected, folder: Path) -> None:
    with message:
        LoRAConfig(merge=False)
    assert fit(LoRACallback(merge=False)).net.layers[0].q.lora


@remedy("arguments.py", "{} takes no `{}`, which is peft's name", "`lora_alpha`", "Write alpha=")
def names_of_peft(message: Expected, folder: Path) -> None:
    with message:
        LoRAConfig(lora_alpha=4)
    assert LoRAConfig(alpha=4).alpha == 4


@remedy("arguments.py", "To train no adapter", "`r` must be at least 1, but got 0", "leave LoRA out")
def no_rank(message: Expected, folder: Path) -> None:
    with message:
        LoRACallback(r=0)
    fit()


@remedy("trainer/lr_scale.py", "`lr_scale={}` needs a learning rate", "`lr_scale=10.0`", "Set lr_scale=1")
def an_optimizer_without_a_rate(message: Expected, folder: Path) -> None:
    class Own(torch.optim.SGD):
        """Keeps its rate to itself."""

        def __init__(self, parameters: object) -> None:
            super().__init__(parameters)
            for group in self.param_groups:
                group["step_size"] = group.pop("lr")

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            closure()  # type: ignore[operator]
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(parameter.grad, alpha=-group["step_size"])

    class Rateless(Lit):
        def configure_optimizers(self) -> object:
            return Own(self.parameters())

    with message:
        fit(LoRACallback(lr_scale=10.0), module=Rateless())
    fit(LoRACallback(lr_scale=1), module=Rateless())


class Cosine(Lit):
    def __init__(self, eta_min: float) -> None:
        super().__init__()
        self.eta_min = eta_min

    def configure_optimizers(self) -> object:
        with_decay = [value for name, value in self.named_parameters() if "q" in name]
        rest = [value for name, value in self.named_parameters() if "q" not in name]
        optimizer = torch.optim.SGD([{"params": with_decay}, {"params": rest}], lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2, eta_min=self.eta_min)]


@remedy(
    "trainer/lr_scale.py", "`lr_scale={}` cannot scale `eta_min={}`", "`eta_min=0.01`", "Set eta_min=0, or lr_scale=1"
)
def a_floor_of_zero(message: Expected, folder: Path) -> None:
    def run(eta_min: float, lr_scale: float) -> None:
        lora = LoRACallback(targets=["q"], also_train=["head"], lr_scale=lr_scale)
        fit(lora, module=Cosine(eta_min))

    with message:
        run(0.01, 10.0)
    run(0, 10.0)
    run(0.01, 1)


@remedy("trainer/optimizers.py", "`SparseAdam` takes sparse gradients only", "Use Adam", "`exclude`")
def adam_for_sparse_adam(message: Expected, folder: Path) -> None:
    class Words(Lit):
        """An embedding with sparse gradients, and an optimizer of its own for it."""

        def __init__(self, optimizer: type) -> None:
            super().__init__()
            self.words, self.optimizer = torch.nn.Embedding(4, 16, sparse=True), optimizer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.words(torch.zeros(len(x), dtype=torch.long)))

        def configure_optimizers(self) -> object:
            return [self.optimizer(self.words.parameters(), lr=0.1), torch.optim.Adam(self.net.parameters())], []

        @property
        def automatic_optimization(self) -> bool:
            return False

        def training_step(self, batch: object, index: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()

    with message:
        fit(LoRACallback(targets=["words", "q"]), module=Words(torch.optim.SparseAdam))
    fit(LoRACallback(targets=["words", "q"]), module=Words(torch.optim.Adam))
    for lora in (LoRACallback(targets=["words", "q"], exclude=["words"]), LoRACallback(also_train=["words"])):
        fit(lora, module=Words(torch.optim.SparseAdam))


@remedy("trainer/optimizers.py", "`ZeroRedundancyOptimizer` divides", "Use the plain optimizer")
def the_plain_optimizer(message: Expected, folder: Path) -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        """By its name alone: the real one needs a process group."""

    class Chooses(Lit):
        optimizer: type[torch.optim.SGD] = ZeroRedundancyOptimizer

        def configure_optimizers(self) -> object:
            return self.optimizer(self.parameters(), lr=0.1)

    class Plain(Chooses):
        optimizer = torch.optim.SGD

    with message:
        fit(LoRACallback(), module=Chooses())
    fit(LoRACallback(), module=Plain())
