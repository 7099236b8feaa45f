"""One training run of LoRA on SmolLM2-135M and the novels of Jane Austen, and its loss per held-out token.

The loss of a language model tells apart what accuracies cannot: two seeds differ by some thousandths of a nat. The base
is the 4-bit-rounded model that a package carries, in bf16 on a GPU and in fp32 on a CPU.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from real_data import CACHE, SMOLLM2, austen_novels, fetch
from recorded_runs import Record
from safetensors.torch import save_file
from smollm2 import GGUF
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, lora_state_dict, remove_lora

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
HELD_OUT = 20  # the last twentieth of each novel


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        targets: letters of the projections of every attention block, as "qv".
        r: rank.
        alpha: numerator of the scale alpha / r.
        rate: highest learning rate, after a warm-up over a twentieth of the steps and before a linear decay to 0.
        seed: of A and of the batches.
        steps: of AdamW.
    """

    targets: str
    r: int
    alpha: float
    rate: float
    seed: int
    steps: int

    def factor(self, step: int) -> float:
        """The share of the rate at a step."""
        return min(1.0, (step + 1) / max(1, self.steps // 20)) * (1 - step / self.steps)

    @property
    def config(self) -> LoRAConfig:
        """The configuration of LoRA."""
        projections = [PROJECTIONS[letter] for letter in self.targets]
        return LoRAConfig(r=self.r, alpha=self.alpha, targets=projections, seed=self.seed)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run.

    Args:
        batch: windows of a step.
        window: tokens.
        held_out: windows of the evaluation, at most.
    """

    batch: int
    window: int
    held_out: int


ON_GPU, ON_CPU = Sizes(batch=16, window=256, held_out=10_000), Sizes(batch=4, window=64, held_out=32)


class Study:
    """The base and the tokens on the device; ``run`` trains adapters on them and removes these again.

    Args:
        folder: of ``prepare``.
        adapters: folder for the adapters of runs with ``keep``; None writes none.
        model: the base, on the device; None loads it.
    """

    def __init__(self, folder: Path, adapters: Path | None = None, model: nn.Module | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sizes = ON_GPU if self.device.type == "cuda" else ON_CPU
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = load_base(folder).to(self.device, dtype) if model is None else model
        novels = [torch.from_numpy(np.load(path).astype(np.int64)) for path in sorted(folder.glob("novel_*.npy"))]
        cuts = [len(novel) - len(novel) // HELD_OUT for novel in novels]
        self.train = torch.cat([novel[:cut] for novel, cut in zip(novels, cuts, strict=True)]).to(self.device)
        windows = [
            novel[cut:].unfold(0, self.sizes.window, self.sizes.window) for novel, cut in zip(novels, cuts, strict=True)
        ]
        held_out = torch.cat(windows)
        self.held_out = held_out[:: -(-len(held_out) // self.sizes.held_out)].to(self.device)
        self.adapters = adapters
        self.base_loss = statistics.fmean(self.losses())

    def run(self, setting: Setting, *, keep: bool = False) -> Record:
        """Train, and return the losses.

        Args:
            setting: of the run.
            keep: whether to write the adapters.
        """
        apply_lora(self.model, setting.config)
        try:
            parameters = [parameter for _, parameter in lora_parameters(self.model)]
            self.fit(parameters, setting)
            losses = self.losses()
            if keep and self.adapters is not None:
                self.save(setting)
        finally:
            remove_lora(self.model)
        return {
            "trained": sum(parameter.numel() for parameter in parameters),
            "loss": statistics.fmean(losses),
            "base_loss": self.base_loss,
            "losses": [round(loss, 4) for loss in losses],
        }

    def fit(self, parameters: list[nn.Parameter], setting: Setting) -> None:
        """AdamW on the windows of the run."""
        optimizer = torch.optim.AdamW(parameters, lr=setting.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, setting.factor)
        self.model.train()
        for windows in self.windows(setting):
            self.token_losses(windows).mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def windows(self, setting: Setting) -> Iterator[Tensor]:
        """The batches of a run: random windows of the training text, the same ones for the same seed."""
        generator = torch.Generator().manual_seed(setting.seed)
        places = torch.arange(self.sizes.window, device=self.device)
        starts = torch.randint(
            len(self.train) - self.sizes.window, (setting.steps, self.sizes.batch), generator=generator
        )
        for start in starts.to(self.device):
            yield self.train[start[:, None] + places]

    @torch.no_grad()
    def losses(self) -> list[float]:
        """The mean loss per token of each held-out window."""
        self.model.eval()
        return torch.cat([self.token_losses(windows).mean(1) for windows in self.held_out.split(16)]).tolist()

    def token_losses(self, windows: Tensor) -> Tensor:
        """The cross entropy of every token but the first of each window, in nats."""
        logits = self.model(input_ids=windows, use_cache=False).logits[:, :-1].float()
        targets = windows[:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def save(self, setting: Setting) -> None:
        """Write A and B in fp16."""
        self.adapters.mkdir(parents=True, exist_ok=True)
        values = {name: value.half().contiguous() for name, value in lora_state_dict(self.model).items()}
        save_file(
            values, self.adapters / adapter_file(setting), metadata={"alpha": str(setting.alpha), "r": str(setting.r)}
        )


def load_base(folder: Path) -> nn.Module:
    """SmolLM2-135M in fp32; its weights are those of 4 and 8 bits."""
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)


def adapter_file(setting: Setting) -> str:
    """The file name of the adapters of a run."""
    return f"adapters_{setting.targets}_r{setting.r}_seed{setting.seed}.safetensors"


def prepare(folder: Path) -> None:
    """Write the model and the tokens of the six novels."""
    folder.mkdir(parents=True, exist_ok=True)
    source = fetch(SMOLLM2)
    shutil.copy(source / GGUF, folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    for number, novel in enumerate(austen_novels(), 1):
        np.save(folder / f"novel_{number}.npy", np.array(tokenizer(novel)["input_ids"], dtype=np.uint16))


def data_folder(given: Path | None) -> Path:
    """The folder of the data: the given one, or one in the cache."""
    folder = given or CACHE / "austen_runs"
    if given is None and not list(folder.glob("novel_6.npy")):
        prepare(folder)
    return folder
