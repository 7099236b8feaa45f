"""Run by .ci/run against the installed wheel: one fit of a module that Lightning ships, adapted, merged, typed."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import save_file

import lightning_lora

assert "site-packages" in lightning_lora.__file__
assert Path(lightning_lora.__file__).with_name("py.typed").exists()

model = BoringModel()
before = model.layer.weight.detach().clone()
callback = lightning_lora.LoRACallback(r=1, targets=["layer"])
Trainer(
    accelerator="cpu", max_epochs=1, limit_train_batches=4, limit_val_batches=0, logger=False, callbacks=[callback],
    enable_checkpointing=False, enable_progress_bar=False,
).fit(model)  # fmt: skip
assert type(model.layer) is torch.nn.Linear
assert not torch.equal(model.layer.weight, before)
lightning_lora.unmerge_lora(model)
assert torch.equal(model.layer.weight, before)
print(f"lightning_lora {lightning_lora.__version__} works as a wheel")
save_file({"up.weight": torch.ones(4, 4), "down.weight": torch.ones(2, 4)}, "model.safetensors")  # for the command line
