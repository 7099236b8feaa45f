"""One setting of the table as rows: the bound, full fine-tuning, peft, and this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters
from speed_sections.rows import BOUND, FULL, PEFT_BF16, PEFT_FP32, Start
from speed_sections.settings import Settings, compute_argument
from speed_sections.timing import Step


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Args:
        make: the base, on its device, in training mode.
        lowest: the parameter at the bottom that trains in the bound, so that the gradient flows through the backbone.
        step: a training step of a model whose trained parameters require a gradient.
        targets: names of the adapted layers, in peft's words and in ours.
        r: rank; the scale is 1.
        dropout: of the adapters.
    """

    make: Callable[[], nn.Module]
    lowest: Callable[[nn.Module], nn.Parameter]
    step: Callable[[nn.Module], Step]
    targets: list[str]
    r: int
    dropout: float = 0.0

    def references(self) -> dict[str, Start]:
        return {BOUND: self.bound, FULL: lambda: self.step(self.make())}

    def rows(self, settings: Settings) -> dict[str, Start]:
        """The references, peft in its better setting, this package.

        On a bf16 base peft is faster with bf16 adapters: for fp32 ones, its default, it casts the inputs to fp32.
        """
        return {**self.references(), **self.peft_bf16(), **self.ours(settings)}

    def rows_with_fp32(self, settings: Settings) -> dict[str, Start]:
        """The same and peft's default."""
        return {**self.references(), **self.peft_fp32(), **self.peft_bf16(), **self.ours(settings)}

    def bound(self) -> Step:
        return self.step(frozen_but(self.make(), self.lowest))

    def peft_bf16(self) -> dict[str, Start]:
        return {PEFT_BF16: lambda: self.step(self._by_peft(fp32=False))}

    def peft_fp32(self) -> dict[str, Start]:
        return {PEFT_FP32: lambda: self.step(self._by_peft(fp32=True))}

    def ours(self, settings: Settings, suffix: str = "", targets: list[str] | str | None = None) -> dict[str, Start]:
        """A row for each side that is asked for, with other ``targets`` where a preset is measured."""
        config = LoRAConfig(r=self.r, targets=targets or self.targets, dropout=self.dropout)
        return settings.ours(partial(self._ours, config), suffix)

    def _ours(self, config: LoRAConfig, compute: str) -> Step:
        return self.step(adapted(self.make(), config, compute))

    def _by_peft(self, fp32: bool) -> nn.Module:
        return adapted_by_peft(self.make(), self.targets, self.r, self.dropout, fp32)


def frozen_but(model: nn.Module, trained: Callable[[nn.Module], nn.Parameter]) -> nn.Module:
    """``model`` with one parameter that trains."""
    model.requires_grad_(False)
    trained(model).requires_grad_()
    return model


def adapted(model: nn.Module, config: LoRAConfig, compute: str) -> nn.Module:
    """``model`` with adapters of this package, as after some steps."""
    apply_lora(model, config, **compute_argument(compute))
    return with_trained_B(model, [value for name, value in lora_parameters(model) if name.endswith("B")])


def adapted_by_peft(
    model: nn.Module, targets: list[str], r: int, dropout: float = 0.0, fp32: bool = False
) -> nn.Module:
    """``model`` with adapters of peft, as after some steps."""
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=targets, lora_dropout=dropout)
    device = next(model.parameters()).device
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32).to(device).train()
    names = ("lora_B", "lora_embedding_B")
    return with_trained_B(wrapped, [value for key, value in wrapped.named_parameters() if any(n in key for n in names)])


def with_trained_B(model: nn.Module, every_B: list[nn.Parameter]) -> nn.Module:
    """A GPU multiplies zeros faster than other numbers, so B is not left at zero."""
    for B in every_B:
        nn.init.normal_(B, std=0.02)
    return model
