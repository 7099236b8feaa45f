"""The picture of `lightning-lora inspect --plot`: what is drawn, where it is written, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_lora import LoRACallback, TuneCallback
from lightning_lora.cli.inspect import inspect_files, read_deltas
from lightning_lora.cli.inspect_plot import drawing
from lightning_lora.cli.main import main
from tests.helpers.on_disk import attention_pairs, listing, pair, write_adapter

pytest.importorskip("matplotlib")
MAGIC = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter", attention_pairs())


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAGIC)
def test_a_picture_is_written(adapter, tmp_path, capsys, kind):
    out = tmp_path / f"picture.{kind}"
    assert main(["inspect", str(adapter), "--plot", str(out)]) == 0
    assert out.read_bytes().startswith(MAGIC[kind])
    text = capsys.readouterr().out
    assert text.endswith(f"drawn in {out}\n") and "4 adapted layers" in text
    assert listing(tmp_path) == sorted([out.name, *(f"adapter{end}" for end in ("", *ENDS))])


ENDS = ("/adapter_config.json", "/adapter_model.safetensors")


def test_it_draws_norms_and_singular_values(adapter):
    figure = drawing(inspect_files(adapter), read_deltas(adapter))
    left, right = figure.axes
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]
    products = {name: 2 * B.double() @ A.double() for name, (A, B) in attention_pairs().items()}
    for name, point, line in zip(names, left.lines, right.lines, strict=True):
        S = torch.linalg.svdvals(products[name])[:3]
        assert point.get_ydata()[0] == pytest.approx(float(S.norm()))
        assert list(line.get_ydata()) == pytest.approx(S.tolist())
        assert point.get_label() == line.get_label() and point.get_color() == line.get_color()
    assert str(adapter)[-60:] in figure.get_suptitle() and "4 layers, rank 3" in figure.get_suptitle()
    assert [text.get_text() for text in figure.legends[0].texts] == [line.get_label() for line in left.lines]
    assert left.get_legend() is None and right.get_legend() is None


def test_blocks_are_in_the_order_of_their_numbers(tmp_path):
    pairs = {f"layers.{block}.q": pair(8, 8, seed=block, size=1.0 + block) for block in range(12)}
    path = write_adapter(tmp_path / "a", pairs)
    assert list(read_deltas(path)) == [f"layers.{block}.q" for block in range(12)]


def test_a_file_without_a_scale(adapter):
    (adapter / "adapter_config.json").unlink()
    path = adapter / "adapter_model.safetensors"
    assert drawing(inspect_files(path), read_deltas(path)).get_suptitle().endswith("rank 3, without the scale")


def run(folder, callback):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    model = BoringModel()
    Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=3, limit_val_batches=0, callbacks=[callback],
        default_root_dir=folder, **quiet,
    ).fit(model)  # fmt: skip
    return next(folder.rglob("*.ckpt")), model


@pytest.mark.slow
def test_a_checkpoint(tmp_path):
    path, model = run(tmp_path, LoRACallback(r=2, alpha=6, targets=["layer"], merge=False))
    adapter = model.layer.lora["default"]
    ((B, A),) = read_deltas(path)["layer"]
    torch.testing.assert_close(B @ A, 3 * (adapter.B.double() @ adapter.A.double()).detach())
    assert main(["inspect", str(path), "--plot", str(tmp_path / "x.png")]) == 0


def test_a_method_without_pairs(tmp_path, capsys):
    path, _ = run(tmp_path, TuneCallback("bias"))
    assert main(["inspect", str(path), "--plot", str(tmp_path / "x.png")]) == 1
    assert "holds no A and B, so there is no update to draw: leave `--plot` out" in capsys.readouterr().err
    assert main(["inspect", str(path)]) == 0


@pytest.mark.slow
def test_refusals(adapter, tmp_path, capsys):
    out = tmp_path / "x.png"
    calls = {
        "`--plot` must be a file that ends in .png, .pdf, .svg, but got `x.jpeg`": ["--plot", "x.jpeg"],
        "is no directory: make it first": ["--plot", str(tmp_path / "none" / "x.png")],
        "exists: choose another name, or give --overwrite": ["--plot", str(out)],
    }
    out.write_text("mine")
    for words, arguments in calls.items():
        assert main(["inspect", str(adapter), *arguments]) == 1
        assert words in capsys.readouterr().err
    assert out.read_text() == "mine"
    (tmp_path / "none").mkdir()
    assert main(["inspect", str(adapter), "--plot", str(tmp_path / "none" / "x.png")]) == 0
    assert main(["inspect", str(adapter), "--plot", str(out), "--overwrite"]) == 0
    assert out.read_bytes().startswith(MAGIC["png"])


def test_without_matplotlib(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(adapter), "--plot", str(tmp_path / "x.png")]) == 1
    assert 'not installed: pip install "lightning-lora[plot]"' in capsys.readouterr().err
    assert main(["inspect", str(adapter)]) == 0
