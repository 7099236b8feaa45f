"""Modules that were not made for LoRA, as people write them: a GAN, and a network with everything in its optimizer."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, lora_parameters, unmerge_lora
from tests.helpers.models import trainer


class GAN(LightningModule):
    """Two optimizers, manual optimization, schedulers stepped by hand, a gradient penalty (double backward)."""

    def __init__(self, latent: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.generator = nn.Sequential(
                nn.Linear(latent, 32), nn.LeakyReLU(0.2), nn.BatchNorm1d(32), nn.Linear(32, 12)
            )
            self.discriminator = nn.Sequential(nn.Linear(12, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def training_step(self, batch: list[Tensor], index: int) -> None:
        real, (opt_g, opt_d) = batch[0], self.optimizers()
        noise = torch.randn(len(real), self.hparams.latent, device=self.device)
        self.toggle_optimizer(opt_g)
        loss = F.softplus(-self.discriminator(self.generator(noise))).mean()
        self.manual_backward(loss)
        opt_g.step()
        opt_g.zero_grad()
        self.untoggle_optimizer(opt_g)
        self.toggle_optimizer(opt_d)
        fake = self.generator(noise).detach()
        mixed = ((real + fake) / 2).requires_grad_(True)
        slope = torch.autograd.grad(self.discriminator(mixed).sum(), mixed, create_graph=True)[0]
        loss = F.softplus(self.discriminator(fake)).mean() + F.softplus(-self.discriminator(real)).mean()
        self.manual_backward(loss + 0.1 * (slope.norm(dim=1) - 1).square().mean())
        opt_d.step()
        opt_d.zero_grad()
        self.untoggle_optimizer(opt_d)
        self.lr_schedulers().step()

    def configure_optimizers(self) -> object:
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
        return [opt_g, opt_d], [torch.optim.lr_scheduler.ExponentialLR(opt_g, 0.99)]


class Tabular(LightningModule):
    """Weight-decay groups, OneCycleLR by step, BatchNorm, dropout, a hook in the optimizer step, clipped gradients."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            body = [nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 24), nn.ReLU()]
            self.body, self.head = nn.Sequential(*body), nn.Linear(24, 1)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = F.mse_loss(self.head(self.body(batch[0])).squeeze(1), batch[0].sum(1))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", F.mse_loss(self.head(self.body(batch[0])).squeeze(1), batch[0].sum(1)))

    def configure_optimizers(self) -> object:
        decay = [p for name, p in self.named_parameters() if p.ndim > 1]
        rest = [p for name, p in self.named_parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Look(Callback):
    def on_train_end(self, trainer, pl_module):
        self.groups = [[len(g["params"]) for g in optimizer.param_groups] for optimizer in trainer.optimizers]
        self.moved = [n for n, p in lora_parameters(pl_module) if n.endswith("B") and p.abs().max() > 0]
        self.base = {n: p.detach().clone() for n, p in pl_module.named_parameters() if ".lora." not in n}
        pl_module.eval()
        self.outputs = outputs(pl_module)
        pl_module.train()


def outputs(module: LightningModule) -> Tensor:
    x = torch.linspace(-1, 1, 96)
    if isinstance(module, GAN):
        return module.discriminator(module.generator(x.view(12, 8))).detach()
    return module.head(module.body(x.view(8, 12))).detach()


def loader(shuffle: bool = False) -> DataLoader:
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=16, shuffle=shuffle)


def run(cls, folder, epochs, ckpt=None, **kwargs):
    torch.manual_seed(4 if ckpt is None else 44)
    files, look, module = ModelCheckpoint(folder, save_last=True), Look(), cls()
    arguments = {"r": 3, "targets": "all", **kwargs}
    clip = {} if cls is GAN else {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    runner = trainer(LoRACallback(**arguments), files, look, max_epochs=4, **clip)
    runner.fit_loop.max_epochs = 4
    if epochs < 4:
        runner.callbacks.insert(0, StopAfter(epochs))
    runner.fit(module, loader(shuffle=True), ckpt_path=ckpt)
    return module, look, torch.load(files.last_model_path, weights_only=True)


class StopAfter(Callback):
    """Ends early with the schedule of the whole run."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize(("cls", "groups", "layers"), [(GAN, [[4], [4]], 4), (Tabular, [[4, 0]], 2)])
def test_trains_resumes_and_merges_with_no_change_to_its_code(cls, groups, layers, tmp_path):
    if cls is Tabular:
        layers, groups = 3, [[6, 0]]
    kwargs = {"targets": ["re:.*"]} if cls is Tabular else {}
    module, look, four = run(cls, tmp_path / "a", 4, **kwargs)
    assert look.groups == groups and len(look.moved) == layers
    base = dict(cls().named_parameters())
    assert all(torch.equal(look.base[name], parameter) for name, parameter in base.items())
    assert {n: type(m) for n, m in module.named_modules()} == {n: type(m) for n, m in cls().named_modules()}
    torch.testing.assert_close(outputs(module.eval()), look.outputs, rtol=1e-5, atol=1e-5)
    run(cls, tmp_path / "b", 2, **kwargs)
    _, _, resumed = run(cls, tmp_path / "c", 4, tmp_path / "b" / "last.ckpt", **kwargs)
    assert resumed["global_step"] == four["global_step"]
    assert resumed["state_dict"].keys() == four["state_dict"].keys()
    for name, value in four["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    unmerge_lora(module)
    assert all(torch.equal(module.get_parameter(name), parameter) for name, parameter in base.items())


def test_adapters_of_the_generator_alone_leave_the_discriminator_frozen(tmp_path):
    _, look, _ = run(GAN, tmp_path, 1, targets=["generator.0", "generator.3"])
    assert look.groups == [[4], [0]]
    assert all(name.startswith("generator") for name in look.moved) and len(look.moved) == 2
