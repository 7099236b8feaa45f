"""What is shown at the start of a run, and what Lightning and its loggers are told."""

from __future__ import annotations

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, lora_state_dict, plan_lora
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.model.report.summary import bytes_text, describe, output_heads
from tests.helpers.models import Lit, data, net, trainer

TABLE = """LoRA adapts
  module      layers  kind    in -> out  r  scale  trainable
  layers.*.q  2       Linear  16 -> 16   4  2      256
  layers.0.k  1       Linear  16 -> 16   2  4      64
  layers.*.v  2       Linear  16 -> 16   4  2      256
and trains in full: bn.weight (16), bn.bias (16)
608 trainable parameters, 21.21% of the base's 2,867; 2.4 kB in a checkpoint"""


def test_the_table():
    model = net(batch_norm=True)
    targets = ["q", "v", "layers.0.k"]
    apply_lora(model, LoRAConfig(r=4, alpha=8, targets=targets, rank_pattern={"k": 2}, also_train=["bn"]))
    assert describe(model) == TABLE


def test_the_sizes_are_those_of_a_count_by_hand():
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    apply_lora(model, LoRAConfig(r=4, targets="all"))
    by_hand = 784 * 4 + 4 * 256 + 256 * 4 + 4 * 128 + 128 * 4 + 4 * 10
    assert by_hand == 6248
    text = describe(model)
    assert f"{by_hand:,} trainable parameters, 2.66% of the base's 235,146; 25.0 kB in a checkpoint" in text


def test_the_size_of_a_merged_file_is_that_of_the_base_and_what_a_run_resumes_from():
    model = net(batch_norm=True)
    base = sum(value.nbytes for value in model.state_dict().values())
    apply_lora(model, LoRAConfig(r=4, alpha=8, targets=["q", "v"]))
    adapters = sum(value.nbytes for value in lora_state_dict(model).values())
    held = f"the merged model ({base / 1000:.1f} kB) and what trains ({adapters / 1000:.1f} kB)"
    assert describe(model, "merged").splitlines()[-2:] == [
        "512 trainable parameters, 17.86% of the base's 2,867",
        f"a checkpoint holds {held}",
    ]


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (net(), ["head"]),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)), ["2"]),
        (
            nn.ModuleDict({"body": nn.Linear(2, 2), "classifier": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))}),
            ["classifier.0", "classifier.1"],
        ),
        (nn.Conv2d(3, 8, 3), []),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), ["2"]),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Conv2d(8, 2, 1)), []),  # the output is a convolution's
        (nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4)})])}), []),  # in a block
        (
            nn.ModuleDict({"decode_head": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(4, 2, 1))}),
            [],  # as in SegFormer
        ),
        (
            nn.ModuleDict(
                {"roi_heads": nn.ModuleDict({"cls_score": nn.Linear(4, 2), "bbox_pred": nn.Linear(4, 8)})}
            ),  # as in Faster R-CNN
            ["roi_heads.cls_score", "roi_heads.bbox_pred"],
        ),
    ],
)
def test_heads(model, heads):
    assert output_heads(model) == heads


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (35e6, "35.0 MB"), (350e9, "350.0 GB"), (1.2e12, "1.2 TB")]
)
def test_bytes_text(size, text):
    assert bytes_text(size) == text


def test_it_is_shown_once_at_the_start_of_fit_and_not_of_test(log):
    module = Lit()
    trainer(LoRACallback(r=4), max_epochs=1).fit(module, data())
    trainer(LoRACallback(r=4)).test(Lit(), data(2), verbose=False)
    shown = [message for message in log if message.startswith("LoRA adapts")]
    assert len(shown) == 1 and "net.layers.*.q" in shown[0]


def test_it_says_what_merged_files_will_hold(log):
    trainer(LoRACallback(r=4, save="merged"), fast_dev_run=True).fit(Lit(), data())
    [shown] = [message for message in log if message.startswith("LoRA adapts")]
    assert shown.endswith("a checkpoint holds the merged model (11.3 kB) and what trains (4.1 kB)")


