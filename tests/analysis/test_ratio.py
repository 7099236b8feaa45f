"""UpdateRatio: norms of the dense matrices."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.analysis import UpdateRatio
from tests.helpers.dense_updates import dense, norm, two_layers
from tests.helpers.layer_cases import Subject


@pytest.mark.parametrize("name", ["linear", "attention-self", "parameter-indexed"])
def test_against_dense_matrices(name):
    subject, ratio = Subject(name).train(), UpdateRatio()
    ratio.update(subject.model)
    for layer, each in dense(subject).items():
        spectral = torch.linalg.matrix_norm(each.delta, 2)
        expected = {
            "ratio": norm(each.delta) / norm(each.weight),
            "stable_rank": (norm(each.delta) / spectral) ** 2,
            "delta_norm": norm(each.delta),
            "weight_norm": norm(each.weight),
        }
        found = ratio.compute()[layer]
        assert list(found) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value.float())


def test_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    ratio = UpdateRatio()
    ratio.update(two_layers())
    fig, ax = ratio.plot()
    heights = [float(y) for line in ax.lines for y in line.get_ydata()]
    assert heights == pytest.approx([float(each["ratio"]) for each in ratio.compute().values()])
    assert ax.get_title() == "Size of the update" and "Delta" in ax.get_ylabel()
    pyplot.close(fig)
