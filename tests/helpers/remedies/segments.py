"""Remedies of messages about task embeddings."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_lora import AdapterCallback, BottleneckConfig, adapt, use_segments
from tests.helpers.models import Encoder, LitEncoder, data, trainer
from tests.helpers.remedies.case import Expected, remedy

CONFIG, SEGMENTS = "methods/bottleneck/config.py", "methods/bottleneck/segments.py"
BLOCK = BottleneckConfig(2, "block", segment_count=2)
X, INDEX = torch.ones(3, 16), torch.tensor([0, 1, 1])


@remedy(CONFIG, "`segments={}` needs the number of segments", "'task'", "Give `segment_count`")
def segments_without_their_number(message: Expected, folder: Path) -> None:
    with message:
        AdapterCallback(2, "block", segments="task")
    AdapterCallback(2, "block", segments="task", segment_count=2)


@remedy(CONFIG, "`segment_count={}` adds task embeddings", "placement='houlsby'", "take placement='block'")
def segments_of_another_placement(message: Expected, folder: Path) -> None:
    with message:
        AdapterCallback(2, segment_count=2)
    AdapterCallback(2)
    AdapterCallback(2, "block", segment_count=2)


@remedy(
    SEGMENTS, "`{}` has task embeddings, and this call", "`layers.0`", "with use_segments(model, index)", "segments"
)
def a_call_without_segments(message: Expected, folder: Path) -> None:
    adapt(model := Encoder(), BLOCK)
    with message:
        model(X)
    with use_segments(model, INDEX):
        model(X)
    callback = AdapterCallback(2, "block", segments=1, segment_count=3)
    trainer(callback, max_epochs=1, limit_train_batches=1).fit(LitEncoder(), data())


@remedy(SEGMENTS, "`{}` gets an input of shape {}, and the model", "`layers.0`", "Use batch_first=True")
def segments_of_either_dimension(message: Expected, folder: Path) -> None:
    for batch_first in (False, True):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
        adapt(model, BLOCK)
        x = torch.ones(3, 3, 8)
        with use_segments(model, INDEX):
            if batch_first:
                layer(x)
            else:
                with message:
                    layer(x)


@remedy("trainer/batches/entry.py", "`{}={}` must be an entry of every batch", "`segments='task'`", "Let the dataset")
def a_batch_without_segments(message: Expected, folder: Path) -> None:
    def fit(key: str | int) -> None:
        callback = AdapterCallback(2, "block", segments=key, segment_count=3)
        trainer(callback, max_epochs=1, limit_train_batches=1).fit(LitEncoder(), data())

    with message:
        fit("task")
    fit(1)
