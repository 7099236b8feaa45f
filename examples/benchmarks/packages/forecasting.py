"""Time series: gluonts, pytorch-forecasting, neuralforecast and darts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from trial import TRAINER, Row, Trial, callbacks


def gluonts() -> Iterator[Trial]:
    from gluonts.dataset.common import ListDataset
    from gluonts.model.predictor import Predictor
    from gluonts.torch.model import (
        d_linear,
        deepar,
        i_transformer,
        lag_tst,
        patch_tst,
        simple_feedforward,
        tft,
        tide,
        wavenet,
    )

    rng = np.random.default_rng(0)
    series = [{"start": pd.Timestamp("2020-01-01"), "target": rng.normal(size=120).cumsum()} for _ in range(4)]
    data = ListDataset(series, freq="D")
    both_series = ListDataset(
        [{"start": pd.Timestamp("2020-01-01"), "target": rng.normal(size=(2, 120)).cumsum(1)}],
        freq="D",
        one_dim_target=False,
    )
    classes = [
        (
            patch_tst.PatchTSTEstimator,
            {"patch_len": 4, "context_length": 16, "d_model": 8, "nhead": 2, "dim_feedforward": 16},
            "all",
        ),
        (
            i_transformer.ITransformerEstimator,
            {"context_length": 16, "d_model": 8, "nhead": 2, "dim_feedforward": 16},
            "attn",
        ),
        (
            lag_tst.LagTSTEstimator,
            {"context_length": 16, "freq": "D", "d_model": 8, "nhead": 2, "dim_feedforward": 16},
            "all",
        ),
        (deepar.DeepAREstimator, {"freq": "D", "hidden_size": 8}, ["param_proj.*"]),
        (simple_feedforward.SimpleFeedForwardEstimator, {"hidden_dimensions": [8, 8]}, "all"),
        (d_linear.DLinearEstimator, {"context_length": 16, "hidden_dimension": 8}, "all"),
        (
            tft.TemporalFusionTransformerEstimator,
            {"freq": "D", "context_length": 16, "hidden_dim": 8, "variable_dim": 8, "num_heads": 2},
            "attn",
        ),
        (tide.TiDEEstimator, {"freq": "D", "context_length": 16}, "all"),
        (wavenet.WaveNetEstimator, {"freq": "D", "num_residual_channels": 4, "num_skip_channels": 4}, "all"),
    ]
    for cls, arguments, targets in classes:

        def trial(row: Row, targets: Any, cls: Any = cls, arguments: Any = arguments) -> None:
            watch, both = callbacks(targets)
            with tempfile.TemporaryDirectory() as folder:
                estimator = cls(
                    prediction_length=4,
                    num_batches_per_epoch=3,
                    batch_size=4,
                    **arguments,
                    trainer_kwargs={**TRAINER, "max_epochs": 2, "callbacks": both, "default_root_dir": folder},
                )
                of = both_series if cls is i_transformer.ITransformerEstimator else data
                output = estimator.train_model(of)
                row.compare(watch, output.trained_net, restored=True)
                predictor = output.predictor

                def means(p: Any) -> Any:
                    torch.manual_seed(0)
                    np.random.seed(0)
                    return np.stack([forecast.mean for forecast in p.predict(of)])

                first = means(predictor)
                (Path(folder) / "saved").mkdir()
                predictor.serialize(Path(folder) / "saved")
                row.same("reload", first, means(Predictor.deserialize(Path(folder) / "saved")))

        yield cls.__name__, targets, trial


def pytorch_forecasting() -> Iterator[Trial]:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from pytorch_forecasting import DecoderMLP, NHiTS, TemporalFusionTransformer, TimeSeriesDataSet

    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"time": np.tile(np.arange(40), 2), "group": np.repeat(["a", "b"], 40), "value": rng.normal(size=80).cumsum()}
    )
    for cls, arguments, targets, save in [
        (TemporalFusionTransformer, {"hidden_size": 8, "attention_head_size": 2}, "attn", "merged"),
        (TemporalFusionTransformer, {"hidden_size": 8, "attention_head_size": 2}, "all", "merged"),
        (NHiTS, {"hidden_size": 8}, "all", "merged"),
        (DecoderMLP, {"hidden_size": 8}, "all", "merged"),
    ]:

        def trial(row: Row, targets: Any, cls: Any = cls, arguments: Any = arguments, save: str = save) -> None:
            watch, both = callbacks(targets, save=save)
            known = {"time_varying_known_reals": ["time"]} if cls is not NHiTS else {}
            data = TimeSeriesDataSet(
                frame,
                time_idx="time",
                target="value",
                group_ids=["group"],
                max_encoder_length=12,
                max_prediction_length=4,
                time_varying_unknown_reals=["value"],
                **known,
            )
            loader = data.to_dataloader(batch_size=8, num_workers=0)
            model = cls.from_dataset(data, **arguments)
            with tempfile.TemporaryDirectory() as folder:
                best = ModelCheckpoint(folder, monitor="train_loss_epoch")
                trainer = Trainer(max_epochs=2, callbacks=[best, *both], **TRAINER)
                trainer.fit(model, loader)
                row.compare(watch, model, restored=False)
                loaded = cls.load_from_checkpoint(best.best_model_path)
                row.compare(watch, loaded, restored=True)

        yield f"{cls.__name__} (save={save!r})", targets, trial


def neuralforecast() -> Iterator[Trial]:
    from neuralforecast import NeuralForecast, models

    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "unique_id": np.repeat(["a", "b"], 60),
            "ds": np.tile(pd.date_range("2020", periods=60), 2),
            "y": rng.normal(size=120).cumsum(),
        }
    )
    for name, arguments, targets in [
        ("NHITS", {"mlp_units": 3 * [[8, 8]]}, "all"),
        ("MLP", {"hidden_size": 8}, "all"),
        ("PatchTST", {"hidden_size": 8, "n_heads": 2}, "attn"),
        ("Informer", {"hidden_size": 8, "n_head": 2}, "attn"),
        ("Autoformer", {"hidden_size": 8, "n_head": 2}, "attn"),
        ("FEDformer", {"hidden_size": 16, "n_head": 8}, "attn"),
        ("TFT", {"hidden_size": 8, "n_head": 2}, "attn"),
        ("VanillaTransformer", {"hidden_size": 8, "n_head": 2}, "attn"),
        ("iTransformer", {"hidden_size": 8, "n_heads": 2, "n_series": 2}, "attn"),
        ("TimeXer", {"hidden_size": 8, "n_heads": 2, "n_series": 2, "patch_len": 4}, "attn"),
        ("LSTM", {"encoder_hidden_size": 8, "decoder_hidden_size": 8}, "all"),
        ("TSMixer", {"n_series": 2, "ff_dim": 8}, "all"),
    ]:

        def trial(row: Row, targets: Any, name: str = name, arguments: Any = arguments) -> None:
            watch, both = callbacks(targets)
            model = getattr(models, name)(
                h=4,
                input_size=12,
                max_steps=4,
                batch_size=8,
                callbacks=both,
                **TRAINER,
                **arguments,
            )
            forecast = NeuralForecast([model], freq="D")
            forecast.fit(frame)
            row.compare(watch, forecast.models[0], restored=False)
            first = forecast.predict()[name].to_numpy()
            with tempfile.TemporaryDirectory() as folder:
                forecast.save(folder + "/saved", save_dataset=True, overwrite=True)
                row.same("reload", first, NeuralForecast.load(folder + "/saved").predict()[name].to_numpy())

        yield name, targets, trial


def darts() -> Iterator[Trial]:
    from darts import TimeSeries
    from darts.models import (
        BlockRNNModel,
        NHiTSModel,
        NLinearModel,
        TFTModel,
        TiDEModel,
        TransformerModel,
        TSMixerModel,
    )

    rng = np.random.default_rng(0)
    series = TimeSeries.from_values(rng.normal(size=(80, 1)).cumsum(0).astype(np.float32))
    for cls, arguments, targets in [
        (
            TransformerModel,
            {"d_model": 8, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 16},
            "attn",
        ),
        (
            TransformerModel,
            {"d_model": 8, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 16},
            "all",
        ),
        (
            TFTModel,
            {
                "hidden_size": 8,
                "num_attention_heads": 2,
                "add_relative_index": True,
                "likelihood": None,
                "loss_fn": torch.nn.MSELoss(),
            },
            "attn",
        ),
        (NHiTSModel, {"layer_widths": 8}, "all"),
        (TiDEModel, {"hidden_size": 8, "temporal_width_past": 2}, "all"),
        (NLinearModel, {}, "all"),
        (BlockRNNModel, {"model": "LSTM", "hidden_dim": 8}, "all"),
        (TSMixerModel, {"hidden_size": 8, "ff_size": 8}, "all"),
    ]:

        def trial(row: Row, targets: Any, cls: Any = cls, arguments: Any = arguments) -> None:
            watch, both = callbacks(targets, save="merged")
            with tempfile.TemporaryDirectory() as folder:
                model = cls(
                    input_chunk_length=12,
                    output_chunk_length=4,
                    n_epochs=2,
                    batch_size=8,
                    random_state=0,
                    work_dir=folder,
                    model_name="m",
                    save_checkpoints=True,
                    force_reset=True,
                    pl_trainer_kwargs={**TRAINER, "callbacks": both},
                    **arguments,
                )
                model.fit(series)
                row.compare(watch, model.model, restored=False)
                first = model.predict(4).values()
                model.save(folder + "/saved.pt")
                row.same("reload", first, cls.load(folder + "/saved.pt", trusted=True).predict(4).values())
                best = cls.load_from_checkpoint("m", work_dir=folder, best=False, trusted=True)
                row.same("checkpoint", first, best.predict(4).values())

        yield f"{cls.__name__} (save='merged')", targets, trial
