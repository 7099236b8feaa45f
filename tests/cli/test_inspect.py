"""What adapters' files hold: PEFT directories, files alone, checkpoints of runs."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_lora import LoRACallback, LoRAConfig, TuneCallback, apply_lora
from lightning_lora.cli.inspect import inspect_files
from lightning_lora.cli.reports import inspection_text
from tests.helpers.models import Lit, checkpoints, data, trainer
from tests.helpers.on_disk import attention_pairs, values, write_adapter
from tests.helpers.several import callback_of


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


def test_directories_of_several_adapters(tmp_path):
    """Each pair with its adapter; what they record alike is shown once."""
    for name, alpha in (("fr", 3), ("de", 6)):
        write_adapter(tmp_path / name, attention_pairs(), None, {"step": "12", "epoch": name}, lora_alpha=alpha)
    together = inspect_files(tmp_path)
    assert together.adapters() == ["de", "fr"] and together.about["step"] == "12"
    assert {key: value for key, value in together.about.items() if "epoch" in key} == {
        "epoch of de": "de",
        "epoch of fr": "fr",
    }
    for name in together.adapters():
        alone = inspect_files(tmp_path / name)
        layers = [layer for layer in together.layers if layer.adapter == name]
        assert [replace(layer, adapter="") for layer in layers] == alone.layers
        assert together.norm(name) == alone.norm() and together.parameters(name) == alone.parameters()


def test_a_checkpoint_of_several_adapters(tmp_path):
    """Those that trained, and those that were kept."""
    apply_lora(module := Lit(), LoRAConfig(r=2, targets=["q"], name="fr"))
    config = LoRAConfig(targets=["q", "mlp"], adapters={"de": {"r": 3}, "es": {"alpha": 16}})
    files = checkpoints(tmp_path)
    settings = {"max_epochs": 1, "limit_train_batches": 2}
    trainer(callback_of(config, {"fr": 1.0}), files, **settings).fit(module, data(), data(1))
    found = inspect_files(Path(files.last_model_path))
    assert {(layer.adapter, layer.r, layer.scale) for layer in found.layers} == {
        ("de", 3, 1.0),
        ("es", 8, 2.0),
        ("fr", 2, 1.0),
    }
    for layer in found.layers:
        pair = module.get_submodule(layer.name).lora[layer.adapter]
        assert layer.norm == pytest.approx(float((pair.scale * pair.B @ pair.A).detach().norm()), rel=1e-5)
    assert [line.partition(":")[0] for line in found.about["adapters"]] == ["de", "es", "fr (kept)"]
    text = inspection_text(found)
    assert "checkpoint, adapters de, es, fr: 10 pairs, rank 2, 3, 8" in text.splitlines()[0]
    assert text.splitlines()[1].split()[-1] == "adapter"


def test_a_checkpoint_of_another_method_names_it(tmp_path):
    files = checkpoints(tmp_path)
    callback = TuneCallback("bias", also_train=["head"])
    trainer(callback, files, max_epochs=1, limit_train_batches=2).fit(Lit(), data(), data(1))
    found = inspect_files(Path(files.last_model_path))
    assert (found.method, found.layers) == ("tune", [])
    assert "checkpoint, method tune, 14 tensors" in inspection_text(found).splitlines()[0]


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
    for content in (b"", b"hello", cut[: len(cut) // 2], pickle.dumps(Opens())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read; is the file truncated"):
            inspect_files(path)
