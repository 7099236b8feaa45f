"""The end of `fit`: what is merged, which file, and one line that says so."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging

from lightning_lora import LoRACallback, lora_parameters
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.model.record import is_merged
from tests.helpers.models import Lit, checkpoints, data, trainer


def last_line(log) -> str:
    [line] = [line for line in log if re.match(r"Merged|Nothing is merged|.*keeps its adapters", line)]
    return line


@pytest.mark.slow
@pytest.mark.parametrize("merge", [True, "best", False])
def test_one_line_says_what_was_merged_and_where_the_files_are(tmp_path, merge, log):
    files = checkpoints(tmp_path / "files")
    lora = LoRACallback(r=4, merge=merge, export=str(tmp_path / "peft"), merged=str(tmp_path / "model"))
    trainer(lora, files, max_epochs=2).fit(Lit(), data(), data(1))
    which = {
        True: "Merged 8 layers in fp32: the adapters of the last step (16).",
        "best": f"Merged 8 layers in fp32: the adapters of the best checkpoint, {files.best_model_path}.",
        False: "Nothing is merged (merge=False), the module keeps its adapters.",
    }
    where = f"Checkpoints: {files.dirpath}. PEFT directory: {tmp_path}/peft. Merged weights: {tmp_path}/model."
    assert last_line(log) == f"{which[merge]} {where}"


def test_a_run_without_files_names_none(log):
    trainer(LoRACallback(r=4, merged="model"), fast_dev_run=True).fit(Lit(), data())
    assert last_line(log) == "Merged 8 layers in fp32: the adapters of the last step (1)."
    assert not Path("model").exists()


class Takes(Callback):
    """Moves the best file away, or puts a directory in its place."""

    def __init__(self, puts: bool) -> None:
        self.puts = puts

    def on_train_end(self, trainer, pl_module):
        path = Path(trainer.checkpoint_callback.best_model_path)
        path.unlink()
        if self.puts:
            path.mkdir()


@pytest.mark.parametrize("puts", [False, True])
def test_a_best_file_that_is_gone_leaves_the_module_with_its_adapters(tmp_path, puts):
    files, module = checkpoints(tmp_path, save_last=None, save_top_k=1), Lit()
    words = "found a directory at" if puts else "found no file at"
    lora = LoRACallback(r=4, merge="best", export=str(tmp_path / "peft"), merged=str(tmp_path / "model"))
    with pytest.warns(UserWarning, match=rf"`merge='best'` {words} \S+\.ckpt, the path of .* The module keeps its"):
        trainer(Takes(puts), lora, files, max_epochs=1).fit(module, data(), data(1))
    assert len(dict(lora_parameters(module))) == 16
    assert torch.equal(module.net.layers[0].q.weight, Lit().net.layers[0].q.weight)
    assert not (tmp_path / "peft").exists() and not (tmp_path / "model").exists()
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_every_merge_of_a_run_is_computed_on_its_gpu(monkeypatch, tmp_path):
    """The meta device stands for a GPU; as it cannot compute, the sums are those of the CPU."""
    devices, gpu = [], torch.device("meta")

    def watched(verb):
        def called(method, model, device=None, *like):
            devices.append(device)
            return verb(method, model, device, *like)

        return called

    monkeypatch.setattr(LoRAMethod, "merge", watched(LoRAMethod.merge))
    monkeypatch.setattr(LoRAMethod, "unmerge", watched(LoRAMethod.unmerge))
    for place in ("end_of_fit", "kept_copies", "run"):
        monkeypatch.setattr(f"lightning_lora.trainer.{place}.gpu_of", lambda trainer: gpu)
    module, files = Lit(), checkpoints(tmp_path)
    fitting = trainer(LoRACallback(r=4), files, WeightAveraging())
    fitting.fit(module, data(), data(1))
    assert devices == [gpu, gpu]  # the module, and its average
    fitting.test(module, data(1), ckpt_path="best")  # unmerged and merged again
    assert devices == [gpu] * 6
    assert is_merged(module)