class Summarize(Callback):
    def on_fit_start(self, trainer, pl_module):
        summary = ModelSummary(pl_module)
        self.trainable, self.total = summary.trainable_parameters, summary.total_parameters


def test_lightnings_summary_counts_right():
    spy = Summarize()
    trainer(LoRACallback(r=4), spy, max_epochs=1).fit(Lit(), data())
    base = sum(p.numel() for p in net().parameters())
    assert spy.trainable == 8 * 4 * (16 + 16)
    assert spy.total == base + 8 * 4 * (16 + 16)


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_the_configuration_is_among_the_hyperparameters(logger, tmp_path):
    if logger is TensorBoardLogger:
        pytest.importorskip("tensorboard")
    log = logger(tmp_path)
    trainer(LoRACallback(r=4, targets=["q"], lr_scale=10.0), max_epochs=1, logger=log).fit(Lit(), data())
    [file] = tmp_path.rglob("hparams.yaml")
    saved = yaml.safe_load(file.read_text())
    assert saved["lr"] == 1e-2, "the module's own are there too"
    assert saved["lora"]["r"] == 4 and saved["lora"]["targets"] == ["q"] and saved["lora"]["lr_scale"] == 10.0


def test_rounding_losses_of_a_half_precision_merge_are_told(log):
    module = Lit()
    trainer(LoRACallback(r=4), max_epochs=1, precision="bf16-true").fit(module, BF16(data().dataset.tensors))
    [told] = [message for message in log if message.startswith("Merged")]
    assert "Merged 8 layers in bf16: the adapters of the last step (8). Rounding to the weights' dtype lost" in told
    assert "(in `net.layers." in told
    assert module.net.layers[0].q.weight.dtype == torch.bfloat16


class BF16(torch.utils.data.DataLoader):
    def __init__(self, tensors):
        x, y = tensors
        super().__init__(torch.utils.data.TensorDataset(x.bfloat16(), y), batch_size=8)


def nested(depth):
    attention = nn.ModuleDict(
        {"self_attention": nn.MultiheadAttention(16, 2), "output_projection_layer": nn.Linear(16, 16)}
    )
    model = attention
    for index in range(depth):
        model = nn.ModuleDict({f"a_long_name_of_a_module_{index}": nn.ModuleList([model])})
    return model


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_table_fits_a_terminal_and_speaks_plainly(depth):
    model = nested(depth)
    apply_lora(model, LoRAConfig(r=4, targets=["self_attention", "output_projection_layer"]))
    lines = describe(model).splitlines()
    table = [line for line in lines if "16 -> 16" in line]
    assert len(table) == 5 and max(map(len, table)) <= 80
    assert "NonDynamically" not in describe(model)
    assert sum("Linear" in line.split() for line in table) == 2, "the output of attention is a linear layer"
    names = "\n".join(lines)
    assert "self_attention.out_proj" in names and ("  a_long_name_of_a_module_" in names) == (depth > 0)


def test_a_rank_that_no_matrix_can_have_is_said():
    model = nn.Sequential(nn.Linear(32, 64))
    config = LoRAConfig(r=1000, targets="all")
    words = "r=1000 is more than `0` (32 -> 64) can use: any update of it has rank 32 at most, and A and B are larger"
    assert words in str(plan_lora(model, config))
    apply_lora(model, config)
    assert words in describe(model)
    assert "can use" not in str(plan_lora(nn.Sequential(nn.Linear(32, 64)), LoRAConfig(r=32, targets="all")))


def test_several_adapters_have_a_column_and_kept_ones_train_nothing():
    model = net()
    apply_lora(model, LoRAConfig(r=2, targets=["q"], name="fr"))
    LoRAMethod(LoRAConfig(r=4, targets=["mlp"], name="de"), keep={"fr": 1.0}).complete(model)
    lines = describe(model).splitlines()
    assert [line.split()[-2:] for line in lines[1:4]] == [["trainable", "adapter"], ["fr", "(kept)"], ["256", "de"]]
    assert lines[2].split()[-3] == "0"
    assert lines[4] == "256 trainable parameters, 9.03% of the base's 2,835; 1.5 kB in a checkpoint"
