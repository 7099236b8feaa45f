"""Every strategy that runs on a CPU, in two processes: one file, the same training, exact resume, the merge."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import LoRACallback
from tests.helpers.models import Lit, data, net, trainer
from tests.helpers.scripts import run_script

DDP = ["ddp", "ddp-static-graph", "ddp-bucket-view", "ddp-find-unused"]
SHARDED = ["fsdp1", "fsdp1-configure-model", "fsdp2", "fsdp2-meta", "fsdp2-apply-before", "fsdp2-left-out"]
SHAPES = [(case, name) for case in ("encoder", "kinds", "manual", "bf16-true") for name in ("fsdp1", "fsdp2")]
SHAPES += [("bf16-mixed", "fsdp2")]  # FSDP1's plug-in casts on CUDA alone
if importlib.util.find_spec("deepspeed"):
    SHARDED += ["deepspeed-2", "deepspeed-3"]
    if torch.cuda.device_count() < 2:  # drawn on a GPU, as DeepSpeed makes it there, it would be another base
        SHARDED += ["deepspeed-3-configure-model"]
    SHAPES += [(case, f"deepspeed-{stage}") for case in ("encoder", "kinds", "bf16-true") for stage in (2, 3)]
IN_FILE = [name for name in SHARDED if name.startswith(("fsdp1", "deepspeed-3"))]
IN_PLACE = [name for name in DDP + SHARDED if name not in IN_FILE]
ADAPTERS = 16
GPUS = torch.cuda.device_count() > 1
NOISE = 0.02  # two steps' worth: where a gradient is all noise, Adam makes other last bits large
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of all runs, and what each rank noted of them."""
    folder = tmp_path_factory.mktemp("strategies")
    done = run_script("strategy_runs.py", folder, ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder, [
        torch.load(folder / f"results-{rank}.pt", weights_only=False, map_location="cpu") for rank in (0, 1)
    ]


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True, map_location="cpu")


def weights(ran, name: str, fit: str) -> dict:
    return load(ran[0] / name / fit / "last.ckpt")["state_dict"]


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).detach().abs().max()) for key in one)


def distance(one: dict, other: dict) -> float:
    return torch.stack([(one[key] - other[key]).norm() for key in one]).norm().item()


@pytest.mark.parametrize("name", DDP + SHARDED)
def test_a_file_holds_adapters_and_what_trains_beside_them_in_the_one_form(ran, name):
    saved, plain = load(ran[0] / name / "whole" / "last.ckpt"), load(ran[0] / "ddp" / "whole" / "last.ckpt")
    assert (ran[0] / name / "whole" / "last.ckpt").is_file()
    assert list(saved["state_dict"]) == list(plain["state_dict"])
    assert sum(".lora.default." in key for key in saved["state_dict"]) == ADAPTERS
    assert set(saved["state_dict"]) - {"net.head.weight", "net.head.bias"} == {
        key for key in saved["state_dict"] if ".lora.default." in key
    }
    assert saved["lightning_lora"]["base"] == plain["lightning_lora"]["base"]
    state, plain_state = saved["optimizer_states"][0], plain["optimizer_states"][0]
    assert state["param_groups"] == plain_state["param_groups"]
    assert {i: {k: v.shape for k, v in each.items()} for i, each in state["state"].items()} == {
        i: {k: v.shape for k, v in each.items()} for i, each in plain_state["state"].items()
    }


@pytest.mark.parametrize("name", DDP + SHARDED)
def test_a_file_of_weights_only_holds_the_same(ran, name):
    weights_only = load(ran[0] / name / "whole" / "weights.ckpt")
    assert "optimizer_states" not in weights_only
    assert list(weights_only["state_dict"]) == list(weights(ran, name, "whole"))


@pytest.mark.parametrize("name", DDP + SHARDED)
def test_every_strategy_trains_to_the_same_adapters(ran, name):
    other_product = name == "fsdp2-left-out" or name.startswith("deepspeed-3")
    exact = NOISE if GPUS else 1e-6 if other_product else 0
    assert largest_difference(weights(ran, name, "whole"), weights(ran, "ddp", "whole")) <= exact


@pytest.mark.parametrize("name", [name for name in DDP + SHARDED if name != "ddp-static-graph"])
def test_accumulated_and_clipped_gradients_train_to_the_same_adapters(ran, name):
    accumulated = weights(ran, name, "accumulated")
    assert largest_difference(accumulated, weights(ran, "ddp", "accumulated")) < (NOISE if GPUS else 1e-6)
    assert largest_difference(accumulated, weights(ran, "ddp", "whole")) > 1e-3


