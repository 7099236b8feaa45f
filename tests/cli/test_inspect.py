"""What adapters' files hold: PEFT directories, files alone, checkpoints of runs."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_lora import LoRACallback
from lightning_lora.cli.inspect import inspect_files
from tests.helpers.on_disk import attention_pairs, values, write_adapter


def test_a_peft_directory(tmp_path):
    whole = {"score.weight": values(2, 8)}
    path = write_adapter(
        tmp_path / "a",
        attention_pairs(),
        whole,
        {"lightning_lora.base": "{}", "step": "12"},
        alpha_pattern={"v_proj": 3},
    )
    found = inspect_files(path)
    assert (found.kind, found.fingerprint, found.others) == ("PEFT directory", True, {"score.weight": (2, 8)})
    for layer in found.layers:
        A, B = attention_pairs()[layer.name]
        scale = 1.0 if layer.name.endswith("v_proj") else 2.0
        assert (layer.r, layer.scale, layer.dtype) == (3, scale, "F32")
        assert (layer.in_features, layer.out_features, layer.parameters) == (8, len(B), A.numel() + B.numel())
        assert layer.norm == pytest.approx(float(scale * (B.double() @ A.double()).norm()))
    assert found.parameters() == sum(A.numel() + B.numel() for A, B in attention_pairs().values())
    assert found.norm() == pytest.approx(math.hypot(*(layer.norm for layer in found.layers)))
    assert found.about["step"] == "12" and "lightning_lora.base" not in found.about


def test_a_file_alone(tmp_path):
    path = write_adapter(tmp_path / "a", attention_pairs())
    (path / "adapter_config.json").unlink()
    found = inspect_files(path / "adapter_model.safetensors")
    assert (found.kind, found.fingerprint) == ("adapter file", False)
    A, B = attention_pairs()[found.layers[0].name]
    assert found.layers[0].scale is None and found.layers[0].norm == pytest.approx(
        float((B.double() @ A.double()).norm())
    )


def test_nan_is_shown(tmp_path):
    A, B = values(3, 8), values(8, 3)
    found = inspect_files(write_adapter(tmp_path / "a", {"q": (A * math.nan, B)}))
    assert math.isnan(found.layers[0].norm)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file of a real run, and the module after it."""
    model, folder = BoringModel(), tmp_path_factory.mktemp("run")
    callback = LoRACallback(r=2, alpha=6, targets=["layer"], merge=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=3, limit_val_batches=0, callbacks=[callback],
        default_root_dir=folder, **quiet,
    )  # fmt: skip
    trainer.fit(model)
    return next(folder.rglob("*.ckpt")), model


def test_a_checkpoint(checkpoint):
    path, model = checkpoint
    found = inspect_files(path)
    (layer,), adapter = found.layers, model.layer.lora["default"]
    assert (found.kind, found.fingerprint, layer.name, layer.r, layer.scale) == ("checkpoint", True, "layer", 2, 3.0)
    assert layer.norm == pytest.approx(float((3 * adapter.B @ adapter.A).detach().norm()), rel=1e-5) and layer.norm > 0
    assert (found.about["epoch"], found.about["global_step"], found.about["r"]) == (0, 3, 2)


class Opens:
    def __reduce__(self):
        return open, ("/tmp/never", "w")


def test_what_is_no_adapter(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inspect_files(tmp_path / "none")
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="is a full checkpoint, without adapters"):
        inspect_files(path)
    torch.save({"state_dict": {}, "lightning_lora": {"format": 1}}, path)
    with pytest.raises(ValueError, match="does not say what adapter it holds"):
        inspect_files(path)
    cut = checkpoint[0].read_bytes()
    for data in (b"", b"hello", cut[: len(cut) // 2], pickle.dumps(Opens())):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read; is the file truncated"):
            inspect_files(path)
