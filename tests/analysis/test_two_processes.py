"""The metrics and the monitor in two processes: dense matrices are the oracle, whatever the strategy shards."""

from __future__ import annotations

import csv

import pytest
import torch

from tests.helpers.analysis_two_processes import MERGED, NAMES
from tests.helpers.dense_updates import norm
from tests.helpers.models import net
from tests.helpers.scripts import run_script

pytestmark = pytest.mark.slow
LAYERS = [f"net.layers.{block}.{name}" for block in (0, 1) for name in "qkvo"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    done = run_script("analysis_two_processes.py", folder, ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder, [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in (0, 1)]


def expected(adapters, layer):
    """Ratio, stable rank and amplification of dense matrices."""
    A, B = (adapters[f"{layer}.lora.default.{matrix}"].double() for matrix in "AB")
    weight = net().get_parameter(f"{layer.removeprefix('net.')}.weight").detach().double()
    U, S, Vh = torch.linalg.svd(B @ A)
    projected = norm(U[:, :4].mT @ weight @ Vh[:4].mT)
    return S.norm() / norm(weight), (S.norm() / S[0]) ** 2, S.norm() / projected, S[:4]


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_has_the_dense_values(ran, name):
    for results in ran[1]:
        result = results[name]
        for layer in LAYERS:
            ratio, stable_rank, amplification, S = (each.float() for each in expected(result["adapters"], layer))
            found = result["alone"]
            torch.testing.assert_close(found["UpdateRatio"][layer]["ratio"], ratio)
            torch.testing.assert_close(found["UpdateRatio"][layer]["stable_rank"], stable_rank)
            torch.testing.assert_close(found["AmplificationFactor"][layer]["factor"], amplification)
            torch.testing.assert_close(found["UpdateSpectrum"][layer], S)
            torch.testing.assert_close(found["SubspaceSimilarity"][layer].diagonal(), torch.ones(4))


@pytest.mark.parametrize("name", NAMES)
def test_ranks_are_not_added_up(ran, name):
    first, second = (results[name] for results in ran[1])
    torch.testing.assert_close(first["alone"], second["alone"], rtol=0, atol=0, equal_nan=True)
    for result in (first, second):
        torch.testing.assert_close(result["alone"], result["synced"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", MERGED)
def test_after_the_merge_at_the_end_of_a_run(ran, name):
    for results in ran[1]:
        torch.testing.assert_close(results[name]["alone"], results[name]["after"], rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_monitor_logs_them(ran, name):
    with (ran[0] / name / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lora_ratio"]]
    assert [int(row["step"]) for row in rows] == [0, 3, 6, 8]
    for layer in LAYERS:
        keys = [f"lora_{quantity}/{layer}" for quantity in ("ratio", "stable_rank", "amplification")]
        values = [float(value) for value in expected(ran[1][0][name]["adapters"], layer)[:3]]
        assert [float(rows[-1][key]) for key in keys] == pytest.approx(values, rel=1e-5)
        assert [rows[0][key] for key in keys] == ["0.0", "", ""]
