"""Every method under DDP, FSDP1 and FSDP2, in two processes: equal ranks, one file, exact resume."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.method_cases import FAST, SEGMENTS, module
from tests.helpers.runs import load, same
from tests.helpers.scripts import run_script

pytestmark = pytest.mark.slow
STRATEGIES = ("ddp", "fsdp1", "fsdp2")
CASES = [
    pytest.param(strategy, case, id=f"{strategy}-{case}")
    for strategy in STRATEGIES
    for case in (*FAST, SEGMENTS)
    if not (strategy == "fsdp1" and case.without_fsdp1)
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    done = run_script("method_two_processes.py", folder, ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder, [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize(("strategy", "case"), CASES)
def test_the_ranks_stay_equal_and_the_base_frozen(ran, strategy, case):
    for of_rank in ran[1]:
        result = of_rank[strategy, case.name]
        assert "error" not in result, result["error"]
        assert result["equal"]
        base = module(dropout=0.2)
        if not case.merges:
            frozen = result.get("frozen", {})
            assert all(torch.equal(value, base.get_parameter(name)) for name, value in frozen.items())


@pytest.mark.parametrize(("strategy", "case"), CASES)
def test_a_file_holds_what_trains_in_the_one_form(ran, strategy, case):
    saved = load(ran[0] / strategy / case.name / "whole" / "last.ckpt")
    statistics = {f"net.bn.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}
    assert saved["state_dict"].keys() == case.trained | case.kept | statistics
    plain = load(ran[0] / "ddp" / case.name / "whole" / "last.ckpt")
    assert saved["lightning_lora"]["base"] == plain["lightning_lora"]["base"]
    assert {key: value.shape for key, value in saved["state_dict"].items()} == {
        key: value.shape for key, value in plain["state_dict"].items()
    }


@pytest.mark.parametrize(("strategy", "case"), CASES)
def test_a_resumed_run_is_bit_identical(ran, strategy, case):
    whole, resumed = (load(ran[0] / strategy / case.name / run / "last.ckpt") for run in ("whole", "resumed"))
    assert same(whole["state_dict"], resumed["state_dict"])


@pytest.mark.parametrize("case", [case for case in FAST if case.without_fsdp1], ids=str)
def test_fsdp1_is_refused_where_it_cannot_work(ran, case):
    for of_rank in ran[1]:
        assert case.without_fsdp1 in of_rank["fsdp1", case.name]["error"]
