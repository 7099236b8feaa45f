"""DDP with two CPU processes, and the launchers that start workers from the running process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_lora import LoRACallback, TuneCallback
from tests.helpers.models import Lit, checkpoints, data, net, trainer
from tests.helpers.runs import load
from tests.helpers.scripts import run_script


def two_processes(case: str, folder: Path) -> None:
    done = run_script("two_processes.py", case, folder, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_ranks_train_merge_and_test_alike(tmp_path):
    two_processes("train", tmp_path)
    results = [torch.load(tmp_path / f"train-{rank}.pt") for rank in (0, 1)]
    for rank, result in enumerate(results):
        assert result["rank"] == rank
        assert result["equal"] and result["still equal"] and result["drawn alike"]
        assert result["keys"] == list(Lit().state_dict())
        assert result["best"] == result["fresh"] == results[0]["best"]
    saved = load(Path(results[0]["path"]))["state_dict"]
    assert len(saved) == 16 and all(".lora.default." in name for name in saved)
    on_one_device = trainer(LoRACallback(r=4)).test(Lit(), data(2), ckpt_path=results[0]["path"], verbose=False)
    assert on_one_device[0]["test_loss"] == pytest.approx(results[0]["best"][0]["test_loss"], rel=1e-6)


@pytest.mark.slow
def test_resume_equals_the_uninterrupted_run_and_other_ranks_are_warned_of(tmp_path):
    two_processes("resume", tmp_path)
    two, resumed = (load(tmp_path / name / "last.ckpt") for name in ("two", "resumed"))
    path = tmp_path / "two" / "epoch=0.ckpt"
    one = load(path)
    assert two["global_step"] == resumed["global_step"] == 8 and one["global_step"] == 4
    for name, value in two["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    states = one["lightning_lora"]["random_states"]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])
    with pytest.warns(UserWarning, match=r"random state of 2 processes and this run has 1: it is not restored"):
        trainer(LoRACallback(r=4), max_epochs=2).fit(Lit(dropout=0.2), data(), ckpt_path=path)


@pytest.mark.slow
def test_quantized_weights_are_those_of_the_first_rank_on_all(tmp_path):
    two_processes("quantized", tmp_path)
    results = [torch.load(tmp_path / f"quantized-{rank}.pt") for rank in (0, 1)]
    assert [result["kept"] for result in results] == [True, False]
    assert all(result["equal"] and not result["left"] for result in results)


@pytest.mark.slow
def test_a_base_that_the_first_rank_alone_has_is_the_base_of_all(tmp_path):
    two_processes("base_of_one", tmp_path)
    two, resumed = (load(tmp_path / name / "last.ckpt") for name in ("two", "resumed"))
    for name, value in two["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    results = [torch.load(tmp_path / f"base_of_one-{rank}.pt") for rank in (0, 1)]
    assert all(result["equal"] and result["tested"] == results[0]["tested"] for result in results)
    path = tmp_path / "resumed" / "last.ckpt"
    (one,) = trainer(LoRACallback(r=4)).test(Lit(dropout=0.2), data(2), ckpt_path=path, verbose=False)
    assert one["test_loss"] == pytest.approx(results[0]["tested"][0]["test_loss"], rel=1e-6)


@pytest.mark.slow
def test_other_arguments_on_one_rank_are_an_error_on_all(tmp_path):
    two_processes("other_arguments", tmp_path)
    words = "MisconfigurationException: `targets` differs between ranks: ['q', 'v'] on rank 0 and ['q', 'k'] on rank 1"
    assert [(tmp_path / f"said-{rank}.txt").read_text().startswith(words) for rank in (0, 1)] == [True, True]


@pytest.mark.slow
def test_forked_workers_do_not_merge_and_say_where_the_adapters_are(tmp_path):
    done = run_script("two_processes.py", "forked", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the trained adapters are in the checkpoints" in done.stdout + done.stderr
    found = torch.load(tmp_path / "forked.pt")
    assert list(found["state"]) == list(Lit().state_dict())
    for name, parameter in net().named_parameters():
        assert torch.equal(found["state"][f"net.{name}"], parameter), name
    one, other = found["tested"]
    assert one == other != trainer().test(Lit(), data(2), verbose=False)


@pytest.mark.slow
def test_spawned_workers_give_back_what_they_trained_of_the_module_itself(tmp_path):
    files, module = checkpoints(tmp_path), Lit()
    trainer(TuneCallback("head"), files, strategy="ddp_spawn", devices=2, max_epochs=1).fit(module, data(), data(1))
    state = load(tmp_path / "last.ckpt")["state_dict"]
    assert state.keys() == {"net.head.weight", "net.head.bias"}
    expected = {**Lit().state_dict(), **state}
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
    assert not torch.equal(module.net.head.weight, net().head.weight)


def test_spawned_workers_without_checkpoints_are_refused():
    runner = trainer(LoRACallback(r=4))
    runner.strategy._launcher = type("_MultiProcessingLauncher", (), {})()
    with pytest.raises(
        MisconfigurationException, match=r"do not give the adapters back.*Add one, or use strategy='ddp'"
    ):
        runner.callbacks[0].setup(runner, Lit(), "fit")
