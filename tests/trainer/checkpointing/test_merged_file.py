"""`merged=PATH`: one safetensors file with the merged model, exactly there."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from lightning_lora import LoRACallback, load_from_checkpoint, lora_parameters, merged_state_dict
from tests.helpers.models import Lit, checkpoints, data, net, trainer
from tests.helpers.runs import same
from tests.helpers.selection import slow_except


@pytest.mark.parametrize("merge", slow_except(["best", False], [True, "best", False]))
def test_the_file_holds_what_merge_names_under_the_keys_of_the_module(tmp_path, merge):
    files, module = checkpoints(tmp_path / "files", mode="max"), Lit(batch_norm=True, lr=0.3)
    lora = LoRACallback(r=4, also_train=["head"], merge=merge, merged=str(tmp_path / "a" / "model.st"))
    trainer(lora, files, max_epochs=2).fit(module, data(), data(1))
    saved = load_file(tmp_path / "a" / "model.st")
    assert same(saved, dict(merged_state_dict(module)))
    path = files.best_model_path if merge == "best" else files.last_model_path
    assert same(saved, dict(load_from_checkpoint(Lit, path, merge=True).state_dict()))
    assert bool(list(lora_parameters(module))) and (".lora." in "".join(module.state_dict())) is (merge is False)
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["model.st"]
    Lit(batch_norm=True).load_state_dict(saved)


class Tied(LightningModule):
    """An embedding and two heads of one weight; the second head is adapted."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.other = nn.Embedding(9, 16), nn.Linear(16, 9), nn.Linear(16, 9)
        self.head.weight = self.other.weight = self.embedding.weight
        self.net = torch.compile(net(), backend="eager")

    def training_step(self, batch, index):
        return (self.head(batch[0]) + self.other(batch[0])).square().mean() + self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_tied_tensors_are_written_once_and_named_in_the_metadata(tmp_path):
    module, path = Tied(), tmp_path / "model.safetensors"
    lora = LoRACallback(r=2, targets=["other", "net.layers.0.q"], merged=str(path), merge=False, liveness=False)
    trainer(lora, max_epochs=1).fit(module, data())
    expected = merged_state_dict(module)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embedding.weight"}
    assert same(load_file(path), {key: value for key, value in expected.items() if key != "head.weight"})
    assert "net._orig_mod.layers.0.q.weight" in expected
    plain = Tied()
    plain.other.weight = nn.Parameter(torch.zeros(9, 16))
    load_model(plain, path)
    assert same(dict(plain.state_dict()), dict(expected))


@pytest.mark.parametrize(
    ("name", "words"),
    [("", "` must be a file, but is a directory"), ("file/model", r"` cannot be written: \S+/file is not a directory")],
)
def test_a_path_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, name, words):
    (tmp_path / "file").touch()

    class Never(Lit):
        def training_step(self, batch, index):
            raise AssertionError("a step")

    with pytest.raises(ValueError, match=rf"`merged='.*'{words}"):
        trainer(LoRACallback(r=4, merged=str(tmp_path / name))).fit(Never(), data())
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_at_the_end_is_a_warning_and_the_merge_is_done(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_lora.trainer.checkpointing.merged_file.write_merged", full)
    module = Lit()
    with pytest.warns(
        UserWarning, match=r"model'` was not written: \[Errno 28\].*device\. Use .*merged_state_dict\(module\)"
    ):
        trainer(LoRACallback(r=4, merged=str(tmp_path / "model")), max_epochs=1).fit(module, data())
    assert list(module.state_dict()) == list(Lit().state_dict())
    assert not torch.equal(module.net.layers[0].q.weight, Lit().net.layers[0].q.weight)