@pytest.mark.parametrize("name", DDP + SHARDED)
def test_resume_equals_the_uninterrupted_run_bit_for_bit(ran, name):
    whole, resumed = (load(ran[0] / name / fit / "last.ckpt") for fit in ("whole", "resumed"))
    assert whole["global_step"] == resumed["global_step"] == 8
    assert load(ran[0] / name / "whole" / "epoch=0.ckpt")["global_step"] == 4
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    for index, state in whole["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, resumed["optimizer_states"][0]["state"][index][key]), (index, key)


@pytest.mark.parametrize("name", DDP + SHARDED)
def test_a_save_gathers_nothing_of_the_base(ran, name):
    traffic = ran[1][0][name]["traffic"]
    gathered = sum(count for kind, count in traffic.items() if "gather" in kind)
    head = 2 * name.startswith(("fsdp2", "deepspeed-3"))  # trained and sharded
    adapters = ADAPTERS * (ran[1][0][name]["parted"] or name.startswith("deepspeed-3"))
    assert gathered == head + adapters
    assert not any("reduce" in kind for kind in traffic)


@pytest.mark.parametrize("name", DDP + SHARDED)
def test_ranks_are_equal_and_the_best_tests_as_a_fresh_module_does(ran, name):
    first, second = (results[name] for results in ran[1])
    assert (first["rank"], second["rank"]) == (0, 1) and first["equal"]
    assert first["best"] == first["fresh"] == second["best"]


@pytest.mark.parametrize("name", DDP + SHARDED)
def test_nothing_is_left_on_the_strategy_or_the_module(ran, name):
    noted = ran[1][0][name]
    assert "save_checkpoint" in noted["wrapped"] and "configure_optimizers" in noted["wrapped"]
    assert noted["left behind"] == [] and not noted["ignored"]


@pytest.mark.parametrize("name", DDP + SHARDED)
def test_a_file_of_any_strategy_loads_on_one_device(ran, name):
    noted = ran[1][0][name]
    callback = LoRACallback(r=4, dropout=0.1, also_train=["head"])
    alone = trainer(callback).test(Lit(dropout=0.2), data(2), ckpt_path=noted["best path"], verbose=False)
    assert alone[0]["test_loss"] == pytest.approx(noted["best"][0]["test_loss"], rel=1e-3 if GPUS else 1e-6)


@pytest.mark.parametrize("name", IN_PLACE)
def test_the_merge_is_the_sum_and_leaves_the_plain_model(ran, name):
    noted = ran[1][0][name]
    assert noted["keys"] == [key for key, _ in Lit().named_parameters()]
    expected = torch.cat([value.flatten() for value in written_out(ran[0] / name / "whole" / "last.ckpt").values()])
    torch.testing.assert_close(noted["merged"].detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", IN_FILE)
def test_where_the_module_cannot_hold_the_merge_it_is_written_into_a_file(ran, name):
    merged = load_file(ran[0] / name / "whole" / "merged.safetensors")
    expected = written_out(ran[0] / name / "whole" / "last.ckpt")
    assert merged.keys() == expected.keys() and not list((ran[0] / name / "whole").glob("*.part"))
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6)
    Lit().load_state_dict(merged)


def written_out(path: Path) -> dict:
    """`W + B @ A` of the adapters in a file, on the base."""
    saved = load(path)["state_dict"]
    model = {f"net.{key}": value.clone() for key, value in net().state_dict().items()}
    for key in saved:
        if key.endswith(".A"):
            layer = key.removesuffix(".lora.default.A")
            model[f"{layer}.weight"] += saved[f"{layer}.lora.default.B"] @ saved[key]
        elif ".lora." not in key:
            model[key] = saved[key]
    return model


@pytest.mark.parametrize(("case", "name"), SHAPES)
def test_other_layers_precisions_and_loops_train_alike(ran, case, name):
    sharded, plain = ran[1][0]["shapes"][case, name], ran[1][0]["shapes"][case, "ddp"]
    assert largest_difference(sharded["start"], plain["start"]) == 0
    noise = NOISE if GPUS or name == "deepspeed-3" else 1e-6  # its own product
    if GPUS and "bf16" in case:  # the products depend on how a weight lies in memory
        assert distance(sharded["end"], plain["end"]) < 0.1 * distance(plain["start"], plain["end"])
    else:
        assert largest_difference(sharded["end"], plain["end"]) < noise
    assert float(sharded["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-2 if GPUS else 1e-6)
    assert largest_difference(plain["end"], plain["start"]) > 1e-3
    assert {value.dtype for value in sharded["end"].values()} == {torch.float32}
    if "bf16" in case:
        assert sharded["state dtypes"] == {torch.float32}


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_adapters_of_a_model_made_on_the_meta_device_start_as_they_would(ran, name):
    found, elsewhere = ran[1][0]["shapes"]["meta", name], ran[1][0]["shapes"]["manual", "ddp"]
    assert largest_difference(found["start"], elsewhere["start"]) == 0
    assert largest_difference(found["end"], found["start"]) > 1e-3
