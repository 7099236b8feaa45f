"""Tables: pytorch_tabular and deeptab."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from trial import TRAINER, Row, Trial, callbacks


def pytorch_tabular() -> Iterator[Trial]:
    from pytorch_tabular import TabularModel, models
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig

    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(64, 4)), columns=list("abcd"))
    frame["k"] = rng.integers(0, 3, 64).astype(str)
    frame["y"] = (frame.a > 0).astype(int)
    head = {"layers": ""}
    configs = [
        (models.FTTransformerConfig, {"num_heads": 2, "num_attn_blocks": 1, "input_embed_dim": 8}, "attn"),
        (models.TabTransformerConfig, {"num_heads": 2, "num_attn_blocks": 1, "input_embed_dim": 8}, "attn"),
        (models.AutoIntConfig, {"num_heads": 2, "num_attn_blocks": 1, "attn_embed_dim": 8}, "attn"),
        (models.CategoryEmbeddingModelConfig, {"layers": "16-8"}, "all"),
        (models.DANetConfig, {"n_layers": 2, "k": 2}, "all"),
        (models.GANDALFConfig, {"gflu_stages": 2}, "all"),
    ]
    for config, arguments, targets in configs:

        def trial(row: Row, targets: Any, config: Any = config, arguments: Any = arguments) -> None:
            watch, both = callbacks(targets)
            with tempfile.TemporaryDirectory() as folder:
                model = TabularModel(
                    data_config=DataConfig(
                        target=["y"], continuous_cols=list("abcd"), categorical_cols=["k"], num_workers=0
                    ),
                    model_config=config(task="classification", head_config=head, **arguments),
                    optimizer_config=OptimizerConfig(),
                    trainer_config=TrainerConfig(
                        batch_size=16,
                        max_epochs=2,
                        accelerator="cpu",
                        progress_bar="none",
                        checkpoints_path=folder,
                        early_stopping=None,
                        auto_lr_find=False,
                        load_best=True,
                    ),
                    verbose=False,
                    suppress_lightning_logger=True,
                )
                model.fit(train=frame, validation=frame, callbacks=both)
                row.compare(watch, model.model, restored=True)
                first = model.predict(frame).filter(like="prob").to_numpy()
                model.save_model(folder + "/saved")
                loaded = TabularModel.load_model(folder + "/saved")
                row.same("reload", first, loaded.predict(frame).filter(like="prob").to_numpy())

        yield config.__name__, targets, trial


def deeptab() -> Iterator[Trial]:
    from deeptab import models

    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(64, 4)), columns=list("abcd"))
    y = frame.a.to_numpy() * 2
    for cls, targets in [
        (models.FTTransformerRegressor, "attn"),
        (models.TabTransformerRegressor, "attn"),
        (models.SAINTRegressor, "attn"),
        (models.AutoIntRegressor, "attn"),
        (models.MLPRegressor, "all"),
        (models.ResNetRegressor, "all"),
        (models.TabMRegressor, ["W"]),
        (models.MambaTabRegressor, "all"),
        (models.TabulaRNNRegressor, "all"),
        (models.NODERegressor, ["linear_final"]),
    ]:

        def trial(row: Row, targets: Any, cls: Any = cls) -> None:
            watch, both = callbacks(targets)
            with tempfile.TemporaryDirectory() as folder:
                model = cls()
                frame["k"] = rng.choice(["u", "v", "w"], 64)
                model.fit(frame, y, max_epochs=2, batch_size=16, callbacks=both, checkpoint_path=folder, **TRAINER)
                module = next(
                    v
                    for v in vars(model).values()
                    if isinstance(v, torch.nn.Module) and any(k.startswith("estimator.") for k in v.state_dict())
                )
                row.compare(watch, module, restored=True)
                first = model.predict(frame)
                if hasattr(model, "save"):
                    model.save(folder + "/saved")
                    row.same("reload", first, cls.load(folder + "/saved").predict(frame))
                else:
                    row.notes.append("reload: has none")

        yield cls.__name__, targets, trial
