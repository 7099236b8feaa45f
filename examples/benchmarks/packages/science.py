"""Recommendation, cells, molecules, images and text: RecTools, scvi-tools, chemprop, diffusers, x-transformers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from trial import TRAINER, Row, Trial, callbacks

GIVEN: dict[str, Any] = {}


def rectools_trainer() -> Any:
    """RecTools imports the function that makes its Trainer by name."""
    from pytorch_lightning import Trainer

    return Trainer(max_epochs=2, **TRAINER, **GIVEN)


def rectools() -> Iterator[Trial]:
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import BERT4RecModel, SASRecModel

    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(12), 10),
            Columns.Item: rng.integers(0, 20, 120),
            Columns.Weight: 1.0,
            Columns.Datetime: pd.date_range("2020", periods=120),
        }
    )
    data = Dataset.construct(frame)
    for cls in (SASRecModel, BERT4RecModel):
        for targets in ("attn", "all"):

            def trial(row: Row, targets: Any, cls: Any = cls) -> None:
                watch, both = callbacks(targets)
                with tempfile.TemporaryDirectory() as folder:
                    GIVEN.update(callbacks=both, default_root_dir=folder)
                    model = cls(
                        n_factors=8,
                        n_heads=2,
                        n_blocks=1,
                        session_max_len=8,
                        epochs=2,
                        get_trainer_func=rectools_trainer,
                        batch_size=4,
                    )
                    model.fit(data)
                    row.compare(watch, model.lightning_model, restored=False)
                    users = np.arange(12)

                    def scores(m: Any) -> Any:
                        return m.recommend(users, data, k=5, filter_viewed=False)[Columns.Score].to_numpy()

                    first = scores(model)
                    model.save(folder + "/saved")
                    GIVEN["callbacks"] = []  # its file is the plain merged model, which a LoRA run refuses
                    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = (
                        "1"  # RecTools' own load needs it without LoRA, too
                    )
                    row.same("reload", first, scores(cls.load(folder + "/saved")))

            yield cls.__name__, targets, trial


def scvi() -> Iterator[Trial]:
    import anndata
    from scvi.model import SCVI

    rng = np.random.default_rng(0)
    data = anndata.AnnData(rng.poisson(2, size=(64, 20)).astype(np.float32))
    SCVI.setup_anndata(data)

    def trial(row: Row, targets: Any) -> None:
        watch, both = callbacks(targets)
        model = SCVI(data, n_hidden=8, n_latent=2)
        model.train(
            max_epochs=2, accelerator="cpu", callbacks=both, batch_size=32, logger=False, enable_progress_bar=False
        )
        watch.base = {k.removeprefix("module."): v for k, v in watch.base.items()}
        watch.last = {k.removeprefix("module."): v for k, v in watch.last.items()}
        watch.best = {}
        watch.parameters = {k.removeprefix("module.") for k in watch.parameters}
        watch.adapted = [k.removeprefix("module.") for k in watch.adapted]
        row.compare(watch, model.module, restored=False)
        first = model.get_latent_representation()
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder + "/saved", save_anndata=True)
            row.same("reload", first, SCVI.load(folder + "/saved").get_latent_representation())

    yield "SCVI", "all", trial


def chemprop() -> Iterator[Trial]:
    from chemprop import data, featurizers, models, nn
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_lora import load_from_checkpoint

    smiles = ["C" * n + end for n in range(1, 9) for end in ("O", "N", "=O")]
    points = [data.MoleculeDatapoint.from_smi(smi, [float(len(smi))]) for smi in smiles]
    loader = data.build_dataloader(
        data.MoleculeDataset(points, featurizers.SimpleMoleculeMolGraphFeaturizer()),
        batch_size=8,
        num_workers=0,
        shuffle=False,
    )

    def build() -> Any:
        torch.manual_seed(0)
        return models.MPNN(
            nn.BondMessagePassing(d_h=16), nn.MeanAggregation(), nn.RegressionFFN(input_dim=16, hidden_dim=8)
        )

    def predictions(module: Any) -> Any:
        return torch.cat(Trainer(**TRAINER).predict(module, loader)).numpy()

    for save in ("adapter", "merged"):

        def trial(row: Row, targets: Any, save: str = save) -> None:
            watch, both = callbacks(targets, save=save)
            with tempfile.TemporaryDirectory() as folder:
                module, best = build(), ModelCheckpoint(folder, monitor="train_loss")
                Trainer(max_epochs=2, callbacks=[best, *both], **TRAINER).fit(module, loader)
                row.compare(watch, module, restored=False)
                if save == "merged":
                    loaded = models.MPNN.load_from_checkpoint(best.best_model_path)
                else:  # its class reads files in a way of its own, so a built module is given
                    loaded = load_from_checkpoint(build(), best.best_model_path, merge=True, weights_only=False)
                row.compare(watch, loaded, restored=True)
                if best.best_model_path.endswith(f"step={2 * len(loader)}.ckpt"):
                    row.same("predict", predictions(module), predictions(loaded))

        yield f"MPNN (save={save!r})", "all", trial


def diffusers() -> Iterator[Trial]:
    from diffusers import UNet2DConditionModel
    from lightning.pytorch import LightningModule, Trainer

    for targets in ("attn", "qv", "all"):

        def trial(row: Row, targets: Any) -> None:
            class Module(LightningModule):
                def __init__(self) -> None:
                    super().__init__()
                    self.unet = UNet2DConditionModel(
                        sample_size=8,
                        in_channels=4,
                        out_channels=4,
                        layers_per_block=1,
                        block_out_channels=(8, 16),
                        norm_num_groups=4,
                        cross_attention_dim=8,
                        attention_head_dim=4,
                        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                    )

                def training_step(self, batch: Any, index: int) -> Any:
                    x, t, c = batch
                    return (self.unet(x, t, encoder_hidden_states=c).sample - x).square().mean()

                def configure_optimizers(self) -> Any:
                    return torch.optim.AdamW(self.parameters(), 1e-3)

            watch, both = callbacks(targets)
            items = [(torch.randn(4, 8, 8), torch.tensor(3), torch.randn(5, 8)) for _ in range(8)]
            with tempfile.TemporaryDirectory() as folder:
                module = Module()
                trainer = Trainer(max_epochs=2, callbacks=both, default_root_dir=folder, **TRAINER)
                trainer.fit(module, torch.utils.data.DataLoader(items, batch_size=4))
                row.compare(watch, module, restored=False)
                x, t, c = items[0]
                first = module.unet.eval()(x[None], t, encoder_hidden_states=c[None]).sample.detach()
                module.unet.save_pretrained(folder + "/saved")
                loaded = UNet2DConditionModel.from_pretrained(folder + "/saved").eval()
                row.same("reload", first, loaded(x[None], t, encoder_hidden_states=c[None]).sample.detach())

        yield "UNet2DConditionModel", targets, trial


def x_transformers() -> Iterator[Trial]:
    from lightning.pytorch import LightningModule, Trainer
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    def build() -> Any:
        torch.manual_seed(0)
        return AutoregressiveWrapper(
            TransformerWrapper(num_tokens=32, max_seq_len=16, attn_layers=Decoder(dim=16, depth=2, heads=2))
        )

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    for targets in ("attn", "qv", "all"):

        def trial(row: Row, targets: Any) -> None:
            watch, both = callbacks(targets)
            tokens = torch.randint(0, 32, (16, 16))
            loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=4)
            with tempfile.TemporaryDirectory() as folder:
                module = Module()
                Trainer(max_epochs=2, callbacks=both, default_root_dir=folder, **TRAINER).fit(module, loader)
                row.compare(watch, module, restored=False)
                first = module.net.eval()(tokens).detach()
                torch.save(module.net.state_dict(), folder + "/saved.pt")
                loaded = build().eval()
                loaded.load_state_dict(torch.load(folder + "/saved.pt"))
                row.same("reload", first, loaded(tokens).detach())

        yield "AutoregressiveWrapper(Decoder)", targets, trial
