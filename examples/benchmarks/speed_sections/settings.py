"""What a call of the script asks for: sizes, and which side of the equation computes an adapter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_lora import apply_lora

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
COMPUTES = ("auto", "activations", "weights")
OURS = "lightning_lora"


@dataclass(frozen=True)
class Windows:
    """How long a row is measured: ``rounds`` windows of ``steps`` steps each."""

    rounds: int
    steps: int


@dataclass(frozen=True)
class Settings:
    """The options of a call.

    Args:
        tiny: small shapes and few steps, to try the script.
        computes: values of ``compute``; each gives a row of its own.
        busy: whether each section profiles a step of each row in addition.
        files_size: size of the checkpoint in the section "files", a key of ``merge_files.SIZES``.
    """

    tiny: bool = False
    computes: tuple[str, ...] = ("auto",)
    busy: bool = False
    files_size: str = "7b"

    @property
    def small(self) -> bool:
        """Whether a section for GPUs takes its small shapes."""
        return self.tiny or not CUDA

    def windows(self, rounds: int, steps: int) -> Windows:
        """These windows, or the fewest that give a median."""
        return Windows(2, 1) if self.small else Windows(rounds, steps)

    def named(self, compute: str, suffix: str = "") -> str:
        """The name of a row of this package."""
        side = "" if self.computes == ("auto",) else f" ({compute})"
        return f"{OURS}{side}{suffix}"

    def names(self, suffix: str = "") -> list[str]:
        """The names of this package's rows."""
        return [self.named(compute, suffix) for compute in self.computes]

    def ours(self, start: Callable[[str], Any], suffix: str = "") -> dict[str, Callable[[], Any]]:
        """A row for each value of ``compute``; ``start`` takes the value."""
        return {self.named(compute, suffix): lambda compute=compute: start(compute) for compute in self.computes}


def compute_argument(compute: str, function: Callable[..., Any] = apply_lora) -> dict[str, str]:
    """``compute=`` for ``function``, where its signature has the argument.

    Raises:
        ValueError: if it has not, and ``compute`` asks for one side.
    """
    if "compute" in inspect.signature(function).parameters:
        return {"compute": compute}
    if compute != "auto":
        name = getattr(function, "__name__", function)
        raise ValueError(
            f"`--compute {compute}` needs a version of lightning_lora whose {name} takes `compute`, but this version "
            "does not. Leave `--compute` out."
        )
    return {}
